"""Tokens per second of training as a table, beside the losses and accuracies of the same cells."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


def speed_table(
    results: Sequence[Mapping[str, Any]], row: Callable[[Mapping[str, Any]], str], columns: Mapping[str, str]
) -> str:
    """Thousands of tokens per second, means over the cells of a row and column; "" where no cell says. Cells that
    shared their device count only where no other was measured alone.

    row: the label of a cell's row; rows stand in the order of the results. columns: variant -> its heading.
    """
    found = collections.defaultdict(list)
    for result in results:
        if result.get("tokens_per_second"):
            found[row(result), result["variant"] if "variant" in result else result["attention"]].append(result)
    if not found:
        return ""
    for key, results in found.items():
        found[key] = [result for result in results if result.get("sharing", 1) == 1] or results
    used = {name: heading for name, heading in columns.items() if any(name == key[1] for key in found)}
    lines = ["| thousand tokens/s | " + " | ".join(used.values()) + " |", "|---|" + "---|" * len(used)]
    for label in dict.fromkeys(key[0] for key in found):
        cells = [_cell(found[label, name]) for name in used]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    shown = [result for own in found.values() for result in own]
    devices = ", ".join(sorted({result["device"] for result in shown}))
    lines += ["", f"Training alone, without compilation and tests, on {devices}."]
    most = max(result.get("sharing", 1) for result in shown)
    if most > 1:
        lines[-1] += f" † up to {most} processes shared the device: compare no speeds by these."
    return "\n".join(lines) + "\n"


def _cell(results: Sequence[Mapping[str, Any]]) -> str:
    if not results:
        return ""
    mark = "†" if any(result.get("sharing", 1) > 1 for result in results) else ""
    return f"{np.mean([result['tokens_per_second'] for result in results]) / 1e3:,.0f}{mark}"

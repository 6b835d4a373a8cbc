"""Needles and lines for a masked model and its rivals: what of a long text is found again through masks."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dmattn_jax.dam import Masks
from train.dam.rivals import rivals
from train.experiments.deadline import Deadline
from train.experiments.retrieval import Answer, Grid, measure
from train.experiments.retrieval_commands import PREFILL_CHUNK, answers_of, needles
from train.experiments.retrieval_tasks import lines_is_right, lines_question, needle_is_right
from train.run_files import OpenedModel

WHOLE_PROMPTS = ("vertical_slash",)
"""Rivals that choose by the whole prompt."""
CANNOT_GENERATE = ("exact_top",)


def retrieve(
    opened: OpenedModel, masks: Masks, sinks: int, grid: Grid, haystack: str, output: Path, deadline: Deadline
) -> Iterator[dict[str, Any]]:
    """Every question of the grid to the dense model, the masked one, and rivals of its density at each length.

    Writes `<attention>/needle.json`, `longeval.json` and their pictures below output. Gives task, attention, lengths,
    accuracy per length and questions to each of them as soon as they are known; what the deadline leaves out is not
    among them.
    """
    grid.check()
    tokenizer = opened.tokenizer
    by_length = {length: rivals(opened.model, masks, length, sinks) for length in sorted(set(grid.lengths))}
    names = [name for name in next(iter(by_length.values())) if name not in CANNOT_GENERATE]
    tasks = (
        ("needle", needles(tokenizer, haystack, grid), needle_is_right),
        ("longeval", functools.partial(lines_question, tokenizer, seed=grid.seed), lines_is_right),
    )
    for _, ask, _ in tasks:
        for length in grid.lengths:
            # Before anything runs: a length that cannot be asked for is refused at once.
            ask(length, 0.0, 0)
    for task, ask, is_right in tasks:
        for name in ("dense", *names):
            if deadline.passed:
                return
            chunk = None if name in WHOLE_PROMPTS else PREFILL_CHUNK
            if name == "dense":
                own = dict.fromkeys(by_length, answers_of(opened.model, tokenizer, chunk))
            else:
                own = {length: answers_of(each[name].model, tokenizer, chunk) for length, each in by_length.items()}
            title = f"{opened.name}, {name.replace('_', ' ')}"
            result = measure(task, title, ask, _by_length(own), is_right, grid, output / name, deadline)
            accuracy = [sum(row) / len(row) for row in result.get("accuracy", ())]
            yield {
                "task": task,
                "name": name,
                "lengths": result.get("lengths", []),
                "accuracy": accuracy,
                "questions": len(grid.depths) * grid.trials,
            }


def table(found: Sequence[dict[str, Any]]) -> str:
    """Shares of right answers as Markdown."""
    lengths = sorted({length for row in found for length in row["lengths"]})
    lines = ["| task | attention | " + " | ".join(f"{length:,}" for length in lengths) + " |"]
    lines.append("|---|---|" + "---|" * len(lengths))
    for row in found:
        right = dict(zip(row["lengths"], row["accuracy"], strict=True))
        cells = " | ".join(f"{right[length]:.0%}" if length in right else "" for length in lengths)
        lines.append(f"| {row['task']} | {row['name'].replace('_', ' ')} | {cells} |")
    return "\n".join(lines)


def _by_length(answers: dict[int, Answer]) -> Answer:
    """Prompts have as many tokens as were asked for, or a few less."""

    def answer(prompts: Sequence[Sequence[int]]) -> list[str]:
        longest = max(map(len, prompts))
        return answers[min(length for length in answers if length >= longest)](prompts)

    return answer

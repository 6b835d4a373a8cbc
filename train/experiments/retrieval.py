"""Retrieval from long texts: questions at every length and depth, answers, a heat map of how many are right."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from train.errors import ConfigError
from train.experiments.deadline import Deadline
from train.experiments.results import origin, write_json
from train.experiments.retrieval_tasks import Question
from train.monitor import say
from train.plots import INK, save_figure

ANSWER_TOKENS = 32
Answer = Callable[[Sequence[Sequence[int]]], list[str]]
"""Prompts as token ids -> what a model continues each with."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """Which questions are asked. depths: shares of the text before what is hidden."""

    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    """Tokens of a prompt."""
    depths: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """Where it is hidden: 0 the start, 1 the end."""
    trials: int = 1
    """Questions for each length and depth."""
    seed: int = 0
    batch_size: int = 11
    """Prompts read together."""

    def check(self) -> None:
        """Raises: ConfigError naming what cannot work."""
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError(f"lengths must be numbers >= 1, got {self.lengths}")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ConfigError(f"depths must be between 0 and 1, got {self.depths}")
        for name in ("trials", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name.replace('_', '-')} must be >= 1, got {getattr(self, name)}")


def measure(
    task: str,
    model: str,
    ask: Callable[[int, float, int], Question],
    answer: Answer,
    is_right: Callable[[Question, str], bool],
    grid: Grid,
    output: Path,
    deadline: Deadline,
) -> dict[str, Any]:
    """Asks every question and writes `<task>.json` and `<task>.png` in `output`, new after each length.

    ask(length, depth, trial) -> question. Shorter lengths first; what the deadline leaves out is not in the result.
    Returns the content of the JSON: accuracy [lengths, depths] and every answer.
    """
    grid.check()
    depths = sorted(grid.depths)
    asked: list[dict[str, Any]] = []
    lengths: list[int] = []
    result: dict[str, Any] = {}
    # Before anything runs: a length that cannot be asked for is refused at once.
    questions = {
        length: [ask(length, depth, trial) for depth in depths for trial in range(grid.trials)]
        for length in sorted(set(grid.lengths))
    }
    with tqdm(
        total=sum(map(len, questions.values())), desc=task, unit="question", file=sys.stderr, dynamic_ncols=True
    ) as bar:
        for length, own in questions.items():
            if deadline.passed:
                say(f"time is up: lengths from {length:,} on are left out")
                break
            for first in range(0, len(own), grid.batch_size):
                batch = own[first : first + grid.batch_size]
                # Filled up to one size, so that a length compiles once.
                prompts = [question.prompt for question in batch]
                answers = answer(prompts + prompts[:1] * (min(grid.batch_size, len(own)) - len(batch)))
                asked += [_record(question, text, is_right) for question, text in zip(batch, answers, strict=False)]
                bar.update(len(batch))
            lengths.append(length)
            result = {
                "task": task,
                "form": "completion",
                "model": model,
                "lengths": lengths,
                "depths": depths,
                "trials": grid.trials,
                "seed": grid.seed,
                "accuracy": accuracy_grid(asked, lengths, depths).tolist(),
                "answers": asked,
                **origin(),
            }
            write_json(output / f"{task}.json", result)
            plot_grid(result, output / f"{task}.png")
    return result


def _record(question: Question, text: str, is_right: Callable[[Question, str], bool]) -> dict[str, Any]:
    return {
        "length": question.length,
        "depth": question.depth,
        "trial": question.trial,
        "prompt_tokens": len(question.prompt),
        "expected": question.expected,
        "answer": text,
        "right": is_right(question, text),
    }


def accuracy_grid(asked: Sequence[dict[str, Any]], lengths: Sequence[int], depths: Sequence[float]) -> np.ndarray:
    """Share of right answers, [lengths, depths]."""
    return np.array(
        [[np.mean([a["right"] for a in asked if (a["length"], a["depth"]) == (l, d)]) for d in depths] for l in lengths]
    )


def plot_grid(result: dict[str, Any], path: Path) -> None:
    """The heat map: lengths × depths."""
    grid, lengths, depths = np.array(result["accuracy"]), result["lengths"], result["depths"]
    figure = Figure(figsize=(1.5 + 1.1 * len(lengths), 1.6 + 0.38 * len(depths)), layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.imshow(grid.T, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    for column, row in np.ndindex(grid.shape):
        axes.text(column, row, f"{grid[column, row]:.0%}", ha="center", va="center", fontsize=8, color=INK)
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("depth")
    axes.set_title(f"{result['task']} · {result['model']}", loc="left", color=INK, fontweight="bold", fontsize=10)
    axes.spines[:].set_visible(False)
    figure.colorbar(drawn, ax=axes, label=f"right, of {result['trials']} each")
    save_figure(figure, path, dpi=140)

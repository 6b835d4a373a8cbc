"""Needle and lines on the command line. What computes is imported when it runs, after the arguments are checked."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from train.experiments.retrieval import Answer, Grid

if TYPE_CHECKING:
    from dmattn_jax.io.tokenizers import Tokenizer
    from dmattn_jax.models.decoder import CausalDecoder
    from train.experiments.retrieval_tasks import Question
    from train.run_files import OpenedModel

PREFILL_CHUNK = 1024


def needle(
    model: tyro.conf.Positional[Path],
    grid: tyro.conf.OmitArgPrefixes[Grid] = Grid(),  # noqa: B008
    haystack: str = "stdlib",
    output: Path | None = None,
    max_minutes: float | None = None,
    best: bool = False,
) -> int:
    """Needle in a haystack: a city's magic number hidden in a long text, which the model must complete.

    Greedy, at most 32 tokens; right if the digits appear. Writes needle.json and needle.png, lengths by depths.

    Example: dmattn needle runs/quickstart --lengths 256 512 --trials 3

    Args:
        model: A run's folder, a Hugging Face folder, a .gguf file, or hf:OWNER/NAME.
        grid: What is asked.
        haystack: The text around it: stdlib (Python's own sources), a file, a directory or a glob.
        output: Where to write; by default a run's own folder, else the current one.
        max_minutes: Begin no length after so many minutes.
        best: Take the checkpoint of the lowest validation loss instead of the newest.
    """
    from train.experiments.retrieval_tasks import needle_is_right

    grid.check()
    output = _output_folder(model, output)
    opened = _open(model, best)
    ask = needles(opened.tokenizer, haystack, grid)
    return _retrieve("needle", opened, ask, needle_is_right, grid, output, max_minutes)


def longeval(
    model: tyro.conf.Positional[Path],
    grid: tyro.conf.OmitArgPrefixes[Grid] = Grid(),  # noqa: B008
    output: Path | None = None,
    max_minutes: float | None = None,
    best: bool = False,
) -> int:
    """LongEval's lines: many named registers, one of them asked for by the start of its line.

    Greedy, at most 32 tokens; right if the last integer of the completed line is the register's content. Writes
    longeval.json and longeval.png, lengths by depths.

    Example: dmattn longeval runs/quickstart --lengths 256 512 --trials 3

    Args:
        model: A run's folder, a Hugging Face folder, a .gguf file, or hf:OWNER/NAME.
        grid: What is asked.
        output: Where to write; by default a run's own folder, else the current one.
        max_minutes: Begin no length after so many minutes.
        best: Take the checkpoint of the lowest validation loss instead of the newest.
    """
    from train.experiments.retrieval_tasks import lines_is_right, lines_question

    grid.check()
    output = _output_folder(model, output)
    opened = _open(model, best)
    ask = functools.partial(lines_question, opened.tokenizer, seed=grid.seed)
    return _retrieve("longeval", opened, ask, lines_is_right, grid, output, max_minutes)


def needles(tokenizer: Tokenizer, haystack: str, grid: Grid) -> Callable[[int, float, int], Question]:
    """The grid's questions in the text of a source."""
    from train.config import DataConfig
    from train.data.loader import source_files
    from train.data.sources import NotTextError, read_documents
    from train.experiments.retrieval_tasks import haystack_tokens, needle_question

    def texts() -> Iterator[str]:
        for file in source_files(DataConfig(source=haystack)):
            with contextlib.suppress(NotTextError):
                yield from read_documents(file, "text")

    tokens = haystack_tokens(tokenizer, texts(), 4 * max(grid.lengths))
    return functools.partial(needle_question, tokenizer, tokens, seed=grid.seed)


def answers_of(model: CausalDecoder, tokenizer: Tokenizer, prefill_chunk: int | None = PREFILL_CHUNK) -> Answer:
    """Greedy continuations by a model."""
    from dmattn_jax.generation import generate
    from train.experiments.retrieval import ANSWER_TOKENS

    def answer(prompts: Sequence[Sequence[int]]) -> list[str]:
        new = generate(
            model, prompts, max_new_tokens=ANSWER_TOKENS, stop_tokens=tokenizer.stop_ids, prefill_chunk=prefill_chunk
        )
        return [tokenizer.decode(ids) for ids in new]

    return answer


def _output_folder(model: Path, output: Path | None) -> Path:
    """Where to write, there already. Raises RunDirectoryError when nothing can be written there."""
    from train.run_directory import make_writable

    if output is None:
        output = model if (model / "checkpoints").is_dir() else Path()
    make_writable(output, "choose another --output")
    return output


def _open(model: Path, best: bool) -> OpenedModel:
    from train.run_files import open_model

    return open_model(model, best=best)


def _retrieve(
    task: str,
    opened: OpenedModel,
    ask: Callable[[int, float, int], Question],
    is_right: Callable[[Question, str], bool],
    grid: Grid,
    output: Path,
    max_minutes: float | None,
) -> int:
    from train.experiments.deadline import Deadline
    from train.experiments.retrieval import measure

    answer = answers_of(opened.model, opened.tokenizer)
    deadline = Deadline(max_minutes)
    result = measure(task, opened.name, ask, answer, is_right, grid, output, deadline)
    for length, row in zip(result.get("lengths", ()), result.get("accuracy", ()), strict=True):
        print(f"{length:8,} tokens: {sum(row) / len(row):6.1%} right")
    print(f"{output / f'{task}.json'}, {output / f'{task}.png'}")
    return 0

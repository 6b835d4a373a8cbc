"""The experiments on the command line. What computes is imported when it runs, after the arguments are checked."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from configs.mqar import SWEEPS
from configs.scaling import LADDER_20M
from train.errors import ConfigError
from train.experiments.mqar_config import MQARConfig, MQARSweep, resolve
from train.experiments.retrieval import Grid
from train.experiments.scaling_config import ScalingSweep

if TYPE_CHECKING:
    from train.experiments.retrieval_tasks import Question
    from train.run_files import OpenedModel

PREFILL_CHUNK = 1024

MQAR_HELP = """Multi-query associative recall: train one small model on it, or a sweep of models.

The same command again continues what was interrupted and skips what is done.

Examples:
  dmattn mqar --attention dma --length 2048 --dim 128
  dmattn mqar sweep paper
  dmattn mqar sweep paper --lengths 2048 --dims 64 128 --variants mha dma --seeds 0 1 --cell.minutes 5
  dmattn mqar report runs/mqar"""


SCALING_HELP = """Scaling laws of the attention variants: a ladder of sizes, all trained alike, L(C) = E + a C^-b.

The same command again continues what was interrupted and skips what is done.

Examples:
  dmattn scaling --base.data.source texts/ --max-minutes 120
  dmattn scaling --variants mha dma --sizes 3 128 2 4 256 1      (layers, width, seeds; and so on)
  dmattn scaling report runs/scaling"""


@dataclasses.dataclass(frozen=True)
class Session:
    """Where results go, and how long this session may take."""

    output: Path = Path("runs/mqar")
    """The folder of the cells: each has its own below it."""
    max_minutes: float | None = None
    """Stop after so many minutes with a checkpoint, for the same command to continue."""


@dataclasses.dataclass(frozen=True)
class CellArguments:
    cell: tyro.conf.OmitArgPrefixes[MQARConfig]
    session: tyro.conf.OmitArgPrefixes[Session]


@dataclasses.dataclass(frozen=True)
class SweepArguments(MQARSweep):
    # Inherited, because a prefix that is left out is left out of the cell's fields too.
    output: Path = Session.output
    """The folder of the cells: each has its own below it."""
    max_minutes: float | None = None
    """Stop after so many minutes with a checkpoint, for the same command to continue."""


def mqar(args: Sequence[str]) -> int:
    """`dmattn mqar`: one cell, `sweep` or `report`."""
    command, rest = (args[0], args[1:]) if args else ("", args)
    if command == "sweep":
        return _mqar_sweep(rest)
    if command == "report":
        return tyro.cli(_mqar_report, prog="dmattn mqar report", args=rest)
    given = tyro.cli(CellArguments, prog="dmattn mqar", description=MQAR_HELP, args=args)
    config = resolve(given.cell)
    from train.experiments.deadline import Deadline
    from train.experiments.mqar_cell import train_cell

    return train_cell(config, given.session.output, Deadline(given.session.max_minutes)).exit_code


def _mqar_sweep(args: Sequence[str]) -> int:
    if not args or args[0] not in SWEEPS:
        usage = f"usage: dmattn mqar sweep {{{','.join(SWEEPS)}}} [--field value ...]"
        if not args or args[0] in ("-h", "--help"):
            print(f"{usage}\n\n{MQAR_HELP}")
            return 0
        raise ConfigError(f"unknown sweep {args[0]!r}: name one of {', '.join(SWEEPS)}")

    given = tyro.cli(
        SweepArguments,
        default=SweepArguments(**vars(SWEEPS[args[0]])),
        prog=f"dmattn mqar sweep {args[0]}",
        description=MQAR_HELP,
        args=args[1:],
    )
    from train.experiments.mqar_sweep import run_sweep

    return run_sweep(given, given.output, given.max_minutes)


def _mqar_report(output: Annotated[Path, tyro.conf.Positional] = Path("runs/mqar")) -> int:
    """Draw the table and the figure of a folder of cells again."""
    from train.experiments.mqar_sweep import report

    report(output)
    print((output / "table.md").read_text(encoding="utf-8"))
    return 0


@dataclasses.dataclass(frozen=True)
class ScalingArguments(ScalingSweep):
    output: Path = Path("runs/scaling")
    """The folder of the runs: each is a run's folder below it."""
    max_minutes: float | None = None
    """Stop after so many minutes with a checkpoint, for the same command to continue."""


def scaling(args: Sequence[str]) -> int:
    """`dmattn scaling`: the ladder, or `report`."""
    if args and args[0] == "report":
        return tyro.cli(_scaling_report, prog="dmattn scaling report", args=args[1:])
    given = tyro.cli(
        ScalingArguments,
        default=ScalingArguments(**vars(LADDER_20M)),
        prog="dmattn scaling",
        description=SCALING_HELP,
        args=args,
    )
    from train.experiments.scaling import run_ladder

    return run_ladder(given, given.output, given.max_minutes)


def _scaling_report(output: Annotated[Path, tyro.conf.Positional] = Path("runs/scaling")) -> int:
    """Fit, table and figure of a folder of runs again."""
    from train.experiments.scaling import report

    report(output)
    print((output / "table.md").read_text(encoding="utf-8"))
    return 0


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
    from train.config import DataConfig
    from train.data.loader import source_files
    from train.data.sources import NotTextError, read_documents
    from train.experiments.retrieval_tasks import haystack_tokens, needle_is_right, needle_question

    grid.check()
    opened = _open(model, best)

    def texts() -> Iterator[str]:
        for file in source_files(DataConfig(source=haystack)):
            with contextlib.suppress(NotTextError):
                yield from read_documents(file, "text")

    tokens = haystack_tokens(opened.tokenizer, texts(), 4 * max(grid.lengths))
    ask = functools.partial(needle_question, opened.tokenizer, tokens, seed=grid.seed)
    return _retrieve("needle", model, opened, ask, needle_is_right, grid, output, max_minutes)


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
    opened = _open(model, best)
    ask = functools.partial(lines_question, opened.tokenizer, seed=grid.seed)
    return _retrieve("longeval", model, opened, ask, lines_is_right, grid, output, max_minutes)


def _open(model: Path, best: bool) -> OpenedModel:
    from train.run_files import open_model

    return open_model(model, best=best)


def _retrieve(
    task: str,
    path: Path,
    opened: OpenedModel,
    ask: Callable[[int, float, int], Question],
    is_right: Callable[[Question, str], bool],
    grid: Grid,
    output: Path | None,
    max_minutes: float | None,
) -> int:
    from dmattn_jax.generation import generate
    from train.experiments.deadline import Deadline
    from train.experiments.retrieval import ANSWER_TOKENS, measure

    tokenizer = opened.tokenizer
    stop = () if tokenizer.eos_id is None else (tokenizer.eos_id,)

    def answer(prompts: Sequence[Sequence[int]]) -> list[str]:
        new = generate(
            opened.model, prompts, max_new_tokens=ANSWER_TOKENS, stop_tokens=stop, prefill_chunk=PREFILL_CHUNK
        )
        return [tokenizer.decode(ids) for ids in new]

    if output is None:
        output = path if (path / "checkpoints").is_dir() else Path()
    deadline = Deadline(max_minutes)
    result = measure(task, opened.name, ask, answer, is_right, grid, output, deadline)
    for length, row in zip(result.get("lengths", ()), result.get("accuracy", ()), strict=True):
        print(f"{length:8,} tokens: {sum(row) / len(row):6.1%} right")
    print(f"{output / f'{task}.json'}, {output / f'{task}.png'}")
    return 0

"""The experiments that train models, on the command line. What computes is imported once the arguments are checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from configs.mqar import SWEEPS
from configs.scaling import LADDER_20M
from train.errors import ConfigError
from train.experiments.ablation_config import AblationSweep
from train.experiments.mqar_config import MQARConfig, MQARSweep, resolve
from train.experiments.scaling_config import ScalingSweep

MQAR_HELP = """Multi-query associative recall: train one small model on it, or a sweep of models.

The same command again continues what was interrupted and skips what is done.

Examples:
  dmattn mqar --attention dma --length 2048 --dim 128
  dmattn mqar sweep paper
  dmattn mqar sweep paper --lengths 2048 --dims 64 128 --variants mha dma --seeds 0 1 --cell.minutes 5
  dmattn mqar sweep paper --jobs 6 --max-minutes 60      (six cells at a time, on all GPUs)
  dmattn mqar sweep smoke --variants swa dma --changes none margin half_recent      (why: one thing at a time)
  dmattn mqar report runs/mqar"""


SCALING_HELP = """Scaling laws of the attention variants: a ladder of sizes, all trained alike, L(C) = E + a C^-b.

The same command again continues what was interrupted and skips what is done.

Examples:
  dmattn scaling --max-minutes 120 --jobs 4                (four runs at a time, on all GPUs)
  dmattn scaling --base.data.source texts/ --vocab-size 0  (bytes of other text)
  dmattn scaling --variants mha dma --sizes 3 128 2 4 256 1      (layers, width, seeds; and so on)
  dmattn scaling report runs/scaling"""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """How long a command may take, and of how many processes it is. Inherited by what it bounds: a prefix that is left
    out would be left out of the fields of a cell too."""

    max_minutes: float | None = None
    """Stop after so many minutes with a checkpoint, for the same command to continue."""
    jobs: int = 1
    """Processes that share the cells, and the GPUs of this machine. Small models leave a GPU idle most of the time; but
    speeds are only comparable with one process a GPU."""

    @property
    def several(self) -> bool:
        """Whether this process is to start others. Raises: ConfigError unless jobs >= 1."""
        from train.experiments.jobs import is_job

        if self.jobs < 1:
            raise ConfigError(f"jobs must be >= 1, got {self.jobs}")
        return self.jobs > 1 and not is_job()


@dataclasses.dataclass(frozen=True)
class Session:
    """Where results go, and how long this command may take."""

    output: Path = Path("runs/mqar")
    """The folder of the cells: each has its own below it."""
    max_minutes: float | None = None
    """Stop after so many minutes with a checkpoint, for the same command to continue."""


@dataclasses.dataclass(frozen=True)
class CellArguments:
    cell: tyro.conf.OmitArgPrefixes[MQARConfig]
    session: tyro.conf.OmitArgPrefixes[Session]


@dataclasses.dataclass(frozen=True)
class SweepArguments(MQARSweep, Bounds):
    output: Path = Session.output
    """The folder of the cells: each has its own below it."""


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
    names = [cell.name for cell in given.cells()]
    from train.experiments.jobs import keep_compiled, run_jobs
    from train.experiments.mqar_sweep import run_sweep

    if given.several:
        return run_jobs(["mqar", "sweep", *args], given.jobs, given.output, names)
    keep_compiled()
    return run_sweep(given, given.output, given.max_minutes)


def _mqar_report(output: Annotated[Path, tyro.conf.Positional] = Path("runs/mqar")) -> int:
    """Draw the table and the figure of a folder of cells again."""
    from train.experiments.mqar_sweep import report

    report(output)
    print((output / "table.md").read_text(encoding="utf-8"))
    return 0


@dataclasses.dataclass(frozen=True)
class ScalingArguments(ScalingSweep, Bounds):
    output: Path = Path("runs/scaling")
    """The folder of the runs: each is a run's folder below it."""


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
    from train.experiments.jobs import keep_compiled, run_jobs
    from train.experiments.scaling import run_ladder
    from train.experiments.text import tokenize_once, tokenizer_of

    several = given.several
    given.cells(given.output)  # what cannot work is refused before a vocabulary is learned
    sweep = dataclasses.replace(given, base=tokenizer_of(given.base, given.vocab_size, given.output))
    if several:
        tokenize_once(sweep.base)
        names = [cell.name for cell in sweep.cells(given.output)]
        return run_jobs(["scaling", *args], given.jobs, given.output, names)
    keep_compiled()
    return run_ladder(sweep, given.output, given.max_minutes)


def _scaling_report(output: Annotated[Path, tyro.conf.Positional] = Path("runs/scaling")) -> int:
    """Fit, table and figure of a folder of runs again."""
    from train.experiments.scaling import report

    report(output)
    print((output / "table.md").read_text(encoding="utf-8"))
    return 0


ABLATION_HELP = """Ablations of dynamic-mask attention on real text: tie order, gate, windows, margin, sliding window.

The same command again continues what was interrupted and skips what is done.

Examples:
  dmattn ablation --jobs 4 --max-minutes 60
  dmattn ablation --ablations dma swa earlier_ties --seeds 0 1 2 --base.steps 4000
  dmattn ablation report runs/ablation"""


@dataclasses.dataclass(frozen=True)
class AblationArguments(AblationSweep, Bounds):
    output: Path = Path("runs/ablation")
    """The folder of the runs: each is a run's folder below it."""


def ablation(args: Sequence[str]) -> int:
    """`dmattn ablation`: the runs, or `report`."""
    if args and args[0] == "report":
        return tyro.cli(_ablation_report, prog="dmattn ablation report", args=args[1:])
    given = tyro.cli(AblationArguments, prog="dmattn ablation", description=ABLATION_HELP, args=args)
    several = given.several
    given.cells(given.output)  # what cannot work is refused before a vocabulary is learned
    from train.experiments.ablation import run_ablations
    from train.experiments.jobs import keep_compiled, run_jobs
    from train.experiments.text import tokenize_once, tokenizer_of

    sweep = dataclasses.replace(given, base=tokenizer_of(given.base, given.vocab_size, given.output))
    if several:
        tokenize_once(sweep.base)
        return run_jobs(
            ["ablation", *args], given.jobs, given.output, [cell.name for cell in sweep.cells(given.output)]
        )
    keep_compiled()
    return run_ablations(sweep, given.output, given.max_minutes)


def _ablation_report(output: Annotated[Path, tyro.conf.Positional] = Path("runs/ablation")) -> int:
    """Draw the table and the figures of a folder of runs again."""
    from train.experiments.ablation import report

    report(output)
    print((output / "table.md").read_text(encoding="utf-8"))
    return 0

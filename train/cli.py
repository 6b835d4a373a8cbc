"""The command `dmattn`. Nothing heavy is imported before a command is known to need it."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import tyro

from train import inference
from train.errors import ConfigError, UnknownPresetError, UserError, bad_values_are_the_users

if TYPE_CHECKING:
    from train.config import TrainConfig

T = TypeVar("T")

TRAIN_HELP = """Train a preset, with any field changed. The same command again continues an interrupted run.

Examples:
  dmattn train quickstart
  dmattn train quickstart --steps 800 --model.window 128 --name wider
  dmattn train doge-20m --data.source texts/ --data.tokenizer tokenizer.json --lr auto --mesh.fsdp 4"""

PLAN_HELP = """Parameters, operations per token and memory per device of a preset, with nothing allocated.
The mesh may be larger than this machine; an axis of -1 counts as 1. With --topology the real TPU compiler tells the
memory of a TPU, without one (needs libtpu: pip install 'dmattn-jax[tpu]').

Examples:
  dmattn plan doge-60m
  dmattn plan 1.7b --mesh.fsdp 8 --model.remat
  dmattn plan doge-160m --mesh.fsdp 4 --batch-size 32 --model.remat --topology v5e:2x2"""


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for what the user can put right, 3 for a diverged run."""
    try:
        try:
            return _run(list(sys.argv[1:] if args is None else args))
        finally:
            sys.stdout.flush()
    except UserError as error:
        print("dmattn: " + " ".join(str(error).split()), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Who read the output has seen enough (`| head`). What is left in the buffer goes nowhere, or it would be tried
        # again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(overview())
        return 0
    if args[0] == "--version":
        from importlib.metadata import version

        print(f"dmattn-jax {version('dmattn-jax')}")
        return 0
    if args[0] not in COMMANDS:
        raise UserError(f"unknown command {args[0]!r}{_closest(args[0], COMMANDS)}; see dmattn --help")
    return COMMANDS[args[0]][1](args[1:])


def overview() -> str:
    """The text of `dmattn --help`."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: dmattn COMMAND ...",
            "",
            "Language models with dynamic-mask attention: train, sample and measure them.",
            "",
            "commands:",
            *(f"  {name:{width}}  {what}" for name, (what, _) in COMMANDS.items()),
            "",
            "a first run, in minutes on a CPU:",
            "  dmattn train quickstart",
            "  dmattn generate runs/quickstart --prompt 'def '",
            "",
            "dmattn COMMAND --help explains a command and all of its options.",
        ]
    )


def _closest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]}?" if close else ""


def _parse(command: Callable[..., T], prog: str, args: Sequence[str]) -> T:
    return tyro.cli(command, prog=prog, args=args)


def _preset_listing(command: str) -> str:
    from configs import PRESETS
    from train.flops import count_parameters

    lines = [f"usage: dmattn {command} PRESET [--field value ...]", "", "presets:"]
    for name, config in PRESETS.items():
        model = config.model
        lines.append(
            f"  {name:11} {count_parameters(model).total / 1e6:8,.1f}M parameters, {model.num_layers} layers of "
            f"{model.hidden_size}, window {model.window} of {config.sequence_length}"
        )
    return "\n".join([*lines, "", f"dmattn {command} PRESET --help shows every field with the preset's value."])


def find_preset(name: str) -> TrainConfig:
    """The preset of this name. Raises UnknownPresetError naming the nearest and all."""
    from configs import PRESETS

    if name not in PRESETS:
        raise UnknownPresetError(
            f"unknown preset {name!r}{_closest(name, PRESETS)}; the presets are {', '.join(PRESETS)}"
        )
    return PRESETS[name]


def _preset_config(command: str, description: str, args: Sequence[str]) -> TrainConfig | None:
    """The preset named first, with the changes that follow; None when only the list was asked for."""
    from train.config import TrainConfig

    if not args or args[0] in ("-h", "--help"):
        if args:
            print(description + "\n")
        print(_preset_listing(command))
        return None
    name = args[0]
    if name.startswith("-"):
        raise UnknownPresetError(
            f"name a preset before {name}: dmattn {command} PRESET {name} ...; see dmattn {command}"
        )
    return tyro.cli(
        TrainConfig,
        default=find_preset(name),
        prog=f"dmattn {command} {name}",
        description=description,
        args=args[1:],
    )


def _train(args: Sequence[str]) -> int:
    config = _preset_config("train", TRAIN_HELP, args)
    if config is None:
        return 0
    _initialize_distributed()
    from train.loop import run

    return run(config).exit_code


def _initialize_distributed() -> None:
    """Joins the other processes where the environment says that there are some.

    JAX_COORDINATOR_ADDRESS says so; on clusters that JAX does not know, JAX_NUM_PROCESSES and JAX_PROCESS_ID say which.
    """
    import os

    if not os.environ.get("JAX_COORDINATOR_ADDRESS"):
        return
    import jax

    given = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    try:
        numbers = {field: int(os.environ[name]) for field, name in given.items() if name in os.environ}
        jax.distributed.initialize(**numbers)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(
            f"JAX_COORDINATOR_ADDRESS is set: JAX_NUM_PROCESSES and JAX_PROCESS_ID must be integers too ({error})"
        ) from None


def _plan(args: Sequence[str]) -> int:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    own.add_argument("--topology")
    try:
        known, args = own.parse_known_args(args)
    except argparse.ArgumentError:
        raise ConfigError("--topology needs a name, such as v5e:2x2") from None
    config = _preset_config("plan", PLAN_HELP, args)
    if config is None:
        return 0
    from train.plan import describe, plan_memory

    print(describe(config, plan_memory(config, known.topology)))
    return 0


def explain() -> int:
    """Which attention implementation runs on this machine, and why not the others.

    Example: dmattn explain
    """
    import dmattn_jax

    print(dmattn_jax.explain())
    return 0


def train_tokenizer(
    sources: tyro.conf.Positional[tuple[str, ...]] = ("stdlib",),
    vocab_size: int = 8192,
    output: Path = Path("tokenizer.json"),
    text_field: str = "text",
) -> int:
    """Train a byte-level BPE tokenizer and write it as a tokenizer.json.

    Example: dmattn tokenizer train texts/ notes.txt --vocab-size 8192 --output tokenizer.json

    Args:
        sources: Files, directories, globs, stdlib (Python's own sources), or packages (those of all that is installed).
        vocab_size: Tokens in all: the 256 bytes, the end of a document, and merges.
        output: The file to write.
        text_field: The field of JSONL and Parquet rows that holds the text.
    """
    from dmattn_jax.io import tokenizers
    from train.config import DataConfig
    from train.data.loader import source_files
    from train.data.sources import NotTextError, read_documents
    from train.run_directory import make_writable

    make_writable(output.expanduser().parent, "choose another --output")
    files = [
        (file, Path(source).expanduser().is_file())
        for source in sources
        for file in source_files(DataConfig(source=source))
    ]

    def texts() -> Iterator[str]:
        for file, named in files:
            # a folder may hold what is not text; a file that was named must be
            with contextlib.nullcontext() if named else contextlib.suppress(NotTextError):
                yield from read_documents(file, text_field)

    try:
        with bad_values_are_the_users():
            trained = tokenizers.train_tokenizer(texts(), vocab_size, output, progress=sys.stderr.isatty())
    except OSError as error:
        raise UserError(f"cannot write {error.filename or output}: {error.strerror or error}") from error
    print(f"{output}: {trained.vocab_size:,} tokens from {len(files):,} files")
    return 0


def _tokenizer(args: Sequence[str]) -> int:
    if not args or args[0] != "train":
        if args and args[0] not in ("-h", "--help"):
            raise UserError(f"unknown command tokenizer {args[0]!r}; the one there is: dmattn tokenizer train")
        print("usage: dmattn tokenizer train FILES --vocab-size N --output tokenizer.json")
        print("\nTrain a byte-level BPE tokenizer; dmattn tokenizer train --help explains the options.")
        return 0
    return _parse(train_tokenizer, "dmattn tokenizer train", args[1:])


DAM_HELP = """usage: dmattn dam COMMAND ...

Dynamic attention masks for a frozen dense model: record its attention, match patterns, attend through them.

Examples:
  dmattn dam sweep model.gguf --output runs/dam      (all of it: text, masks of many settings, what they keep)
  dmattn dam text dam-text
  dmattn dam capture model.gguf --text dam-text/calibration --length 128 --output dam/
  dmattn dam match dam/ --threshold 0.3 --mu 0.8
  dmattn dam eval model.gguf dam/ --text dam-text/held-out/prose --lengths 1024
  dmattn dam apply model.gguf dam/ --prompt 'Once upon a time'
  dmattn dam plot dam/

dmattn dam COMMAND --help explains a command and all of its options."""


def _dam(args: Sequence[str]) -> int:
    from train.dam.commands import COMMANDS as commands

    if not args or args[0] in ("-h", "--help"):
        print(DAM_HELP)
        return 0
    if args[0] not in commands:
        raise UserError(
            f"unknown command dam {args[0]!r}{_closest(args[0], commands)}; there are: {', '.join(commands)}"
        )
    return _parse(commands[args[0]], f"dmattn dam {args[0]}", args[1:])


BENCHMARKS = {
    "attention": "time and memory of attention against cuDNN and PyTorch",
    "dam": "prompts through masks of a frozen model against dense attention",
    "decode": "one layer's step of decoding against cuDNN over the whole cache",
    "generation": "tokens per second and memory at long contexts",
    "train_step": "whole training steps against dense attention",
    "tune": "tiles of the Hopper kernels for one shape, by trying all that fit",
}


def _bench(args: Sequence[str]) -> int:
    """The scripts of benchmarks/, by name; each explains its own options."""
    if not args or args[0] in ("-h", "--help"):
        print("usage: dmattn bench NAME ...\n\nMeasure this machine.\n")
        print("\n".join(f"  {name:10}  {what}" for name, what in BENCHMARKS.items()))
        print("\ndmattn bench NAME --help explains its options.")
        return 0
    if args[0] not in BENCHMARKS:
        raise UserError(
            f"unknown benchmark {args[0]!r}{_closest(args[0], BENCHMARKS)}; there are: {', '.join(BENCHMARKS)}"
        )
    import importlib

    script = importlib.import_module(f"benchmarks.{args[0]}")
    options = tyro.cli(script.Options, prog=f"dmattn bench {args[0]}", description=script.__doc__, args=list(args[1:]))
    if options.output is not None:
        from train.run_directory import make_writable

        make_writable(options.output.parent, "choose another --output")
    script.main(options)
    return 0


def _export(args: Sequence[str]) -> int:
    from train.export import export

    return _parse(export, "dmattn export", args)


def _mqar(args: Sequence[str]) -> int:
    from train.experiments.commands import mqar

    return mqar(args)


def _needle(args: Sequence[str]) -> int:
    from train.experiments.retrieval_commands import needle

    return _parse(needle, "dmattn needle", args)


def _longeval(args: Sequence[str]) -> int:
    from train.experiments.retrieval_commands import longeval

    return _parse(longeval, "dmattn longeval", args)


def _ablation(args: Sequence[str]) -> int:
    from train.experiments.commands import ablation

    return ablation(args)


def _scaling(args: Sequence[str]) -> int:
    from train.experiments.commands import scaling

    return scaling(args)


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "train": ("train a preset, or continue an interrupted run", _train),
    "generate": ("continue a text with a trained model", lambda a: _parse(inference.generate, "dmattn generate", a)),
    "chat": ("talk with a trained model", lambda a: _parse(inference.chat, "dmattn chat", a)),
    "serve": ("answer OpenAI's API over HTTP", lambda a: _parse(inference.serve, "dmattn serve", a)),
    "eval": ("loss on any text, or lm_eval's tasks", lambda a: _parse(inference.evaluate, "dmattn eval", a)),
    "bench": ("measure this machine: attention, generation, training steps", _bench),
    "dam": ("masks for a frozen dense model: capture, match, apply, eval, sweep, plot", _dam),
    "export": ("write a trained model as a Hugging Face folder", _export),
    "plan": ("parameters, FLOPs and memory of a preset, nothing allocated", _plan),
    "tokenizer": ("train a tokenizer", _tokenizer),
    "mqar": ("associative recall: one model, or a sweep of variants", _mqar),
    "scaling": ("scaling laws of the attention variants", _scaling),
    "ablation": ("what each part of dynamic-mask attention does", _ablation),
    "needle": ("find a needle in a haystack, by length and depth", _needle),
    "longeval": ("find a line among many, by length and depth", _longeval),
    "explain": ("which attention implementation runs here, and why", lambda a: _parse(explain, "dmattn explain", a)),
}


if __name__ == "__main__":
    sys.exit(main())

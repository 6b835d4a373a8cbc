"""The commands `dmattn dam text|eval|sweep`: how much of a model its masks keep. Heavy imports wait until one runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from train.dam.arguments import Model, at_least
from train.dam.sweep_config import Sweep
from train.errors import ConfigError, bad_values_are_the_users
from train.experiments.retrieval import Grid

if TYPE_CHECKING:
    from dmattn_jax.dam import Masks


def text(output: tyro.conf.Positional[Path] = Path("dam-text"), megabytes: float = 3.0) -> int:
    """Gather prose and code that this machine has: calibration/ and held-out/, of different packages.

    Prose: Python's language reference, descriptions of installed packages, Markdown and reStructuredText. Code: the
    standard library and packages. The same machine always gives the same text; manifest.json says which.

    Example: dmattn dam text dam-text && dmattn dam capture model.gguf --text dam-text/calibration

    Args:
        output: A new folder.
        megabytes: Of each split and kind at most.
    """
    from train.dam.found_text import gather

    for name, facts in gather(output, megabytes).items():
        print(f"{output / name}: {facts['documents']} documents, {facts['bytes'] / 1e6:.1f} MB, {facts['digest']}")
    return 0


def evaluate(
    model: Model,
    folder: tyro.conf.Positional[Path | None] = None,
    text: tuple[str, ...] = (),
    lengths: tuple[int, ...] = (1024,),
    rows: int = 8,
    batch_size: int = 4,
    sinks: int = 4,
    retrieval_lengths: tuple[int, ...] = (),
    trials: int = 1,
    haystack: str = "stdlib",
    output: Path | None = None,
    max_minutes: float | None = None,
    text_field: str = "text",
) -> int:
    """Perplexity, KL from the dense model, top-1 agreement, needles and lines found, beside rivals of equal density.

    The rivals: a window; the first keys and a window; vertical and slash lines chosen for each prompt; the true top
    keys of each query.

    Example: dmattn dam eval model.gguf dam/ --text held-out/prose held-out/code --lengths 1024 2048 --output eval.json

    Args:
        model: The model that dam capture read.
        folder: Where dam match wrote the masks. None for a model with dynamic-mask attention: its own selection is
            measured, beside others that see as many keys, against itself seeing all of them.
        text: Files, directories or globs that dam capture did not read; each is measured by itself.
        lengths: Tokens of a row; each length is measured by itself.
        rows: Rows of each text and length at most.
        batch_size: Rows computed at once.
        sinks: First keys that the second rival sees besides its window.
        retrieval_lengths: Tokens of prompts with a needle, or with lines, to be found at 11 depths; none by default.
        trials: Needles and lines for each length and depth.
        haystack: The text around needles: stdlib, or as text.
        output: A file for the same numbers as JSON, written anew after each part; answers go to a folder beside it.
        max_minutes: Begin nothing new after so many minutes.
        text_field: The field of JSONL and Parquet rows that holds the text.
    """
    from dmattn_jax.dam import load_masks
    from dmattn_jax.nn import DynamicMaskAttention
    from train.dam.evaluate import compare, table
    from train.dam.own_selection import own_rivals
    from train.dam.rivals import rivals
    from train.dam.text import read_documents, take_rows, text_name
    from train.experiments.deadline import Deadline
    from train.monitor import say
    from train.run_files import open_model

    found: list[Any] = []
    retrieved: list[Any] = []
    with bad_values_are_the_users():
        if not text and not retrieval_lengths:
            raise ConfigError("nothing to measure: give --text, --retrieval-lengths, or both")
        at_least("lengths", min(lengths, default=0), 2)
        at_least("rows", rows, 1)
        at_least("batch-size", batch_size, 1)
        at_least("sinks", sinks, 0)
        deadline = Deadline(max_minutes)
        masks = None if folder is None else load_masks(folder)
        opened = open_model(model, best=False)
        chooses = isinstance(opened.model.blocks.attention, DynamicMaskAttention)
        if chooses == (masks is not None):
            raise ConfigError(
                "the model chooses its own keys: leave out the folder of masks"
                if chooses
                else f"{model} has no selection of its own: give the folder of its masks"
            )
        if chooses and retrieval_lengths:
            raise ConfigError("retrieval-lengths is for masks: dmattn needle and dmattn longeval ask this model")

        def write() -> None:
            if output is not None:
                _write(output, masks, opened.name, text, found, retrieved)

        documents = {source: read_documents((source,), opened.tokenizer, text_field) for source in text}
        parts = [(length, source) for length in sorted(set(lengths)) for source in text]
        for length, source in parts:
            if deadline.passed:
                say(f"time is up: {text_name(source)} at {length:,} tokens and what follows is left out")
                break
            if source == text[0]:
                dense, others = (
                    own_rivals(opened.model, length)
                    if masks is None
                    else (opened.model, rivals(opened.model, masks, length, sinks))
                )
            found += compare(
                dense,
                take_rows(documents[source], length, rows),
                others,
                text=text_name(source),
                batch_size=batch_size,
                progress=sys.stderr.isatty(),
            )
            write()
        if found:
            print(table(found))
        if retrieval_lengths and masks is not None:
            from train.dam import retrieve

            grid = Grid(lengths=retrieval_lengths, trials=trials)
            where = Path("dam-retrieval") if output is None else output.with_suffix("")
            for row in retrieve.retrieve(opened, masks, sinks, grid, haystack, where, deadline):
                retrieved.append(row)
                write()
            print(retrieve.table(retrieved))
    return 0


def sweep(
    model: Model,
    sweep: tyro.conf.OmitArgPrefixes[Sweep] = Sweep(),  # noqa: B008
    text: Path | None = None,
    output: Path = Path("runs/dam"),
    max_minutes: float | None = None,
) -> int:
    """Measure masks of every capture length, threshold and match share, beside rivals of their densities.

    Writes results.json, table.md and quality.png: quality against density. The same command again continues what was
    interrupted and skips what is done. Text, maps, masks and numbers come from this one command.

    Example: dmattn dam sweep model.gguf --output runs/dam --max-minutes 25

    Args:
        model: A run's folder, a Hugging Face folder, a .gguf file, or hf:OWNER/NAME. Its attention must be dense.
        sweep: What is measured.
        text: A folder that dmattn dam text wrote; by default one is made in the output.
        output: The folder of the cells.
        max_minutes: Begin no cell after so many minutes.
    """
    from train.dam.sweep import run_sweep
    from train.experiments.jobs import keep_compiled
    from train.run_files import open_model

    with bad_values_are_the_users():
        sweep.check()
        keep_compiled()
        return run_sweep(open_model(model, best=False), sweep, text, output, max_minutes)


def _write(
    output: Path,
    masks: Masks | None,
    name: str,
    text: tuple[str, ...],
    found: list[Any],
    retrieved: list[dict[str, Any]],
) -> None:
    import dataclasses

    from train.dam.found_text import digests
    from train.experiments.results import origin, write_json

    gathered = {root: digests(root) for source in text for root in (Path(source).parent, Path(source).parent.parent)}
    write_json(
        output,
        {
            "command": "dmattn " + " ".join(sys.argv[1:]),
            "model": name,
            "text": list(text),
            "text_digests": {str(root): own for root, own in gathered.items() if own},
            **origin(),
            "settings": {} if masks is None else masks.settings,
            "summary": {} if masks is None else masks.summary(max((row.length for row in found), default=1024)),
            "results": [dataclasses.asdict(comparison) for comparison in found],
            "retrieval": retrieved,
        },
    )

"""The commands of `dmattn dam`; those that measure are in `measuring_commands`. Heavy imports wait until one runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from train.dam.arguments import Model, at_least
from train.dam.measuring_commands import evaluate, sweep, text
from train.errors import bad_values_are_the_users


def capture(
    model: Model,
    text: tuple[str, ...] = ("stdlib",),
    output: Path = Path("dam"),
    length: int = 512,
    rows: int = 64,
    batch_size: int = 4,
    text_field: str = "text",
) -> int:
    """Record a frozen model's attention over calibration text: maps.safetensors and maps.json.

    Example: dmattn dam capture model.gguf --text notes/ --length 128 --output dam/

    Args:
        model: A run's folder, a Hugging Face folder, a .gguf file, or hf:OWNER/NAME. Its attention must be dense.
        text: Files, directories, globs, or stdlib: keep what dam eval is to read out of it.
        output: The folder of the masks.
        length: The capture length L. The maps take layers × heads × L² × 4 bytes.
        rows: Rows of L tokens at most, spread over the documents.
        batch_size: Rows computed at once.
        text_field: The field of JSONL and Parquet rows that holds the text.
    """
    from dmattn_jax.dam import capture as record
    from dmattn_jax.dam import save_maps
    from train.dam.text import read_documents, take_rows
    from train.run_files import open_model

    with bad_values_are_the_users():
        at_least("length", length, 2)
        at_least("rows", rows, 1)
        opened = open_model(model, best=False)
        taken = take_rows(read_documents(text, opened.tokenizer, text_field), length, rows)
        maps = record(
            opened.model,
            [row.tolist() for row in taken],
            length=length,
            batch_size=batch_size,
            progress=sys.stderr.isatty(),
        )
        save_maps(maps, output)
    print(f"{output}: maps of {maps.rows:,} rows, {maps.tokens:,} tokens, capture length {length}")
    return 0


def match(
    folder: tyro.conf.Positional[Path],
    threshold: float = 0.3,
    mu: float = 0.8,
    min_length: int | None = None,
    amplifier: str = "box_cox",
    length: int = 2048,
) -> int:
    """Turn captured maps into masks: masks.safetensors and masks.json, with a summary that is also printed.

    Example: dmattn dam match dam/ --threshold 0.1 --mu 0.9

    Args:
        folder: Where dam capture wrote the maps.
        threshold: τ: amplified attention from here on is in the true mask.
        mu: μ: the share of a diagonal's or vertical's cells that must be in the true mask.
        min_length: Cells that a pattern must have; the default is a quarter of the capture length.
        amplifier: One of box_cox, average, sum, log1p, sqrt, min_max, arcsinh, z_score, yeo_johnson.
        length: The length for which the summary gives densities.
    """
    from dmattn_jax.dam import MatchConfig, load_maps, save_masks
    from dmattn_jax.dam import match as match_maps

    with bad_values_are_the_users():
        at_least("length", length, 1)
        masks = match_maps(load_maps(folder), MatchConfig(threshold, mu, min_length, amplifier))
        summary = masks.summary(length)
        save_masks(masks, folder, summary)
    print(describe(summary))
    return 0


def apply(
    model: Model,
    folder: tyro.conf.Positional[Path],
    prompt: Annotated[str, tyro.conf.arg(aliases=["-p"])] = "",
    tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    continuation: str | None = None,
) -> int:
    """Continue a text with a model that attends through its masks, or score a given continuation of it.

    Example: dmattn dam apply model.gguf dam/ --prompt 'Once upon a time' --tokens 100

    Args:
        model: The model that dam capture read.
        folder: Where dam match wrote the masks.
        prompt: What to continue.
        tokens: New tokens at most.
        temperature: 0 always takes the likeliest token.
        seed: The same seed gives the same text.
        continuation: Do not generate: print the log-probability of this text after the prompt.
    """
    from dmattn_jax.chat import text_prompt
    from dmattn_jax.dam import apply_masks, load_masks
    from dmattn_jax.generation import stream_text
    from dmattn_jax.scoring import score
    from train.run_files import open_model

    with bad_values_are_the_users():
        masks = load_masks(folder)
        opened = open_model(model, best=False)
        tokenizer, masked = opened.tokenizer, apply_masks(opened.model, masks)
        ids = text_prompt(tokenizer, prompt)
        if continuation is not None:
            scored = score(masked, [ids], [tokenizer.encode(continuation)], batch_size=1)[0]
            print(f"log-probability {scored.logprob:.4f}{', each token the likeliest' if scored.greedy else ''}")
            return 0
        print(prompt, end="", flush=True)
        for piece in stream_text(
            masked,
            ids,
            tokenizer,
            max_new_tokens=tokens,
            temperature=temperature,
            seed=seed,
            stop_tokens=tokenizer.stop_ids,
        ):
            print(piece, end="", flush=True)
    print()
    return 0


def plot(folder: tyro.conf.Positional[Path]) -> int:
    """Draw maps.png, masks.png and patterns.png, heads across and layers down, from what is in the folder.

    Example: dmattn dam plot dam/

    Args:
        folder: Where dam capture and dam match wrote.
    """
    from dmattn_jax.dam import load_maps, load_masks
    from train.dam.plots import plot_maps, plot_masks, plot_patterns

    with bad_values_are_the_users():
        maps, masks = load_maps(folder), load_masks(folder)
    plot_maps(maps, folder / "maps.png")
    plot_masks(masks, folder / "masks.png")
    plot_patterns(masks, folder / "patterns.png")
    print(f"{folder}: maps.png, masks.png, patterns.png")
    return 0


def describe(summary: dict) -> str:
    """The summary of `dmattn dam match` in words."""
    return (
        f"capture length {summary['capture_length']}: {summary['heads_fallen_back']} of {summary['heads']} heads "
        f"matched nothing and see themselves and the first key beyond it; the others have "
        f"{summary['diagonals_per_head']:.1f} diagonals and {summary['verticals_per_head']:.1f} verticals each\n"
        f"density {summary['density_inside']:.1%} inside, {summary['density']:.1%} at {summary['length']:,} tokens; "
        f"{summary['empty_queries_inside']:,} queries inside see nothing"
    )


COMMANDS: dict[str, Callable[..., int]] = {
    "capture": capture,
    "match": match,
    "apply": apply,
    "plot": plot,
    "text": text,
    "eval": evaluate,
    "sweep": sweep,
}

"""The commands that use a trained model: generate, chat, serve, eval. Heavy imports wait until one runs."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from train.errors import ConfigError, MissingExtraError, bad_values_are_the_users

HIGHEST_PORT = 65535


@dataclass(frozen=True)
class Drawing:
    """How new tokens are chosen, and what ends a text."""

    temperature: float = 0.8
    """0 always takes the likeliest token; higher is more varied."""
    top_k: int | None = None
    """Draw among the likeliest K tokens only."""
    top_p: float | None = 0.95
    """Draw among the likeliest tokens of this total probability only."""
    min_p: float | None = None
    """Draw among tokens of at least this share of the likeliest's probability only."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that are there already become less likely."""
    seed: int = 0
    """The same seed, and in a conversation the same lines, give the same text."""
    stop: tuple[str, ...] = ()
    """End before any of these texts."""

    def options(self) -> dict[str, Any]:
        """The fields of `dmattn_jax.sampling.Sampling`."""
        return {name: value for name, value in vars(self).items() if name != "stop"}


def generate(
    run: tyro.conf.Positional[Path],
    prompt: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["-p"])] = ("",),
    tokens: int = 256,
    drawing: tyro.conf.OmitArgPrefixes[Drawing] = Drawing(),
    prefill_chunk: int | None = None,
    best: bool = False,
) -> int:
    """Continue a text with a trained model. One prompt is written as it comes; several are continued together.

    Example: dmattn generate runs/quickstart --prompt 'def ' --tokens 200

    Args:
        run: A run's folder, one of its checkpoints (runs/NAME/checkpoints/STEP), a Hugging Face folder, a .gguf
            file, or hf:OWNER/NAME.
        prompt: What to continue.
        tokens: New tokens at most.
        drawing: How new tokens are chosen, and what ends a text.
        prefill_chunk: Read long prompts so many tokens at a time, to bound memory.
        best: Take the checkpoint of the lowest validation loss instead of the newest.
    """
    from dmattn_jax.chat import text_prompt
    from dmattn_jax.generation import complete, stream_text
    from dmattn_jax.sampling import Sampling
    from train.run_files import open_model

    opened = open_model(run, best=best)
    tokenizer = opened.tokenizer
    prompts = [text_prompt(tokenizer, text) for text in prompt]
    with bad_values_are_the_users():
        if len(prompts) == 1:
            pieces = stream_text(
                opened.model,
                prompts[0],
                tokenizer,
                max_new_tokens=tokens,
                stop_tokens=tokenizer.stop_ids,
                stop_strings=drawing.stop,
                prefill_chunk=prefill_chunk,
                **drawing.options(),
            )
            print(prompt[0], end="", flush=True)
            _write(pieces)
            return 0
        completions = complete(
            opened.model,
            prompts,
            max_new_tokens=tokens,
            sampling=Sampling(**drawing.options()),
            stop_tokens=tokenizer.stop_ids,
            stop_strings=drawing.stop,
            tokenizer=tokenizer,
            prefill_chunk=prefill_chunk,
        )
    for number, (text, completion) in enumerate(zip(prompt, completions, strict=True)):
        if number:
            print("-" * 40)
        print(f"{text}{completion.text}")
    return 0


def chat(
    run: tyro.conf.Positional[Path],
    system: str | None = None,
    tokens: int = 512,
    drawing: tyro.conf.OmitArgPrefixes[Drawing] = Drawing(),
    prefill_chunk: int | None = 1024,
    best: bool = False,
) -> int:
    """Talk with a trained model; it sees the whole conversation. Ends with Ctrl-C, or Ctrl-D on an empty line.

    A tokenizer with a chat template writes the prompts; without one the turns simply follow each other, a line each.

    Example: dmattn chat runs/quickstart --tokens 100

    Args:
        run: A run's folder, one of its checkpoints (runs/NAME/checkpoints/STEP), a Hugging Face folder, a .gguf
            file, or hf:OWNER/NAME.
        system: What to tell the model before the conversation.
        tokens: New tokens of an answer at most.
        drawing: How new tokens are chosen, and what ends a text.
        prefill_chunk: Read the conversation so many tokens at a time, to bound memory.
        best: Take the checkpoint of the lowest validation loss instead of the newest.
    """
    from dmattn_jax.chat import chat_prompt
    from dmattn_jax.generation import stream_text
    from train.run_files import open_model

    opened = open_model(run, best=best)
    model, tokenizer = opened.model, opened.tokenizer
    messages = [] if system is None else [{"role": "system", "content": system}]
    turn = 0
    while (line := _read_line()) is not None:
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        with bad_values_are_the_users():
            pieces = stream_text(
                model,
                chat_prompt(tokenizer, messages),
                tokenizer,
                continues=False,
                max_new_tokens=tokens,
                stop_tokens=tokenizer.stop_ids,
                stop_strings=drawing.stop,
                prefill_chunk=prefill_chunk,
                **replace(drawing, seed=drawing.seed + turn).options(),
            )
            messages.append({"role": "assistant", "content": _write(pieces)})
        turn += 1
    return 0


def serve(
    run: tyro.conf.Positional[Path],
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    slots: int = 8,
    max_length: int = 4096,
    max_waiting: int = 64,
    prefill_chunk: int = 256,
    best: bool = False,
) -> int:
    """Answer OpenAI's API over HTTP: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics.

    Whoever reaches the address can use the model: beyond this machine, put a proxy that asks for a key before it.

    Example: dmattn serve runs/quickstart --port 8000

    Args:
        run: A run's folder, one of its checkpoints (runs/NAME/checkpoints/STEP), a Hugging Face folder, a .gguf
            file, or hf:OWNER/NAME.
        host: The address to listen on; 0.0.0.0 is every one of this machine's.
        port: The port to listen on; 0 is any that is free.
        name: The model's name in requests; by default the run's.
        slots: Requests decoded together.
        max_length: Tokens of a request at most, prompt included.
        max_waiting: Requests that may wait for a slot; more are refused with 429.
        prefill_chunk: Prompt tokens read between two decode steps.
        best: Take the checkpoint of the lowest validation loss instead of the newest.
    """
    if not 0 <= port <= HIGHEST_PORT:
        raise ConfigError(f"port must be 0 … {HIGHEST_PORT}, got {port}")
    try:
        from serve.engine import Engine
        from serve.run import serve as serve_forever
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"dmattn serve needs {error.name}: pip install 'dmattn-jax[serve]'") from error
    from train.run_files import open_model

    opened = open_model(run, best=best)
    with bad_values_are_the_users():
        engine = Engine(
            opened.model,
            slots=slots,
            max_length=max_length,
            prefill_chunk=prefill_chunk,
            max_waiting=max_waiting,
        )
    serve_forever(engine, opened.tokenizer, name or opened.name, host=host, port=port)
    return 0


def evaluate(
    run: tyro.conf.Positional[Path],
    text: str | None = None,
    tasks: tuple[str, ...] = (),
    include_path: Path | None = None,
    limit: int | None = None,
    text_field: str = "text",
    sequence_length: int | None = None,
    batch_size: int = 8,
    best: bool = False,
) -> int:
    """Loss, perplexity and bits per byte of a trained model on any text, or its score in lm_eval's tasks.

    Long documents are cut into rows of the sequence length; every token but a document's first is predicted.
    Tasks are read whole, whatever their length.

    Example: dmattn eval runs/quickstart --text README.md
    and: dmattn eval runs/quickstart --tasks mytask --include-path tasks/

    Args:
        run: A run's folder, or one of its checkpoints (runs/NAME/checkpoints/STEP); with --tasks also a Hugging Face
            folder, a .gguf file, or hf:OWNER/NAME.
        text: A file, a directory, a glob, or stdlib.
        tasks: Names of lm_eval's tasks.
        include_path: A folder of further tasks, as YAML files.
        limit: Documents of each task at most.
        text_field: The field of JSONL and Parquet rows that holds the text.
        sequence_length: Tokens of a row of --text; the default is that of the training.
        batch_size: Rows computed at once.
        best: Take the checkpoint of the lowest validation loss instead of the newest.
    """
    if (text is None) == (not tasks):
        raise ConfigError("name what to measure on: either --text FILES or --tasks NAMES")
    from train.run_files import load_trained, open_model

    if tasks:
        try:
            from train.harness import evaluate_tasks
        except ModuleNotFoundError as error:
            raise MissingExtraError(f"--tasks needs {error.name}: pip install 'dmattn-jax[eval]'") from error
        print(evaluate_tasks(open_model(run, best=best), tasks, include_path, batch_size=batch_size, limit=limit))
        return 0
    import jax

    from train import mesh, step
    from train.config import DataConfig, MeshConfig
    from train.data import make_evaluation
    from train.evaluate import evaluate as measure

    assert text is not None
    if sequence_length is not None and sequence_length < 1:
        raise ConfigError(f"sequence-length must be >= 1, got {sequence_length}")
    trained = load_trained(run, best=best)
    held_out = make_evaluation(
        # A part of what it was trained on is held out as it was then.
        DataConfig(source=text, text_field=text_field, validation_fraction=trained.config.data.validation_fraction),
        trained.tokenizer,
        sequence_length=sequence_length or trained.config.sequence_length,
        batch_size=batch_size,
    )
    one = mesh.make_mesh(MeshConfig(data=1))
    with jax.set_mesh(one):
        params = jax.device_put(trained.params, mesh.replicated(one))
        eval_step = step.make_eval_step(trained.skeleton, step.shardings_of(params), one)
        result = measure(eval_step, params, held_out.batches, held_out.bytes_per_token, one)
    print(held_out.description)
    print(f"{trained.path}: {result} over {result.tokens:,} tokens")
    return 0


def _write(pieces: Iterable[str]) -> str:
    """Show text as it comes, then end the line, interrupted or not. Returns the text."""
    shown = []
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            shown.append(piece)
    finally:
        print(flush=True)
    return "".join(shown)


def _read_line() -> str | None:
    """The user's next line; None at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        if sys.stdin.isatty():
            print()
        return None
    except KeyboardInterrupt:
        print()
        raise

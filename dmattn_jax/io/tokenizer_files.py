"""Tokenizers by name: `bytes`, a tokenizer.json, a model's folder, a hub id, or a GGUF file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dmattn_jax.io.errors import CheckpointFormatError
from dmattn_jax.io.hub import local_path
from dmattn_jax.io.tokenizers import ByteTokenizer, FileTokenizer, Tokenizer


def load_tokenizer(spec: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that `spec` names: `bytes`, a `tokenizer.json`, a folder that holds one, or a .gguf file.

    A chat template beside it (in `tokenizer_config.json`, or `chat_template.jinja`) is kept with it, and so is what
    `config.json` and `generation_config.json` say to end at.
    Raises FileNotFoundError where there is no such file, ValueError where it is not a tokenizer.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"tokenizer must be 'bytes' or the path of a tokenizer.json, got {str(spec)!r}: no file {path}; "
            "`dmattn tokenizer train` makes one"
        )
    if path.suffix == ".gguf":
        from dmattn_jax.io.gguf_tokenizer import read_gguf_tokenizer

        return read_gguf_tokenizer(path)
    try:
        content = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"tokenizer {path} is not a tokenizer.json: not UTF-8 ({error})") from None
    config = _json_beside(path, "tokenizer_config.json")
    stops = [
        index
        for name in ("generation_config.json", "config.json")
        for index in _ids(_json_beside(path, name).get("eos_token_id"))
    ]
    adds_bos = config.get("add_bos_token")
    try:
        return FileTokenizer(
            content,
            _named_special_tokens(config),
            _chat_template(path.parent, config),
            more_stop_ids=stops,
            adds_bos=adds_bos if isinstance(adds_bos, bool) else None,
        )
    except ValueError as error:
        raise ValueError(f"tokenizer {path} is {error}") from None


def load_pretrained_tokenizer(path: str | os.PathLike[str], vocab_size: int | None = None) -> FileTokenizer:
    """The tokenizer of a model's folder, hub id or .gguf file, with its chat template.

    vocab_size: of the model; its special tokens and all others must be in it.
    Raises: CheckpointFormatError where the tokenizer does not fit or cannot be read; FileNotFoundError, HubError.
    """
    place = local_path(path)
    try:
        tokenizer = load_tokenizer(place)
        assert isinstance(tokenizer, FileTokenizer)  # only "bytes" is another
        tokenizer.check_vocabulary(tokenizer.vocab_size if vocab_size is None else vocab_size)
    except CheckpointFormatError:
        raise
    except ValueError as error:
        raise CheckpointFormatError(f"{place}: {error}") from None
    return tokenizer


def _ids(value: Any) -> list[int]:
    """One id, or several, or none."""
    return [one for one in (value if isinstance(value, list) else [value]) if type(one) is int]


def _json_beside(tokenizer: Path, name: str) -> dict[str, Any]:
    """What a file in the tokenizer's folder says; nothing where there is none."""
    path = tokenizer.with_name(name)
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}; mend it, or move it away from the tokenizer.json") from None
    return config if isinstance(config, dict) else {}


def _named_special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """`eos_token` and `bos_token`, each a string or an object with `content`."""
    named = {}
    for role in ("eos_token", "bos_token"):
        token = config.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            named[role] = token
    return named


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The template of its own file, or of the configuration: one, or the one named `default` of several."""
    own = folder / "chat_template.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None

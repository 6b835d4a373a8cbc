"""Where a model's files are: a local path, or a folder that huggingface_hub fetched."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dmattn_jax.io.errors import HubError

REPO = re.compile(r"^[\w.-]+/[\w.-]+$")
WANTED = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*.json")
TEMPLATES = ("chat_template.jinja", "chat_template.json")


def local_path(path_or_repo: str | os.PathLike[str]) -> Path:
    """The path itself where there is one; otherwise the folder into which the hub's `owner/name` was downloaded.

    Only safetensors, configurations and tokenizers are fetched, never code or pickles.
    Raises: FileNotFoundError for what is neither; HubError when the hub gives nothing.
    """
    path = Path(path_or_repo).expanduser()
    if path.exists():
        return path
    name = os.fspath(path_or_repo)
    if not REPO.match(name) or ".." in name or name.startswith("."):
        raise FileNotFoundError(f"no model at {path}: give a folder, a .gguf file, or a hub id (owner/name)")
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=[*WANTED, *TEMPLATES], ignore_patterns=["*/*"])
        )
    except Exception as error:  # also those of its transport, which is another package in every version
        reason = " ".join(str(error).split())
        raise HubError(
            f"{name} is no local path, and the hub did not give it ({reason:.300}): "
            "check the name and the network, or download the folder elsewhere and give its path"
        ) from error

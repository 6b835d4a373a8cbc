"""Prose and code that any machine has, downloaded from nowhere: for calibration, and held out from it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.data.corpus import package_files
from train.data.sources import NotTextError, read_documents
from train.errors import ConfigError

SPLITS = ("calibration", "held-out")
KINDS = ("prose", "code")
MANIFEST = "manifest.json"
LEAST, MOST = 2_000, 400_000
"""Characters of a document: shorter ones give no row, of longer ones the beginning is taken."""
HELD_OUT = 0.4
"""Share of the packages that is held out."""
COPIED = ("licen", "copying", "notice", "authors", "/tests/", "/_vendor/", "/third_party/", "/vendor/")
"""In the names of files of which packages carry one another's copies, or that are data."""


def gather(output: Path, megabytes: float) -> dict[str, Any]:
    """`calibration/prose`, `calibration/code`, `held-out/prose` and `held-out/code` below `output`, each of about so
    many megabytes at most, one file a document, and manifest.json: their names, sizes and a digest of each folder.

    Prose is the language reference that comes with Python, the descriptions of the installed packages and their
    Markdown and reStructuredText; code their sources and the standard library's. A package (or a module of the
    standard library) is on one side of the split as a whole, by the hash of its name alone, and so are documents
    drawn: the same machine always gives the same text. Returns the manifest.

    Raises: ConfigError on megabytes <= 0, an output that holds other files, or a folder without a document.
    """
    if not megabytes > 0:
        raise ConfigError(f"megabytes must be > 0, got {megabytes}")
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"{output} is not empty: name another folder, or remove it")
    found: dict[tuple[str, str], list[tuple[str, str]]] = {(split, kind): [] for split in SPLITS for kind in KINDS}
    left = dict.fromkeys(found, megabytes * 1e6)
    names: dict[str, list[tuple[str, Any]]] = {"prose": _prose(), "code": _code()}
    for kind, documents in names.items():
        for name, read in sorted(documents, key=lambda document: _hash(document[0])):
            place = _split_of(name), kind
            if left[place] <= 0:
                continue
            text = read()[:MOST]
            if len(text) >= LEAST:
                found[place].append((name, text))
                left[place] -= len(text.encode())
    manifest: dict[str, Any] = {}
    for (split, kind), documents in found.items():
        if not documents:
            raise ConfigError(f"no {kind} was found for {split}: install the package with its dependencies")
        digest = hashlib.blake2b(digest_size=16)
        for name, text in sorted(documents):
            digest.update(f"{name}\0{text}\0".encode())
            path = output / split / kind / f"{name.replace('/', '.')}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="")
        manifest[f"{split}/{kind}"] = {
            "documents": len(documents),
            "bytes": sum(len(text.encode()) for _, text in documents),
            "digest": digest.hexdigest(),
            "names": [name for name, _ in sorted(documents)],
        }
    (output / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def digests(folder: Path) -> dict[str, str]:
    """What `gather` wrote there, by split and kind; empty for other folders."""
    if not (folder / MANIFEST).is_file():
        return {}
    return {name: facts["digest"] for name, facts in json.loads((folder / MANIFEST).read_text("utf-8")).items()}


def _prose() -> list[tuple[str, Any]]:
    documents: dict[str, Any] = {}
    with contextlib.suppress(ModuleNotFoundError):  # some systems package it apart
        topics = importlib.import_module("pydoc_data.topics").topics
        documents |= {f"reference/{name}": lambda text=text: text for name, text in topics.items()}
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower()
        body = distribution.metadata.json.get("description")
        if name and isinstance(body, str):
            documents[f"packages/{name}/description"] = lambda body=body: body
    return [*documents.items(), *_files((".md", ".rst"))]


def _code() -> list[tuple[str, Any]]:
    return list(_files((".py",)))


def _files(endings: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for file in package_files():
        name = file.name.lower()
        if name.endswith(endings) and not any(part in name for part in COPIED):

            def read(file: Any = file) -> str:
                with contextlib.suppress(NotTextError):
                    return next(iter(read_documents(file, "text")))
                return ""

            yield file.name, read


def _split_of(name: str) -> str:
    """By the package, the module of the standard library, or the topic: the first two parts of the name."""
    unit = "/".join(name.split("/")[:2]).lower().replace("-", "_").removesuffix(".py")
    return SPLITS[int.from_bytes(_hash(unit)) < HELD_OUT * 2**64]


def _hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()

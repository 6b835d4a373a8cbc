"""The folder of a run: its paths, its lock against a second writer, and the configuration it was started with."""

from __future__ import annotations

import dataclasses
import fcntl
import re
import tempfile
from pathlib import Path
from typing import IO

from dmattn_jax.io.tokenizer_files import load_tokenizer
from dmattn_jax.io.tokenizers import FileTokenizer
from train import config_json
from train.checkpoint import steps_in
from train.config import TrainConfig
from train.errors import ConfigError, RunDirectoryError, RunInUseError

TOKENIZER = "tokenizer.json"
SAMPLE_HEAD = re.compile(r"^--- step (\d+)$", re.MULTILINE)


class FolderLock:
    """Says that a folder is this process's, until `release` or the end of the process; a context manager.

    name: of the file that is locked. Locks of different names do not know of each other.
    """

    def __init__(self, folder: Path, name: str = ".lock") -> None:
        self._folder, self._name = folder, name
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Raises RunDirectoryError when the folder cannot be written, RunInUseError when another holds it."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = (self._folder / self._name).open("w")
        except OSError as error:
            raise _not_writable(self._folder, error) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise RunInUseError(f"{self._folder} is in use by another process: choose another --name") from None

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def _not_writable(path: Path, error: OSError, fix: str = "choose --runs-dir") -> RunDirectoryError:
    return RunDirectoryError(f"cannot write in {path}: {error.strerror}; {fix}")


def make_writable(folder: Path, fix: str) -> None:
    """Makes the folder, and leaves nothing in it. Raises RunDirectoryError, which ends with `fix`, when no file can be
    written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _not_writable(folder, error, fix) from error


class RunDirectory:
    """`runs/<name>/` and what lies in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.metrics = path / "metrics.csv"
        self.events = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.plots = path / "plots"
        self.samples = path / "samples.txt"
        self._lock = FolderLock(path)

    def lock(self) -> None:
        """Makes the folder and takes it for this process until it ends, however it ends.

        Raises RunDirectoryError when the folder cannot be written or another process holds it.
        """
        try:
            self.plots.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _not_writable(self.path, error) from error
        self._lock.acquire()

    def unlock(self) -> None:
        self._lock.release()

    def keep_samples(self, until: int) -> None:
        """Drops the samples of later steps: those steps run again."""
        if not self.samples.exists():
            return
        text = self.samples.read_text(encoding="utf-8")
        later = [m.start() for m in SAMPLE_HEAD.finditer(text) if int(m.group(1)) > until]
        if later:
            self.samples.write_text(text[: later[0]], encoding="utf-8")

    def continued(self, config: TrainConfig) -> TrainConfig:
        """The configuration with the batch of the run that is there, where it says auto."""
        if config.batch_size != "auto" or not (self.config.exists() and steps_in(self.checkpoints)):
            return config
        return dataclasses.replace(config, batch_size=config_json.load(self.config).batch_size)

    def keep_tokenizer(self, tokenizer: FileTokenizer, spec: str) -> None:
        """A copy of the run's own. Raises ConfigError when checkpoints are there and of another."""
        copy = self.path / TOKENIZER
        if copy.is_file() and steps_in(self.checkpoints):
            if load_tokenizer(copy).fingerprint != tokenizer.fingerprint:
                raise ConfigError(
                    f"{spec} is another tokenizer than {self.path} was begun with, of which {copy} is a copy; "
                    "choose another --name, or put the copy back"
                )
            return
        with tempfile.TemporaryDirectory(dir=self.path) as fresh:
            tokenizer.save(Path(fresh))
            for name in ("tokenizer_config.json", TOKENIZER):
                (Path(fresh) / name).replace(self.path / name)

    def adopt(self, config: TrainConfig, steps: int) -> dict[str, tuple[object, object]]:
        """Writes the configuration; on a resume, first checks that it continues the one that is there.

        steps: what `config.steps` comes to. Returns the fields that changed and may. Raises ConfigError naming the
        fields that may not, and for fewer steps than are done.
        """
        changed: dict[str, tuple[object, object]] = {}
        done = steps_in(self.checkpoints)
        if self.config.exists() and done:
            changed = config_json.differences(config_json.load(self.config), config)
            if changed.get("batch_size", (None,))[0] == "auto":  # of a run from before it was written down
                del changed["batch_size"]
            fixed = {name: both for name, both in changed.items() if not config_json.may_change_on_resume(name)}
            if fixed:
                raise ConfigError(
                    f"{self.path} holds a run with another configuration, which cannot be continued: "
                    f"{config_json.show(fixed)}; choose another --name, or remove the folder"
                )
        if done and steps < done[-1]:
            raise ConfigError(
                f"steps must be >= {done[-1]}, which {self.path} has done, got {steps}; "
                "choose another --name, or remove the folder"
            )
        fresh = self.config.with_suffix(".json.new")
        fresh.write_text(config_json.to_json(config), encoding="utf-8")
        fresh.replace(self.config)
        return changed

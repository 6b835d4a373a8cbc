"""Checkpoints: asynchronous, atomic, verified. The newest few and the best are kept; damaged ones are passed over.

A checkpoint `checkpoints/<step>/` has four items: `params` (name -> array), `optimizer` (optax state and counters),
`data` (the iterator states, JSON) and `metrics`; and a checksum list (`train/manifest.py`).
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from train.errors import CheckpointError
from train.manifest import find_damage, read_manifest, write_manifest

Say = Callable[[str], None]
Shapes = Mapping[str, jax.ShapeDtypeStruct]
DAMAGED_SUFFIX = ".damaged"


def steps_in(directory: Path) -> list[int]:
    """Steps of the committed checkpoints in a folder, ascending; [] when there is none."""
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.is_dir() and p.name.isdecimal())


def newest_intact(directory: Path, say: Say) -> int | None:
    """The newest step whose checkpoint is whole; `say` is told of each one passed over. Changes nothing on disk."""
    for step in reversed(steps_in(directory)):
        damage = find_damage(directory / str(step))
        if damage is None:
            return step
        say(f"checkpoint {directory / str(step)} is damaged ({damage}): trying the one before")
    return None


def best_step(directory: Path) -> int | None:
    """The step with the lowest validation loss among whole-looking checkpoints, or None without any such."""
    losses = {}
    for step in steps_in(directory):
        manifest = read_manifest(directory / str(step))
        loss = None if manifest is None else manifest["facts"]["validation_loss"]
        if loss is not None and math.isfinite(loss):
            losses[step] = loss
    return min(losses, key=losses.__getitem__) if losses else None


def _describe(shapes: Shapes) -> dict[str, list[Any]]:
    return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in shapes.items()}


def check_parameters(directory: Path, step: int, shapes: Shapes) -> None:
    """Raises CheckpointError when the checkpoint's parameters are not those of the model, naming the first."""
    manifest = read_manifest(directory / str(step))
    if manifest is None:
        raise CheckpointError(f"checkpoint {directory / str(step)} has no readable manifest.json: it is damaged")
    saved, expected = manifest["facts"]["parameters"], _describe(shapes)
    different = [name for name in sorted(saved | expected) if saved.get(name) != expected.get(name)]
    if different:
        name = different[0]
        raise CheckpointError(
            f"checkpoint {directory / str(step)} is of another architecture: {len(different)} of {len(expected)} "
            f"parameters differ, first {name}: saved {saved.get(name)}, the model has {expected.get(name)}"
        )


def restore_parameters(directory: Path, step: int, shapes: Shapes) -> dict[str, jax.Array]:
    """Only the parameters of one checkpoint, placed as the shardings in `shapes` say.

    Raises CheckpointError when the checkpoint is damaged or of another architecture.
    """
    damage = find_damage(directory / str(step))
    if damage is not None:
        raise CheckpointError(f"checkpoint {directory / str(step)} is damaged: {damage}")
    check_parameters(directory, step, shapes)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((directory / str(step) / "params").absolute(), dict(shapes))


class CheckpointWriter:
    """Saves and restores the whole state of a run. One writer a folder; every process of a run makes one.

    directory: `runs/<name>/checkpoints`. keep: newest checkpoints kept, beside the best.
    Damaged checkpoints found at the start are renamed to `<step>.damaged`, and `say` is told.
    """

    def __init__(self, directory: Path, keep: int, say: Say) -> None:
        self.directory = directory.absolute()
        self._facts: dict[str, Any] = {}
        # orbax reports each of its steps at INFO, and harmless facts of a single host at WARNING
        logging.getLogger("absl").setLevel(logging.ERROR)
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._set_damaged_aside(say)
        newest = checkpoint_managers.LatestN(n=keep)
        best = checkpoint_managers.BestN(
            get_metric_fn=lambda metrics: metrics["validation_loss"],
            reverse=True,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_names=("params", "optimizer", "data"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy([newest, best]),
                best_fn=lambda metrics: metrics["validation_loss"],
                best_mode="min",
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
            ),
        )

    def _set_damaged_aside(self, say: Say) -> None:
        # Newest first, every byte, until one is whole; older ones by sizes alone: they are only kept, and a
        # fallback to one of them reads it fully on its own day.
        found_whole = False
        for step in reversed(steps_in(self.directory)):
            damage = find_damage(self.directory / str(step), contents=not found_whole)
            if damage is None:
                found_whole = True
                continue
            path = self.directory / str(step)
            aside = path.with_name(path.name + DAMAGED_SUFFIX)
            if aside.exists():
                shutil.rmtree(aside)
            path.rename(aside)
            say(f"checkpoint {path} is damaged ({damage}): moved to {aside.name}, using the one before")

    def _write_manifest(self) -> None:
        # called by orbax in its own thread when all items are written and before the rename that commits them
        if jax.process_index() == 0:
            (temporary,) = self.directory.glob(f"{self._facts['step']}.orbax-checkpoint-tmp*")
            write_manifest(Path(temporary), self._facts)

    @property
    def newest(self) -> int | None:
        """Step of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        params: Shapes | Mapping[str, jax.Array],
        optimizer: Any,
        data: Any,
        validation_loss: float | None,
    ) -> None:
        """Starts writing; returns once the arrays are copied to the host. A save under way is waited for first.

        data: JSON-able. A loss that is not finite is none: it must not be the best. Raises what the save before raised,
        when it failed (a full disk).
        """
        if validation_loss is not None and not math.isfinite(validation_loss):
            validation_loss = None
        self._manager.wait_until_finished()
        if step in self._manager.all_steps():
            return
        self._facts = {
            "step": step,
            "validation_loss": validation_loss,
            "parameters": _describe(params),  # type: ignore[arg-type]
        }
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(dict(params)),
                optimizer=ocp.args.StandardSave(optimizer),
                data=ocp.args.JsonSave(data),
            ),
            metrics=None if validation_loss is None else {"validation_loss": validation_loss},
        )

    def restore(self, step: int, params: Shapes, optimizer: Any) -> tuple[dict[str, jax.Array], Any, Any]:
        """(params, optimizer, data) of one checkpoint, placed as the shardings of the abstract arrays say.

        Any mesh can read what any other wrote. Raises CheckpointError when the architecture is another.
        """
        check_parameters(self.directory, step, params)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(dict(params)),
                optimizer=ocp.args.StandardRestore(optimizer),
                data=ocp.args.JsonRestore(),
            ),
        )
        return restored["params"], restored["optimizer"], restored["data"]

    def wait(self) -> None:
        """Returns when the save under way is committed; raises if it failed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

"""One cell of the recall experiment, trained to the end or to where its time is up, and continued from there."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from train.checkpoint import CheckpointWriter
from train.config_json import show
from train.errors import ConfigError, TrainingDivergedError
from train.experiments.deadline import Deadline
from train.experiments.mqar_config import MQARConfig
from train.experiments.mqar_plots import GateHistory, film_of, plot_film, plot_gates, plot_mqar_masks, plot_training
from train.experiments.mqar_step import Programs, make_programs, placed
from train.experiments.results import RESULT, origin, write_json
from train.interrupt import Interrupt
from train.metrics_file import MetricsFile, read_metrics
from train.monitor import say
from train.run_directory import RunDirectory
from train.step import TrainState

SECONDS_BETWEEN_SAVES = 60.0
SECONDS_BETWEEN_PICTURES = 30.0
MAX_BAD_STEPS = 20
BASE_COLUMNS = (
    "step", "epoch", "loss", "test_loss", "test_accuracy", "learning_rate", "gradient_norm", "bad_steps", "seconds",
)  # fmt: skip
MEASURES = ("key_visible", "value_visible", "in_window", "ties", "spread", "A", "delta")


@dataclasses.dataclass(frozen=True)
class CellOutcome:
    """result: the content of result.json, or None for a cell that is not finished. exit_code: 143 or 130 after a
    signal, else 0."""

    result: dict[str, Any] | None
    exit_code: int = 0


def read_result(folder: Path, config: MQARConfig) -> dict[str, Any] | None:
    """The finished cell's numbers, or None. Raises: ConfigError when the folder is of another configuration."""
    saved = folder / "config.json"
    if saved.exists():
        # A field that came later was at its default.
        before = dataclasses.asdict(MQARConfig()) | json.loads(saved.read_text(encoding="utf-8"))
        now = dataclasses.asdict(config)
        changed = {name: (before[name], now[name]) for name in now if before[name] != now[name]}
        if changed:
            raise ConfigError(
                f"{folder} holds a cell of another configuration: {show(changed)}; choose another --output"
            )
    path = folder / RESULT
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def train_cell(config: MQARConfig, output: Path, deadline: Deadline) -> CellOutcome:
    """Trains the cell (a resolved configuration) in `output/<its name>`, or continues it, until the target, the last
    epoch, its minutes or the deadline.

    A finished cell has result.json, metrics.csv and plots; an unfinished one a checkpoint. Raises UserError.
    """
    folder = output / config.name
    directory = RunDirectory(folder)
    directory.lock()
    try:
        result = read_result(folder, config)
        if result is not None:
            return CellOutcome(result)
        write_json(directory.config, dataclasses.asdict(config))
        session = _Session(config, directory)
        try:
            return session.run(deadline)
        finally:
            session.close()
    finally:
        directory.unlock()


class _Session:
    """One process's time with a cell."""

    def __init__(self, config: MQARConfig, directory: RunDirectory) -> None:
        self.config, self.directory = config, directory
        self.programs: Programs = make_programs(config)
        self.parameters = sum(int(np.prod(leaf.shape)) for leaf in self.programs.skeleton.shapes.values())
        self.checkpoints = CheckpointWriter(directory.checkpoints, 1, say)
        resumed = self.checkpoints.newest
        self.state, self.seconds = (self.programs.initial(), 0.0) if resumed is None else self._restore(resumed)
        self.step = resumed or 0
        if resumed is not None:
            say(f"{config.name}: resuming from step {resumed:,}")
        columns = [*BASE_COLUMNS]
        if self.programs.look is not None:
            columns += [f"{name}_{layer}" for name in MEASURES for layer in range(config.num_layers)]
        self.history = GateHistory(directory.path / "gates.npz", until=self.step)
        self.metrics = MetricsFile(directory.metrics, self.step, columns)
        self.accuracy, self.test_loss, self.measures = 0.0, float("nan"), dict[str, Any]()
        self.expiry = np.zeros((config.num_layers, config.length), np.int32)
        self.bar = tqdm(
            total=self.programs.steps,
            initial=self.step,
            desc=config.name,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 15.0,
            smoothing=0.05,
        )

    def close(self) -> None:
        self.bar.close()
        self.metrics.close()
        self.checkpoints.close()

    def _restore(self, at: int) -> tuple[TrainState, float]:
        """With the seconds that it took, which metrics.csv has of the last test alone."""
        abstract = placed(jax.eval_shape(self.programs.initial))
        rest = {f.name: getattr(abstract, f.name) for f in dataclasses.fields(abstract) if f.name != "params"}
        params, rest, data = self.checkpoints.restore(at, abstract.params, rest)
        return TrainState(params=params, **rest), float(data["seconds"])

    def _save(self) -> None:
        rest = {f.name: getattr(self.state, f.name) for f in dataclasses.fields(self.state) if f.name != "params"}
        self.checkpoints.save(self.step, self.state.params, rest, {"seconds": self.seconds}, None)

    def run(self, deadline: Deadline) -> CellOutcome:
        config = self.config
        losses: list[np.ndarray] = []
        saved = drawn = time.monotonic()
        stopped: str | None = None
        # Compiled apart, so that the seconds of a cell are those of its training.
        train = self.programs.train.lower(self.state).compile()  # type: ignore[attr-defined]
        with Interrupt() as interrupt:
            while stopped is None:
                began = time.perf_counter()
                self.state, metrics = train(self.state)
                metrics = jax.device_get(metrics)
                self.seconds += time.perf_counter() - began
                self.step += config.scan_steps
                losses.append(metrics["loss"])
                self.bar.update(config.scan_steps)
                self.bar.set_postfix(loss=f"{losses[-1].mean():.3f}", accuracy=f"{self.accuracy:.3f}", refresh=False)
                self._refuse_divergence(metrics)
                if self.step >= self.programs.steps:
                    stopped = "epochs" if config.steps is None else "steps"
                elif config.minutes is not None and self.seconds >= 60 * config.minutes:
                    stopped = "time"
                if stopped is not None or self.step % config.eval_every == 0:
                    self._test(metrics, float(np.concatenate(losses).mean()))
                    losses.clear()
                    if self.accuracy >= config.target:
                        stopped = "target"
                    if stopped is not None or time.monotonic() - drawn > SECONDS_BETWEEN_PICTURES:
                        self._draw()
                        drawn = time.monotonic()
                    if stopped is None and time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                        self._save()
                        saved = time.monotonic()
                if stopped is None and (interrupt.signal is not None or deadline.passed):
                    self._save()
                    self.history.save()
                    self.checkpoints.wait()
                    say(f"{config.name}: stopped after step {self.step:,}; the same command continues it")
                    return CellOutcome(None, interrupt.exit_code if interrupt.signal is not None else 0)
        return CellOutcome(self._finish(stopped))

    def _refuse_divergence(self, metrics: Mapping[str, np.ndarray]) -> None:
        if metrics["bad_in_row"].max() >= MAX_BAD_STEPS:
            raise TrainingDivergedError(
                f"{self.config.name}: {MAX_BAD_STEPS} steps in a row up to step {self.step} had a non-finite loss or "
                "gradient; try a lower --learning-rate"
            )

    def _test(self, metrics: Mapping[str, np.ndarray], loss: float) -> None:
        """A row of metrics.csv."""
        config, params = self.config, self.state.params
        tested = jax.device_get(self.programs.test(params))
        self.accuracy, self.test_loss = float(tested["accuracy"]), float(tested["loss"])
        assert config.batch_size is not None
        row: dict[str, object] = {
            "step": self.step,
            "epoch": f"{self.step * config.batch_size / config.train_examples:.4f}",
            "loss": repr(loss),
            "test_loss": repr(self.test_loss),
            "test_accuracy": repr(self.accuracy),
            "learning_rate": f"{float(metrics['learning_rate'][-1]):.6g}",
            "gradient_norm": f"{float(metrics['gradient_norm'][-1]):.6g}",
            "bad_steps": int(metrics["bad_steps"][-1]),
            "seconds": f"{self.seconds:.3f}",
        }
        if self.programs.look is not None:
            seen = jax.device_get(self.programs.look(params))
            self.measures = {name: [float(value) for value in seen[name]] for name in MEASURES}
            row |= {f"{name}_{layer}": repr(v) for name in MEASURES for layer, v in enumerate(self.measures[name])}
            self.history.add(self.step, seen["gates"])
            self.expiry = seen["expiry"]
        self.metrics.write(row)

    def _draw(self) -> None:
        """Pictures of what the last test saw."""
        config, plots = self.config, self.directory.plots
        plot_training(self.directory.metrics, config, plots / "training.png")
        if self.programs.look is not None:
            self.history.save()
            plot_gates(self.history, config, plots / "gates.png")
            plot_mqar_masks(self.expiry, config, self.step, plots / "masks.png")

    def _finish(self, stopped: str | None) -> dict[str, Any]:
        config = self.config
        rows = read_metrics(self.directory.metrics)
        assert config.batch_size is not None
        result = {
            "name": config.name,
            "config": dataclasses.asdict(config),
            "stopped": stopped,
            "accuracy": self.accuracy,
            "best_accuracy": max(float(row["test_accuracy"]) for row in rows),
            "test_loss": self.test_loss,
            "steps": self.step,
            "epochs": float(rows[-1]["epoch"]),
            "seconds": self.seconds,
            "tokens_per_second": self.step * config.batch_size * config.length / self.seconds,
            "parameters": self.parameters,
            "measures": self.measures,
            "history": [
                {"step": int(row["step"]), "accuracy": float(row["test_accuracy"]), "loss": float(row["loss"])}
                for row in rows
            ],
            **origin(self.directory.path),
        }
        if self.history.steps:
            result["film"] = film_of(self.history, config, self.programs.skeleton.merge(self.state.params))
            plot_film(result, self.directory.plots / "film.png")
        write_json(self.directory.path / RESULT, result)
        # A finished cell is never continued, and its checkpoint is the largest of its files.
        self.checkpoints.wait()
        shutil.rmtree(self.directory.checkpoints, ignore_errors=True)
        say(
            f"{config.name}: accuracy {self.accuracy:.4f} after {self.step:,} steps "
            f"({rows[-1]['epoch']} epochs, {self.seconds:,.0f} s); stopped by {stopped}"
        )
        return result

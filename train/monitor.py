"""What a person sees of a run: the bar, the rows, the events, the samples. Only process 0 shows or writes anything."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

from train.config import TrainConfig
from train.errors import MissingExtraError
from train.metrics_file import MetricsFile
from train.run_directory import RunDirectory


def say(message: str) -> None:
    """One message to the person, above the bar."""
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()


def _start_wandb(config: TrainConfig, directory: Path) -> Any:
    try:
        import wandb
    except ImportError:
        raise MissingExtraError("log.wandb needs wandb: pip install 'dmattn-jax[wandb]'") from None
    from dataclasses import asdict

    return wandb.init(
        project="dmattn", name=config.name, id=config.name, dir=directory, config=asdict(config), resume="allow"
    )


class Monitor:
    """Takes the numbers of each step and shows them.

    step: the step resumed from (None for a new run). tokens_per_step: over all devices. flops_per_token: of training.
    peak_flops: of all devices together, or None where it is not known (then there is no MFU).
    """

    def __init__(
        self,
        config: TrainConfig,
        run: RunDirectory,
        *,
        step: int | None,
        steps: int,
        tokens_per_step: int,
        flops_per_token: float,
        peak_flops: float | None,
    ) -> None:
        self._config = config
        self._run = run
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._wandb = _start_wandb(config, run.path) if config.log.wandb else None
        self._csv = MetricsFile(run.metrics, -1 if step is None else step)
        self._events = SummaryWriter(str(run.events), purge_step=0 if step is None else step + 1)
        step = step or 0
        run.keep_samples(until=step)
        self._bar = tqdm(
            total=steps,
            initial=step,
            desc=config.name,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            # in a log file a bar is a line each time it is drawn
            mininterval=0.2 if sys.stderr.isatty() else 15.0,
            smoothing=0.05,
        )
        self._started = time.perf_counter()
        self._paused = 0.0
        # the first step of a session compiles, so tokens/s counts from its end
        self._marked: tuple[int, float] | None = None
        self.training_seconds = self._csv.seconds_before

    def _clock(self) -> float:
        return time.perf_counter() - self._started - self._paused

    def untrained(self, validation_loss: float) -> None:
        """The validation loss before the first step: row 0."""
        self._csv.write({"step": 0, "tokens": 0, "validation_loss": repr(validation_loss), "seconds": "0.000"})
        self._events.add_scalar("loss/validation", validation_loss, 0)

    def add_pause(self, seconds: float) -> None:
        """Time (evaluation, samples, plots, saving) that counts neither as training time nor in tokens/s."""
        self._paused += seconds

    def step(self, step: int, metrics: Mapping[str, float], validation_loss: float | None) -> None:
        """Numbers of one finished step (counted from 1)."""
        elapsed = self._clock()
        self.training_seconds = self._csv.seconds_before + elapsed
        rate = mfu = None
        if self._marked is None:
            self._marked = (step, elapsed)
        else:
            marked_step, marked_time = self._marked
            rate = (step - marked_step) * self._tokens_per_step / max(elapsed - marked_time, 1e-9)
            mfu = rate * self._flops_per_token / self._peak_flops if self._peak_flops else None
        self._bar.update(1)
        shown = {"loss": f"{metrics['loss']:.4f}"}
        if rate is not None:
            shown["tok/s"] = f"{rate:,.0f}"
        if mfu is not None:
            shown["MFU"] = f"{mfu:.1%}"
        if metrics["bad_steps"]:
            shown["bad"] = str(int(metrics["bad_steps"]))
        self._bar.set_postfix(shown, refresh=False)
        every = self._config.log.every
        if step % every and step != 1 and step != self._bar.total and validation_loss is None:
            return
        row: dict[str, object] = {
            "step": step,
            "tokens": step * self._tokens_per_step,
            "loss": repr(metrics["loss"]),
            "validation_loss": "" if validation_loss is None else repr(validation_loss),
            "learning_rate": f"{metrics['learning_rate']:.6g}",
            "gradient_norm": f"{metrics['gradient_norm']:.6g}",
            "auxiliary": f"{metrics['auxiliary']:.6g}",
            "bad_steps": int(metrics["bad_steps"]),
            "tokens_per_second": "" if rate is None else f"{rate:.1f}",
            "mfu": "" if mfu is None else f"{mfu:.4f}",
            "seconds": f"{self.training_seconds:.3f}",
        }
        self._csv.write(row)
        values: dict[str, float] = {
            "loss/train": metrics["loss"],
            "optimizer/learning_rate": metrics["learning_rate"],
            "optimizer/gradient_norm": metrics["gradient_norm"],
            "optimizer/bad_steps": metrics["bad_steps"],
        }
        if rate is not None:
            values["speed/tokens_per_second"] = rate
        if metrics["auxiliary"]:
            values["loss/auxiliary"] = metrics["auxiliary"]
        if mfu is not None:
            values["speed/mfu"] = mfu
        if validation_loss is not None:
            values["loss/validation"] = validation_loss
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)
        if rate is not None:
            self._marked = (step, elapsed)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Appends a sample to samples.txt and the events."""
        with self._run.samples.open("a", encoding="utf-8") as file:
            file.write(f"--- step {step}\n{prompt}{text}\n\n")
        self._events.add_text("sample", f"```\n{prompt}{text}\n```", step)

    def close(self) -> None:
        self._bar.close()
        self._events.close()
        self._csv.close()
        if self._wandb is not None:
            self._wandb.finish()

"""A whole training run: from a configuration to a trained model, or from wherever the run was interrupted."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

import dmattn_jax
from dmattn_jax.io.tokenizers import FileTokenizer, Tokenizer
from dmattn_jax.models.decoder import CausalDecoder
from dmattn_jax.models.doge import DogeForCausalLM
from train import flops, mesh, report, step
from train.checkpoint import CheckpointWriter, steps_in
from train.config import TrainConfig
from train.data import Datasets, make_datasets
from train.errors import ConfigError, TrainingDivergedError
from train.evaluate import Evaluation, evaluate
from train.interrupt import Interrupt
from train.monitor import Monitor, say
from train.optimizer import make_optimizer, make_schedule
from train.parameters import Skeleton, skeleton_of
from train.resolve import Plan, resolve
from train.run_directory import RunDirectory
from train.run_files import open_tokenizer


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended. exit_code: 0 when all steps are done or time was up, 143 after SIGTERM, 130 after SIGINT.

    text: what was found to train on and to hold out, in one line.
    """

    step: int
    exit_code: int
    first: float | None
    last: Evaluation | None
    text: str


def _never() -> bool:
    return False


def run(
    config: TrainConfig,
    time_is_up: Callable[[], bool] = _never,
    make_model: Callable[..., CausalDecoder] = DogeForCausalLM,
) -> Outcome:
    """Trains `config`, or continues it: the same configuration run again goes on from the newest whole checkpoint.

    make_model(config.model, rngs=) -> a model: for experiments, another one with the same configuration.
    time_is_up: asked after every step; True saves a checkpoint and ends the session. Only for a single process.
    Raises UserError for what the user can put right, TrainingDivergedError after too many bad steps in a row.
    """
    device_mesh = mesh.make_mesh(config.mesh)
    directory = RunDirectory(Path(config.runs_dir) / config.name)
    config = directory.continued(config)
    plan = resolve(config, mesh.batch_shards(device_mesh))
    mesh.check_batch(plan.batch_size, config.accumulate, mesh.batch_shards(device_mesh))
    tokenizer = open_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size {config.model.vocab_size} is less than the {tokenizer.vocab_size} tokens of "
            f"{config.data.tokenizer}: add --model.vocab-size {tokenizer.vocab_size}"
        )
    if plan.batch_size % jax.process_count():
        raise ConfigError(f"batch_size {plan.batch_size} must be a multiple of the {jax.process_count()} processes")
    # Devices and steps may change before the run goes on, and its batch must not: what came of auto is kept.
    config = dataclasses.replace(config, batch_size=plan.batch_size)
    main_process = jax.process_index() == 0
    if main_process:
        directory.lock()
    try:
        changed = directory.adopt(config, plan.steps) if main_process else {}
        if main_process and isinstance(tokenizer, FileTokenizer):
            directory.keep_tokenizer(tokenizer, config.data.tokenizer)
        for name, (old, new) in changed.items():
            say(f"changed since the run began: {name} {old} -> {new}")
        with jax.set_mesh(device_mesh):
            session = _Session(config, plan, device_mesh, tokenizer, directory, time_is_up, make_model)
            try:
                return session.train()
            finally:
                session.data.train.close()
    finally:
        directory.unlock()


class _Session:
    """One process's time with a run."""

    def __init__(
        self,
        config: TrainConfig,
        plan: Plan,
        device_mesh: Mesh,
        tokenizer: Tokenizer,
        directory: RunDirectory,
        time_is_up: Callable[[], bool],
        make_model: Callable[..., CausalDecoder],
    ) -> None:
        self.config, self.plan, self.mesh = config, plan, device_mesh
        self.time_is_up = time_is_up
        self.tokenizer, self.directory = tokenizer, directory
        self.main_process = jax.process_index() == 0
        self.say = say if self.main_process else _say_nothing
        self.data: Datasets = make_datasets(
            config.data,
            tokenizer,
            sequence_length=config.sequence_length,
            batch_size=plan.batch_size // jax.process_count(),
            seed=config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        self.skeleton: Skeleton = skeleton_of(config.model, lambda rngs: make_model(config.model, rngs=rngs))
        self.schedule: optax.Schedule = make_schedule(config.optimizer, plan.learning_rate, plan.steps)
        optimizer = make_optimizer(config.optimizer, self.schedule, self.skeleton.decay_mask())
        self.abstract = step.abstract_state(self.skeleton, optimizer, device_mesh)
        self.train_step = step.make_train_step(
            self.skeleton, optimizer, self.schedule, self.abstract, device_mesh, config.accumulate
        )
        self.eval_step = step.make_eval_step(self.skeleton, step.shardings_of(self.abstract.params), device_mesh)
        self.expiry_function = report.make_expiry_function(self.skeleton)
        self.flops = flops.training_flops_per_token(config.model, config.sequence_length)
        self._describe()
        self.checkpoints = CheckpointWriter(directory.checkpoints, config.checkpoint.keep, self.say)
        self.resumed: int | None = self.checkpoints.newest
        if self.resumed is None:
            self.state = step.initial_state(self.skeleton, optimizer, self.abstract, config.seed)
        else:
            self.state = self._restore(self.resumed)
            self.say(f"resuming from step {self.resumed} ({directory.checkpoints / str(self.resumed)})")

    def _describe(self) -> None:
        config, plan = self.config, self.plan
        count = flops.count_parameters(config.model)
        shape = " x ".join(f"{name} {size}" for name, size in self.mesh.shape.items())
        self.say(dmattn_jax.explain())
        self.say(f"mesh: {shape}")
        if note := mesh.undivided_heads(config.model, self.mesh.shape["tensor"]):
            self.say(f"note: {note}")
        self.say(
            f"model: {config.model.attention}, {count.total / 1e6:,.2f}M parameters, "
            f"{count.non_embedding / 1e6:,.2f}M without embeddings"
        )
        total = self.flops.total * plan.tokens
        self.say(
            f"training: {plan.steps:,} steps of {plan.batch_size} x {config.sequence_length} tokens = "
            f"{plan.tokens / 1e6:,.1f}M tokens, {total:.3g} FLOPs, learning rate {plan.learning_rate:.3g} "
            f"({config.optimizer.schedule})"
        )
        self.say(f"data: {self.data.description}")
        if self.data.train_tokens:
            self.say(f"data: {plan.tokens / self.data.train_tokens:.2f} epochs of {self.data.train_tokens:,} tokens")
        if config.model.vocab_size > 2 * self.tokenizer.vocab_size:
            self.say(
                f"note: model.vocab_size is {config.model.vocab_size:,} and the tokenizer {config.data.tokenizer} has "
                f"{self.tokenizer.vocab_size:,} tokens: the other rows of the embedding are never used"
            )
        self.say(f"run: {self.directory.path}")

    def _restore(self, at: int) -> step.TrainState:
        params, rest, data = self.checkpoints.restore(at, step.shapes_of(self.abstract), _without_params(self.abstract))
        self.data.train.set_state(data)
        return step.TrainState(params=params, **rest)

    def _save(self, at: int, validation_loss: float | None) -> None:
        rest = _without_params(self.state)
        self.checkpoints.save(at, self.state.params, rest, self.data.train.get_state(), validation_loss)

    def _evaluate(self) -> Evaluation:
        return evaluate(
            self.eval_step,
            self.state.params,
            self.data.validation,
            self.data.bytes_per_token,
            self.mesh,
            self.config.log.eval_batches,
        )

    def train(self) -> Outcome:
        start = self.resumed or 0
        if start >= self.plan.steps:
            self.say(f"all {self.plan.steps} steps are done; --steps with a larger number continues")
            self.checkpoints.close()
            return Outcome(start, 0, None, None, self.data.description)
        began = time.perf_counter()
        monitor = self._make_monitor()

        try:
            with Interrupt() as interrupt:
                outcome = self._steps(start, monitor, interrupt)
                # under the handler still: a signal now must not cut the last save short
                self.checkpoints.close()
        finally:
            if monitor is not None:
                monitor.close()
        if outcome.step < self.plan.steps:
            why = "by a signal" if outcome.exit_code else "because time was up"
            saved = steps_in(self.directory.checkpoints)
            kept = "the checkpoint is saved" if outcome.step in saved else f"checkpoints: {saved or 'none'}"
            self.say(f"stopped {why} after step {outcome.step}; {kept}. Run the same command again to continue.")
        elif self.main_process:
            report.summarize(self.config, self.directory, outcome.last, time.perf_counter() - began)
        return outcome

    def _make_monitor(self) -> Monitor | None:
        if not self.main_process:
            return None
        peak = flops.device_peak_flops(jax.devices()[0].device_kind)
        return Monitor(
            self.config,
            self.directory,
            step=self.resumed,
            steps=self.plan.steps,
            tokens_per_step=self.plan.batch_size * self.config.sequence_length,
            flops_per_token=self.flops.total,
            peak_flops=peak * self.mesh.size if peak else None,
        )

    def _steps(self, start: int, monitor: Monitor | None, interrupt: Interrupt) -> Outcome:
        config, last = self.config, self.plan.steps
        first: float | None = None
        evaluation: Evaluation | None = None
        if self.resumed is None:
            evaluation = self._evaluate()
            first = evaluation.loss
            if monitor is not None:
                monitor.untrained(evaluation.loss)
                self.say(f"before training: validation {evaluation}")
        unread: tuple[int, dict[str, jax.Array]] | None = None
        for number in range(start + 1, last + 1):
            batch = mesh.global_batch(next(self.data.train), self.mesh)
            self.state, device_metrics = self.train_step(self.state, batch)
            # The numbers of the step before, while the devices work on this one: they never wait for this machine.
            if unread is not None:
                self._read(*unread, monitor)
            out_of_time = self.time_is_up()
            stop = out_of_time or interrupt.requested(number)
            saving = number % config.checkpoint.every == 0 or number == last
            evaluating = saving or number % config.log.eval_every == 0
            sampling = config.log.sample_every and number % config.log.sample_every == 0
            if not (stop or evaluating or sampling):
                unread = number, device_metrics
                continue
            unread = None
            metrics = self._numbers(number, device_metrics)
            validation: float | None = None
            began = time.perf_counter()
            if evaluating:
                evaluation = self._evaluate()
                validation = evaluation.loss
            if monitor is not None:
                monitor.add_pause(time.perf_counter() - began)
                monitor.step(number, metrics, validation)
                if validation is not None:
                    self.say(f"step {number:,}: validation {evaluation}")
            began = time.perf_counter()
            if monitor is not None and jax.process_count() == 1:
                self._picture(number, monitor, drawing=validation is not None)
            # Last, so that a kill can lose the checkpoint but never a row that the checkpoint would skip.
            if saving or stop:
                # Amid bad steps the parameters may be what is bad, and would replace the last good ones.
                sound = math.isfinite(validation) if validation is not None else not metrics["bad_in_row"]
                if sound:
                    self._save(number, validation)
                else:
                    self.say(f"step {number}: no checkpoint, because the loss is not finite")
            if monitor is not None:
                monitor.add_pause(time.perf_counter() - began)
            if stop and number < last:
                signalled = interrupt.signal is not None or not out_of_time
                return Outcome(
                    number, interrupt.exit_code if signalled else 0, first, evaluation, self.data.description
                )
        return Outcome(last, 0, first, evaluation, self.data.description)

    def _read(self, number: int, device_metrics: Mapping[str, jax.Array], monitor: Monitor | None) -> None:
        metrics = self._numbers(number, device_metrics)
        if monitor is not None:
            monitor.step(number, metrics, None)

    def _numbers(self, number: int, device_metrics: Mapping[str, jax.Array]) -> dict[str, float]:
        """Of a step, once it is done. Raises: TrainingDivergedError when too many steps in a row were bad."""
        metrics = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
        self._refuse_divergence(number, metrics)
        return metrics

    def _refuse_divergence(self, number: int, metrics: dict[str, float]) -> None:
        in_row = int(metrics["bad_in_row"])
        if in_row == 1:
            self.say(f"step {number}: the loss or a gradient is not finite; this update is skipped")
        if in_row >= self.config.optimizer.max_bad_steps:
            self.checkpoints.wait()
            newest = self.checkpoints.newest
            good = "there is no checkpoint yet" if newest is None else f"the last good checkpoint is {newest}"
            where = "" if newest is None else f" ({self.directory.checkpoints / str(newest)})"
            raise TrainingDivergedError(
                f"{in_row} steps in a row up to step {number} had a non-finite loss or gradient "
                f"(optimizer.max_bad_steps {self.config.optimizer.max_bad_steps}): {good}{where}; "
                "try a lower --optimizer.learning-rate"
            )

    def _picture(self, number: int, monitor: Monitor, *, drawing: bool) -> None:
        """Plots and a sample, where they are due."""
        log, last = self.config.log, number == self.plan.steps
        if log.sample_every and (number % log.sample_every == 0 or last):
            text = report.sample(self.skeleton, self.state.params, self.tokenizer, self.config, number)
            monitor.sample(number, log.sample_prompt, text)
        if drawing:
            row = next(iter(self.data.validation))
            report.draw(self.expiry_function, self.state.params, self.config, self.directory, row, number)


def _without_params(state: step.TrainState) -> dict[str, Any]:
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state) if f.name != "params"}


def _say_nothing(message: str) -> None:
    del message

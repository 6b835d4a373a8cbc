"""Whole runs: trained, interrupted, killed, damaged and resumed. What follows must be what would have followed."""

from __future__ import annotations

import csv
import math
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from small_run import STEPS, small_config, start

from dmattn_jax.io import ByteTokenizer, load_tokenizer, train_tokenizer
from train import step as step_module
from train.checkpoint import newest_intact, steps_in
from train.config import CheckpointConfig, DataConfig, LogConfig, OptimizerConfig, TrainConfig
from train.errors import CheckpointError, ConfigError, RunDirectoryError, TrainingDivergedError
from train.loop import run
from train.manifest import read_manifest
from train.resolve import resolve
from train.run_directory import RunDirectory
from train.run_files import load_trained, open_tokenizer


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def uninterrupted(home) -> Path:
    """The folder of a run of all steps."""
    config = small_config(home, "uninterrupted")
    outcome = run(replace(config, log=replace(config.log, sample_every=7, sample_tokens=5)))
    assert (outcome.step, outcome.exit_code) == (STEPS, 0)
    return home / "runs" / "uninterrupted"


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def course(folder: Path) -> list[tuple[str, ...]]:
    """Every number of a run that does not depend on the clock, with all its digits."""
    return [
        (row["step"], row["tokens"], row["loss"], row["validation_loss"], row["learning_rate"], row["gradient_norm"])
        for row in rows_of(folder)
    ]


def final_parameters(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in load_trained(folder, best=False).params.items()}


def assert_same_end(one: Path, other: Path) -> None:
    assert course(one) == course(other)
    first, second = final_parameters(one), final_parameters(other)
    assert first.keys() == second.keys()
    for name, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[name], err_msg=name)


def test_a_run_learns_and_leaves_its_files(uninterrupted):
    rows = rows_of(uninterrupted)
    assert [int(row["step"]) for row in rows] == list(range(STEPS + 1))
    validation = [float(row["validation_loss"]) for row in rows if row["validation_loss"]]
    assert validation[0] == pytest.approx(math.log(257), abs=0.1)
    assert validation[-1] < 0.6 * validation[0]
    for name in ("config.json", "plots/loss.png", "plots/masks.png", "samples.txt"):
        assert (uninterrupted / name).stat().st_size > 0, name
    assert list((uninterrupted / "tensorboard").glob("events*"))
    samples = (uninterrupted / "samples.txt").read_text()
    assert re.findall(r"^--- step (\d+)$", samples, re.MULTILINE) == ["7", "14"]
    assert "def " in samples
    assert steps_in(uninterrupted / "checkpoints") == [10, 14]


def test_the_learning_rate_of_the_rows_is_the_schedule(uninterrupted):
    rates = {int(row["step"]): float(row["learning_rate"]) for row in rows_of(uninterrupted)[1:]}
    assert rates[1] == pytest.approx(0.01)  # one step of warmup, one of decay
    assert rates[STEPS] == pytest.approx(0.01)


def test_the_same_run_again_is_bitwise_the_same(uninterrupted, home):
    run(small_config(home, "again"))
    assert_same_end(home / "runs" / "again", uninterrupted)


def test_the_device_has_its_next_step_before_the_last_one_is_read(home, monkeypatch):
    """But for the steps after which there is something to save or to measure: here 5 and 7."""
    events, make, get = [], step_module.make_train_step, jax.device_get

    def counted(*args):
        train_step = make(*args)

        def called(state, batch):
            events.append("step")
            return train_step(state, batch)

        return called

    def read(tree):
        if isinstance(tree, dict) and "gradient_norm" in tree:
            events.append("read")
        return get(tree)

    monkeypatch.setattr(step_module, "make_train_step", counted)
    monkeypatch.setattr(jax, "device_get", read)
    run(small_config(home, "ahead", steps=7))
    assert "".join(event[0] for event in events) == "ssrsrsrsrr" + "ssrr"


def test_running_a_finished_run_again_does_nothing(uninterrupted, home, capsys):
    config = small_config(home, "uninterrupted")
    before = (uninterrupted / "metrics.csv").read_bytes()
    assert run(replace(config, log=replace(config.log, sample_every=7, sample_tokens=5))).exit_code == 0
    assert (uninterrupted / "metrics.csv").read_bytes() == before
    assert "all 14 steps are done" in capsys.readouterr().out


def wait_for_row(folder: Path, step: int, process) -> None:
    """Until metrics.csv has the row of this step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        path = folder / "metrics.csv"
        if path.exists() and f"\n{step}," in path.read_text():
            return
        if process.poll() is not None:
            pytest.fail(f"the run ended early with {process.returncode}: {process.stderr.read()}")
        time.sleep(0.002)
    pytest.fail(f"no step {step} within two minutes")


def kill_at(config: TrainConfig, home: Path, step: int, number: signal.Signals) -> tuple[int, str]:
    process = start(config, home)
    try:
        wait_for_row(home / "runs" / config.name, step, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out + err


@pytest.mark.parametrize("step", [7, pytest.param(3, marks=pytest.mark.slow), pytest.param(10, marks=pytest.mark.slow)])
def test_sigkill_then_resume_is_bitwise(uninterrupted, home, step):
    # step 5 and 10 save: a kill at 10 is amid the save or just after it
    config = small_config(home, f"sigkill-{step}")
    code, _ = kill_at(config, home, step, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert run(config).exit_code == 0
    assert_same_end(home / "runs" / config.name, uninterrupted)


@pytest.mark.slow
def test_many_sigkills_then_resume_is_bitwise(home):
    """Killed after random times, again and again, saving at every other step, until it is done."""
    generator = np.random.default_rng(11)
    checkpoint = CheckpointConfig(every=2, keep=2)
    config = small_config(home, "sigkills", checkpoint=checkpoint, steps=61)
    for _ in range(8):
        process = start(config, home)
        wait_for_row(home / "runs" / config.name, 0, process)
        time.sleep(float(generator.uniform(0.5, 5)))
        process.kill()
        process.communicate()
    assert run(config).exit_code == 0
    straight = replace(config, name="no-sigkills")
    run(straight)
    assert_same_end(home / "runs" / config.name, home / "runs" / "no-sigkills")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_polite_signal_saves_says_how_to_go_on_and_resumes_bitwise(uninterrupted, home, number, code):
    config = small_config(home, number.name.lower())
    returned, output = kill_at(config, home, 6, number)
    assert returned == code, output
    assert "Run the same command again to continue" in output
    assert "Traceback" not in output
    folder = home / "runs" / config.name
    saved = newest_intact(folder / "checkpoints", pytest.fail)
    assert saved is not None
    assert 6 <= saved < STEPS
    assert [int(row["step"]) for row in rows_of(folder)] == list(range(saved + 1))
    assert run(config).exit_code == 0
    assert_same_end(folder, uninterrupted)


def test_a_damaged_newest_checkpoint_costs_steps_but_no_bits(uninterrupted, home, capsys):
    config = small_config(home, "damaged")
    run(config)
    folder = home / "runs" / "damaged"
    largest = max((folder / "checkpoints" / "14" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-7])
    assert run(config).exit_code == 0
    output = capsys.readouterr().out
    assert "14 is damaged" in output
    assert "resuming from step 10" in output
    assert_same_end(folder, uninterrupted)


def poisoned(monkeypatch, bad: set[int]) -> None:
    """Makes the gradients of these calls NaN."""
    original = step_module.loss_and_gradients

    def compute(skeleton, params, batch, accumulate):
        losses, gradients = original(skeleton, params, batch, accumulate)
        poison = jax.numpy.where(batch["tokens"][0, 0] < 0, jax.numpy.nan, 0.0)
        return losses, jax.tree.map(lambda g: g + poison, gradients)

    monkeypatch.setattr(step_module, "loss_and_gradients", compute)
    from train import mesh

    convert, calls = mesh.global_batch, [0]

    def marked(batch, device_mesh):
        # evaluation converts its batches in its own module, so these are training batches
        calls[0] += 1
        if calls[0] in bad:
            tokens = batch["tokens"].copy()
            tokens[0, 0] = -1
            batch = batch | {"tokens": tokens}
        return convert(batch, device_mesh)

    monkeypatch.setattr(mesh, "global_batch", marked)


def test_bad_steps_are_skipped_counted_and_shown(home, monkeypatch, capsys):
    poisoned(monkeypatch, {3, 6, 7})
    config = small_config(home, "bad-steps", optimizer=OptimizerConfig(learning_rate=1e-2, max_bad_steps=3))
    assert run(config).exit_code == 0
    counts = [int(row["bad_steps"]) for row in rows_of(home / "runs" / "bad-steps")[1:]]
    assert counts == [0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3, 3, 3]
    output = capsys.readouterr().out
    assert "step 3: the loss or a gradient is not finite" in output
    assert all(np.isfinite(leaf).all() for leaf in final_parameters(home / "runs" / "bad-steps").values())


def test_too_many_bad_steps_stop_and_name_the_last_good_checkpoint(home, monkeypatch):
    poisoned(monkeypatch, set(range(7, 99)))
    config = small_config(home, "diverged", optimizer=OptimizerConfig(learning_rate=1e-2, max_bad_steps=3))
    with pytest.raises(TrainingDivergedError, match="3 steps in a row up to step 9") as caught:
        run(config)
    assert str(home / "runs" / "diverged" / "checkpoints" / "5") in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.slow
def test_parameters_that_have_burst_replace_no_checkpoint(home, capsys):
    config = small_config(home, "burst", steps=10)
    run(config)
    folder = home / "runs" / "burst"
    good = final_parameters(folder)
    burst = replace(config, steps=100, optimizer=OptimizerConfig(learning_rate=1e25, max_bad_steps=15))
    with pytest.raises(TrainingDivergedError, match="the last good checkpoint is 10"):
        run(burst)
    assert "step 15: no checkpoint, because the loss is not finite" in capsys.readouterr().out
    assert steps_in(folder / "checkpoints") == [5, 10]
    # A signal amid bad steps keeps none either.
    calls = iter(range(99))
    assert run(burst, time_is_up=lambda: next(calls) == 2).step == 13
    assert "stopped because time was up after step 13; checkpoints: [5, 10]" in capsys.readouterr().out
    for name, leaf in final_parameters(folder).items():
        np.testing.assert_array_equal(leaf, good[name])
    assert run(replace(config, steps=11)).exit_code == 0
    assert np.isfinite(float(rows_of(folder)[-1]["validation_loss"]))


@pytest.mark.slow
def test_a_run_keeps_the_batch_that_auto_gave_it(home, monkeypatch):
    config = small_config(home, "auto-batch", batch_size="auto", steps=2)
    monkeypatch.setattr("train.optimizer.step_law_batch_tokens_for_steps", lambda steps: 29 * (3 + steps))
    run(config)
    run(replace(config, steps=4))
    tokens = [int(row["tokens"]) for row in rows_of(home / "runs" / "auto-batch")]
    assert tokens == [29 * 5 * step for step in range(5)]
    run(replace(config, steps=5, batch_size=5))
    with pytest.raises(ConfigError, match="batch_size 5 -> 6"):
        run(replace(config, steps=6, batch_size=6))
    # A run from before the number was written down.
    saved = home / "runs" / "auto-batch" / "config.json"
    saved.write_text(saved.read_text().replace('"batch_size": 5', '"batch_size": "auto"'))
    assert run(replace(config, steps=5)).step == 5


@pytest.mark.slow
def test_a_run_keeps_its_tokenizer(home, tmp_path):
    spec, folder = tmp_path / "tokenizer.json", home / "runs" / "tokenizer"
    text = [path for path in (home / "corpus").rglob("*") if path.is_file()]
    train_tokenizer(text, 300, spec)
    config = small_config(home, "tokenizer", steps=2)
    model, data = replace(config.model, vocab_size=300), replace(config.data, tokenizer=str(spec))
    config = replace(config, model=model, data=data)
    run(config)
    began = load_trained(folder, best=False).tokenizer.fingerprint
    assert load_tokenizer(spec).fingerprint == began
    train_tokenizer([path.read_text()[::-1] for path in text], 300, spec)
    assert load_trained(folder, best=False).tokenizer.fingerprint == began
    with pytest.raises(ConfigError, match=r"is another tokenizer than .*tokenizer was begun with"):
        run(replace(config, steps=3))
    # A run from before copies were kept, whose tokenizer has grown.
    (folder / "tokenizer.json").unlink()
    train_tokenizer(text, 320, spec)
    with pytest.raises(CheckpointError, match=r"has 320 tokens and the model of .* has 300"):
        load_trained(folder, best=False)


def test_what_a_run_was_begun_with(tmp_path):
    directory = RunDirectory(tmp_path)
    config = small_config(tmp_path, batch_size="auto")
    assert directory.continued(config).batch_size == "auto"
    directory.adopt(replace(config, batch_size=5), STEPS)
    own = ByteTokenizer().as_file()
    directory.keep_tokenizer(own, "own")
    assert directory.continued(config).batch_size == "auto"
    (directory.checkpoints / "5").mkdir(parents=True)
    assert directory.continued(config).batch_size == 5
    assert directory.adopt(directory.continued(config), STEPS) == {}
    directory.keep_tokenizer(own, "own")
    other = train_tokenizer(["another"], 258, tmp_path / "other.json")
    with pytest.raises(ConfigError, match=r"other\.json is another tokenizer than .* was begun with, of which"):
        directory.keep_tokenizer(other, "other.json")
    assert open_tokenizer(str(tmp_path / "tokenizer.json")).fingerprint == own.fingerprint


@pytest.mark.parametrize("changes", [{"seed": 2**32}, {"data": DataConfig(shuffle_seed=2**32)}, {"seed": -1}])
def test_seeds_that_jax_does_not_tell_apart(home, changes):
    with pytest.raises(ConfigError, match=r"seed must be (<= 4294967295|>= 0), got (4294967296|-1)"):
        resolve(small_config(home, "seeds", **changes), shards=1)


def test_another_architecture_cannot_resume(uninterrupted, home):
    config = small_config(home, "uninterrupted")
    wider = replace(config, model=replace(config.model, hidden_size=48, window=5))
    with pytest.raises(ConfigError) as caught:
        run(wider)
    message = str(caught.value)
    assert "model.hidden_size 24 -> 48" in message
    assert "model.window 7 -> 5" in message
    assert "\n" not in message
    assert '"hidden_size": 24' in (uninterrupted / "config.json").read_text()


@pytest.mark.slow
def test_more_steps_continue_a_finished_run(home):
    config = small_config(home, "longer", steps=4)
    run(config)
    assert run(replace(config, steps=6)).step == 6
    assert [int(row["step"]) for row in rows_of(home / "runs" / "longer")] == list(range(7))


@pytest.mark.parametrize("steps", [13, "auto"])
def test_fewer_steps_than_are_done_are_refused(uninterrupted, home, monkeypatch, steps):
    monkeypatch.setattr("train.loop.resolve", lambda config, shards: replace(resolve(config, shards), steps=13))
    before = (uninterrupted / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=r"steps must be >= 14, which .*uninterrupted has done, got 13"):
        run(small_config(home, "uninterrupted", steps=steps))
    assert (uninterrupted / "config.json").read_bytes() == before


def test_a_run_is_held_by_one_process(tmp_path):
    first, second = RunDirectory(tmp_path / "a"), RunDirectory(tmp_path / "a")
    first.lock()
    with pytest.raises(RunDirectoryError, match="in use by another process"):
        second.lock()
    first.unlock()
    second.lock()
    second.unlock()


def test_rows_of_steps_that_run_again_are_dropped(tmp_path):
    from train.metrics_file import MetricsFile, read_metrics

    path = tmp_path / "metrics.csv"
    with MetricsFile(path, -1) as file:
        for step in range(6):
            file.write({"step": step, "loss": "1.5", "seconds": str(step * 2.0)})
    path.write_bytes(path.read_bytes() + b"6,99,0.")  # a row that a kill cut short
    with MetricsFile(path, 3) as file:
        assert file.seconds_before == 6.0
        file.write({"step": 4, "loss": "2.5"})
    assert [row["step"] for row in read_metrics(path)] == ["0", "1", "2", "3", "4"]
    assert read_metrics(path)[-1]["loss"] == "2.5"


def test_samples_of_steps_that_run_again_are_dropped(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.samples.write_text("--- step 5\ndef a\n\n--- step 10\ndef b\n--- stepping\n\n--- step 15\ndef c\n\n")
    directory.keep_samples(until=10)
    assert directory.samples.read_text() == "--- step 5\ndef a\n\n--- step 10\ndef b\n--- stepping\n\n"


def test_checkpoints_say_what_they_are_worth(uninterrupted):
    facts = read_manifest(uninterrupted / "checkpoints" / "14")["facts"]
    last = [row["validation_loss"] for row in rows_of(uninterrupted)][-1]
    assert facts["validation_loss"] == float(last)
    assert facts["step"] == 14


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["swa", "mha"])
def test_other_attentions_train(home, attention):
    config = small_config(home, attention, steps=2)
    assert run(replace(config, model=replace(config.model, attention=attention))).exit_code == 0
    assert not (home / "runs" / attention / "plots" / "masks.png").exists()


def test_wandb_that_is_not_installed_is_one_clear_line(home, monkeypatch):
    import sys

    from train.errors import MissingExtraError

    monkeypatch.setitem(sys.modules, "wandb", None)
    config = small_config(home, "wandb")
    with pytest.raises(MissingExtraError, match=r"pip install 'dmattn-jax\[wandb\]'"):
        run(replace(config, log=LogConfig(wandb=True)))

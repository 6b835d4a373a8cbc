"""Two processes train one model: they shard the data, share the checkpoint, and lose nothing against one process."""

from __future__ import annotations

import csv
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import RUN, environment, small_config

from train import cli
from train.config import MeshConfig, TrainConfig
from train.config_json import to_json


def train(config: TrainConfig, path: Path, *environments: dict[str, str]) -> list[str]:
    """`dmattn train` in as many processes as there are environments; what each printed."""
    path.write_text(to_json(config), encoding="utf-8")
    children = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, str(path)],
            env=each,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for each in environments
    ]
    shown = [child.communicate(timeout=300)[0] for child in children]
    assert [child.returncode for child in children] == [0] * len(children), shown
    return shown


def losses(config: TrainConfig) -> list[float]:
    with (Path(config.runs_dir) / config.name / "metrics.csv").open() as rows:
        return [float(row["loss"]) for row in csv.DictReader(rows) if row["loss"]]


def in_pairs() -> list[dict[str, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = environment(devices=1) | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [shared | {"JAX_PROCESS_ID": str(number)} for number in range(2)]


@pytest.mark.slow
def test_two_processes_train_as_one_and_resume(tmp_path):
    two = small_config(tmp_path, "two", mesh=MeshConfig(data=2), steps=10)
    first, second = train(two, tmp_path / "two.json", *in_pairs())
    assert "finished" in first
    assert "finished" not in second
    (tmp_path / "one").mkdir()
    one = small_config(tmp_path / "one", "one", mesh=MeshConfig(data=2), steps=10)
    train(one, tmp_path / "one.json", environment(devices=2))
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    # Longer, with another pair of processes: goes on from the checkpoint, to where an uninterrupted run would be.
    longer = small_config(tmp_path, "two", mesh=MeshConfig(data=2), steps=14)
    shown = train(longer, tmp_path / "two.json", *in_pairs())[0]
    assert "step 10" in shown
    assert len(losses(longer)) == 14


def test_an_address_without_numbers_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    assert cli.main(["train", "quickstart", "--runs-dir", str(tmp_path)]) == 2
    assert "JAX_NUM_PROCESSES and JAX_PROCESS_ID must be integers" in capsys.readouterr().err

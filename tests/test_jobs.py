"""Several processes of one sweep: what each is given, what becomes of their exit codes, and a sweep that they share."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time

import pytest
from small_run import ROOT, environment, write_corpus
from tqdm import tqdm

from train.config import DataConfig, TrainConfig
from train.data import training_texts
from train.errors import ConfigError
from train.experiments import results as written
from train.experiments import text
from train.experiments.jobs import count_done, environment_of, run_jobs, visible_gpus
from train.experiments.results import RESULT
from train.experiments.speed import speed_table

TINY = [
    "mqar", "sweep", "smoke", "--variants", "mha", "swa", "--lengths", "16", "--pairs", "4", "--dims", "8",
    "--cell.vocab-size", "16", "--cell.train-examples", "64", "--cell.test-examples", "8", "--cell.batch-size", "4",
    "--cell.eval-every", "10", "--cell.scan-steps", "5", "--cell.num-layers", "1",
]  # fmt: skip


def test_every_process_gets_a_device_and_a_share_of_its_memory(monkeypatch, tmp_path):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert environment_of(1, 3, []) == {"DMATTN_JOBS": "3", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.300"}
    own = [environment_of(number, 5, ["4", "6"]) for number in range(5)]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in own] == ["4", "6", "4", "6", "4"]
    assert {one["DMATTN_JOBS"] for one in own} == {"3"}
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.1")
    assert environment_of(0, 2, ["0"]) == {"DMATTN_JOBS": "2"}
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "4,6"}) == ["4", "6"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
    for name in ("nvidia0", "nvidia2", "nvidia10", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert visible_gpus({}, tmp_path) == ["0", "1", "2"]


def test_exit_codes_and_last_words(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert run_jobs(["--version"], 2, tmp_path, ["none"]) == 0
    assert (tmp_path / "job-1.log").read_text().startswith("dmattn-jax")
    assert run_jobs(["mqra"], 2, tmp_path, []) == 2
    said = capsys.readouterr().out
    assert "process 1 ended with 2: dmattn: unknown command 'mqra', did you mean mqar?" in said


def test_a_log_gets_a_line_when_a_cell_is_done_and_no_other(tmp_path):
    """Without a terminal: hours of a bar drawn twice a second are no log."""
    log = io.StringIO()
    with tqdm(total=2, file=log, mininterval=0) as bar:
        drawn = [log.getvalue().count("\r")]
        for done in (False, False, True, False):
            if done:
                (tmp_path / "a").mkdir()
                (tmp_path / "a" / RESULT).write_text("{}")
            count_done(bar, tmp_path, ["a", "b"])
            drawn.append(log.getvalue().count("\r"))
    assert drawn == [1, 1, 1, 2, 2]
    assert bar.n == 1


@pytest.mark.slow
def test_a_sweep_shared_interrupted_and_continued(tmp_path):
    command = [sys.executable, "-m", "train.cli", *TINY, "--jobs", "2", "--output", str(tmp_path)]
    long = [*command, "--cell.epochs", "100000", "--cell.target", "1.1"]
    first = subprocess.Popen(
        [*long, "--output", str(tmp_path / "long")], env=environment(1), stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    # The second row of both: they are under way.
    while first.poll() is None:
        rows = [path.read_text().count("\n") for path in (tmp_path / "long").glob("*/metrics.csv")]
        if len(rows) == 2 and min(rows) > 2:
            break
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    out, _ = first.communicate(timeout=120)
    assert first.returncode == 143, out
    assert "stopped after step" in "".join(path.read_text() for path in (tmp_path / "long").glob("job-*.log"))
    done = subprocess.run(
        [*command, "--cell.epochs", "1"], env=environment(1), capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "| width | attention | 16 (4 pairs) |" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert [result["config"]["attention"] for result in results] == ["mha", "swa"]
    assert {result["sharing"] for result in results} == {2}
    assert all(result["tokens_per_second"] > 0 for result in results)
    assert "† up to 2 processes shared the device" in (tmp_path / "table.md").read_text()


def test_a_cell_that_was_trained_beside_others_and_then_alone_was_not_alone(tmp_path, monkeypatch):
    """Its seconds are those of both."""
    cell = tmp_path / "cell"
    for jobs, most in ((None, 1), ("3", 3), ("2", 3), (None, 3)):
        if jobs is None:
            monkeypatch.delenv(written.JOBS, raising=False)
        else:
            monkeypatch.setenv(written.JOBS, jobs)
        written.note_sharing(cell)
        assert written.origin(cell)["sharing"] == most
        assert written.origin()["sharing"] == int(jobs or 1)
    assert [path.name for path in cell.iterdir()] == [written.SHARED]


def test_speeds_are_means_of_those_alone_and_say_who_shared():
    cells = [
        {"attention": "mha", "size": "a", "tokens_per_second": 1e3, "device": "gpu", "sharing": 1},
        {"attention": "mha", "size": "a", "tokens_per_second": 3e3, "device": "gpu", "sharing": 1},
        {"attention": "mha", "size": "a", "tokens_per_second": 5e2, "device": "gpu", "sharing": 2},
        {"attention": "dma", "size": "b", "tokens_per_second": 7e6, "device": "gpu", "sharing": 4},
        {"attention": "dma", "size": "a", "tokens_per_second": None, "device": "gpu"},
    ]
    lines = speed_table(cells, lambda cell: cell["size"], {"dma": "DMA", "nsa": "NSA", "mha": "MHA"}).splitlines()
    assert lines[0] == "| thousand tokens/s | DMA | MHA |"
    assert lines[2:4] == ["| a |  | 2 |", "| b | 7,000† |  |"]
    assert "on gpu. † up to 4 processes" in lines[5]
    assert speed_table(cells[4:], lambda cell: cell["size"], {"dma": "DMA"}) == ""


def test_a_vocabulary_never_sees_what_is_held_out(tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "corpus")
    data = DataConfig(source=str(corpus), validation_fraction=0.2)
    trained_on = set(training_texts(data))
    seen = []
    monkeypatch.setattr(text, "train_tokenizer", lambda texts, *rest, **options: seen.extend(texts))
    monkeypatch.setattr(text, "open_tokenizer", lambda path: type("Tokenizer", (), {"vocab_size": 300}))
    config = text.tokenizer_of(TrainConfig(data=data), 300, tmp_path / "out")
    assert set(seen) == trained_on
    assert config.data.tokenizer == str(tmp_path / "out" / "tokenizer.json")
    assert config.model.vocab_size == 300
    monkeypatch.setattr(text, "VOCABULARY_CHARACTERS", 1)
    seen.clear()
    text.tokenizer_of(TrainConfig(data=data), 300, tmp_path / "out")
    assert len(seen) == 1
    with pytest.raises(ConfigError, match=r"has 300 tokens, more than vocab-size 299: choose another --output"):
        text.tokenizer_of(TrainConfig(data=data), 299, tmp_path / "out")
    assert text.tokenizer_of(TrainConfig(data=data), 0, tmp_path / "out") == TrainConfig(data=data)

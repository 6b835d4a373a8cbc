"""The command line: what it lists, what it refuses in one line, and what its commands do."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace

import pytest
from small_run import ROOT, environment, small_config

from configs import PRESETS
from train import cli, config_json, inference
from train.config import MeshConfig, TrainConfig
from train.errors import ConfigError
from train.loop import run
from train.plan import compile_step, describe, plan_memory
from train.resolve import resolve


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run."""
    home = tmp_path_factory.mktemp("trained")
    run(small_config(home, "trained"))
    return home / "runs" / "trained"


def refused(capsys, *args: str, code: int = 2) -> str:
    """The one line with which these arguments are refused."""
    assert cli.main(args) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("dmattn: ")
    return lines[0]


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in ("train", "generate", "chat", "serve", "eval", "export", "plan", "tokenizer", "dam", "explain"):
        assert f"\n  {name} " in shown
    assert "dmattn train quickstart" in shown


def test_help_is_fast_and_imports_no_jax():
    code = "import sys, train.cli; train.cli.main(['--help']); sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    began = time.monotonic()
    child = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, check=False)
    assert child.returncode == 0
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "command",
    ["generate", "chat", "serve", "eval", "export", "tokenizer train", "explain", "train quickstart", "plan 80m"],
)
def test_every_command_teaches_by_example(capsys, command):
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"dmattn {command.split()[0]}" in shown
    assert "xample" in shown


def test_train_help_explains_fields_with_the_presets_values(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "quickstart", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--optimizer.learning-rate" in shown
    assert "--lr" in shown
    assert "Consecutive steps with a non-finite loss" in shown
    assert f"(default: {PRESETS['quickstart'].steps})" in shown


@pytest.mark.parametrize("command", ["train", "plan"])
def test_without_a_preset_they_are_listed(capsys, command):
    assert cli.main([command]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in PRESETS)


def test_unknown_names_suggest_the_nearest(capsys):
    assert "did you mean quickstart?" in refused(capsys, "train", "quikstart")
    assert "did you mean doge-160m?" in refused(capsys, "plan", "doge160m")
    assert "did you mean train?" in refused(capsys, "trian")


def test_a_missing_run(capsys, tmp_path):
    assert str(tmp_path / "no") in refused(capsys, "generate", str(tmp_path / "no"), "--prompt", "x")
    assert "is this a run's folder?" in refused(capsys, "eval", str(tmp_path), "--text", "x")
    assert "either --text FILES or --tasks NAMES" in refused(capsys, "eval", str(tmp_path))


def test_missing_text_and_tokenizers(capsys, trained, tmp_path):
    assert "no.txt" in refused(capsys, "eval", str(trained), "--text", str(tmp_path / "no.txt"))
    args = ("train", "quickstart", "--runs-dir", str(tmp_path), "--data.tokenizer", str(tmp_path / "no.json"))
    assert "no.json" in refused(capsys, *args)
    args = ("train", "quickstart", "--runs-dir", str(tmp_path), "--data.source", str(tmp_path / "nowhere"))
    assert "nowhere" in refused(capsys, *args)
    assert "nowhere" in refused(capsys, "tokenizer", "train", str(tmp_path / "nowhere"))


def test_a_vocabulary_too_small_for_the_tokenizer(capsys, tmp_path):
    args = ("train", "quickstart", "--runs-dir", str(tmp_path), "--model.vocab-size", "11")
    assert "--model.vocab-size 257" in refused(capsys, *args)


def test_a_folder_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    line = refused(capsys, "train", "quickstart", "--runs-dir", str(tmp_path / "file"))
    assert "--runs-dir" in line


def test_a_batch_that_no_mesh_can_split(capsys, tmp_path):
    args = ("--batch-size", "7", "--accumulate", "2", "--mesh.data", "1", "--runs-dir", str(tmp_path))
    assert "take a multiple of 2" in refused(capsys, "train", "quickstart", *args)
    assert "needs 999 devices" in refused(capsys, "train", "quickstart", "--mesh.data", "999")


def test_impossible_values(capsys, tmp_path):
    runs = ("--runs-dir", str(tmp_path))
    assert "steps must be >= 1" in refused(capsys, "train", "quickstart", "--steps", "0", *runs)
    assert "must be a positive number" in refused(capsys, "train", "quickstart", "--lr", "-1", *runs)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "quickstart", "--model.window", "0"])
    assert ended.value.code == 2
    assert "window must be >= 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value", "least"),
    [
        ("checkpoint.every", 0, 1),
        ("checkpoint.keep", 0, 1),
        ("log.every", 0, 1),
        ("log.eval-every", 0, 1),
        ("log.eval-batches", 0, 1),
        ("log.sample-tokens", 0, 1),
        ("log.sample-every", -1, 0),
        ("seed", -1, 0),
        ("data.shuffle-seed", -1, 0),
        ("accumulate", 0, 1),
    ],
)
def test_numbers_too_small_are_refused_before_there_is_a_folder(capsys, tmp_path, field, value, least):
    line = refused(capsys, "train", "quickstart", "--runs-dir", str(tmp_path / "runs"), f"--{field}", str(value))
    assert line.endswith(f"{field} must be >= {least}, got {value}")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["", ".", "a/..", "..", "../a", "a/../../b", "/tmp/a"])
def test_a_run_has_a_folder_of_its_own_below_runs_dir(capsys, tmp_path, name):
    line = refused(capsys, "train", "quickstart", "--runs-dir", str(tmp_path / "runs"), "--name", name)
    assert f"name must be that of a folder below runs-dir, got {name!r}" in line
    assert not (tmp_path / "runs").exists()


def test_folders_of_runs_may_be_nested(tmp_path):
    resolve(small_config(tmp_path, "sweeps/..a"), 1)


def test_a_checkpoint_of_another_architecture(capsys, trained, tmp_path):
    run_folder = tmp_path / "edited"
    run_folder.mkdir()
    (run_folder / "checkpoints").symlink_to(trained / "checkpoints")
    config = config_json.load(trained / "config.json")
    wider = replace(config, model=replace(config.model, intermediate_size=48))
    (run_folder / "config.json").write_text(config_json.to_json(wider))
    line = refused(capsys, "generate", str(run_folder), "--prompt", "x")
    assert "another architecture" in line
    assert "blocks.mlp" in line


def test_generate_is_seeded_and_continues_each_prompt(capsys, trained):
    args = ["generate", str(trained), "--prompt", "abc", "fed", "--tokens", "5", "--seed", "3"]
    assert cli.main(args) == 0
    first = capsys.readouterr().out
    assert first.startswith("abc")
    assert "\n" + "-" * 40 + "\nfed" in first
    assert cli.main(args) == 0
    assert capsys.readouterr().out == first
    assert "temperature" in refused(capsys, *args, "--temperature", "-1")


def test_generate_from_one_checkpoint(capsys, trained):
    assert cli.main(["generate", str(trained / "checkpoints" / "14"), "--prompt", "abc", "fed", "--tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("abc")
    assert "checkpoints/2" in refused(capsys, "generate", str(trained / "checkpoints" / "2"), "--prompt", "abc")


@pytest.mark.slow
def test_one_prompt_streams_what_several_print(capsys, trained):
    options = ["--tokens", "9", "--temperature", "0", "--stop", "zq"]
    assert cli.main(["generate", str(trained), "--prompt", "abc", *options]) == 0
    alone = capsys.readouterr().out
    assert cli.main(["generate", str(trained), "--prompt", "abc", "fed", *options]) == 0
    assert capsys.readouterr().out.startswith(alone)


def test_chat_keeps_the_conversation(capsys, trained, monkeypatch):
    from dmattn_jax import chat

    seen = []
    prompt = chat.chat_prompt
    monkeypatch.setattr(chat, "chat_prompt", lambda t, messages: seen.append(list(messages)) or prompt(t, messages))
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\n\nfed"))
    options = ["--tokens", "5", "--temperature", "0", "--system", "be brief"]
    assert cli.main(["chat", str(trained), *options]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert [(m["role"], m["content"]) for m in seen[1]] == [
        ("system", "be brief"),
        ("user", "abc"),
        ("assistant", first),
        ("user", "fed"),
    ]
    assert second is not None


def test_interrupting_generation_is_130_and_ends_the_line(capsys, trained, monkeypatch):
    def pieces(*args, **options):
        yield "half a "
        raise KeyboardInterrupt

    monkeypatch.setattr("dmattn_jax.generation.stream_text", pieces)
    assert cli.main(["generate", str(trained), "--prompt", "abc"]) == 130
    assert capsys.readouterr().out == "abchalf a \n"
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\n"))
    assert cli.main(["chat", str(trained)]) == 130
    assert capsys.readouterr().out == "half a \n"


@pytest.mark.slow
def test_a_real_interrupt_leaves_no_traceback(trained):
    child = subprocess.Popen(
        [sys.executable, "-m", "train.cli", "generate", str(trained), "--prompt", "abc", "--tokens", "100000"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout.read(5).startswith(b"abc")
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert b"Traceback" not in errors


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", [["--help"], ["train", "--help"]])
def test_a_reader_that_leaves_early_sees_no_traceback(command, unbuffered):
    """As under `| head`; what is printed may be in the buffer until the end."""
    with subprocess.Popen(
        [sys.executable, "-m", "train.cli", *command],
        env=environment() | {"PYTHONUNBUFFERED": unbuffered},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait(60) == 141


def test_the_server_listens_on_loopback_unless_told(trained, monkeypatch):
    asked = []

    def serve(engine, tokenizer, name, *, host, port):
        engine.close()
        asked.append((name, host, port))

    monkeypatch.setattr("serve.run.serve", serve)
    assert cli.main(["serve", str(trained)]) == 0
    assert cli.main(["serve", str(trained), "--host", "0.0.0.0", "--name", "it"]) == 0
    assert asked == [("trained", "127.0.0.1", 8000), ("it", "0.0.0.0", 8000)]


@pytest.mark.slow
def test_interrupting_the_server_ends_its_streams_and_leaves_no_traceback(trained):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    # A background job of a shell ignores the signal, and so would its children.
    program = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); import train.cli as c; "
    options = ["serve", str(trained), "--port", str(port), "--max-length", "1000000"]
    child = subprocess.Popen(
        [sys.executable, "-c", f"{program} sys.exit(c.main({options!r}))"], env=environment(), stderr=subprocess.PIPE
    )
    for _ in range(300):
        with contextlib.suppress(OSError), urllib.request.urlopen(address + "/health"):
            break
        time.sleep(0.2)
    body = {"model": "trained", "prompt": "abc", "max_tokens": 900_000, "stream": True, "temperature": 0}
    request = urllib.request.Request(
        address + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with child, urllib.request.urlopen(request) as stream:
        assert stream.readline().startswith(b"data: {")
        child.send_signal(signal.SIGINT)
        assert b"the server is shutting down" in stream.read()
        _, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert b"Traceback" not in errors


def test_eval_of_any_text(capsys, trained, tmp_path):
    import math

    text = tmp_path / "text.txt"
    text.write_text("abcdefgh " * 50)
    assert cli.main(["eval", str(trained), "--text", str(text), "--batch-size", "2"]) == 0
    shown = capsys.readouterr().out
    numbers = shown.splitlines()[-1]
    loss = float(numbers.split("loss ")[1].split(",")[0])
    bits = float(numbers.split("perplexity")[1].split(", ")[1].split()[0])
    assert "over 449 tokens" in numbers or "over 450 tokens" in numbers
    assert bits == pytest.approx(loss / math.log(2), rel=0.01)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_export_writes_a_folder_that_loads(capsys, trained, tmp_path, dtype):
    import jax
    import numpy as np
    from flax import nnx

    from dmattn_jax.io import load_pretrained, load_pretrained_tokenizer
    from train.run_files import load_trained

    output = tmp_path / "model"
    assert cli.main(["export", str(trained), str(output), *(["--dtype", dtype] if dtype else [])]) == 0
    assert f"{output}: step 14 of {trained}" in capsys.readouterr().out
    model = load_pretrained(output)
    assert model.config.param_dtype == (dtype or "float32")
    # tags of arrays are of no interest: the values, in one order
    before = jax.tree.leaves(nnx.state(load_trained(trained, best=False).model()))
    for one, other in zip(before, jax.tree.leaves(nnx.state(model)), strict=True):
        np.testing.assert_array_equal(one.astype(other.dtype), other)
    tokenizer = load_pretrained_tokenizer(output, vocab_size=257)
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    assert tokenizer.eos_id == 256


def test_export_refuses_in_one_line(capsys, trained, tmp_path):
    assert "no run at" in refused(capsys, "export", str(tmp_path / "no"), str(tmp_path / "out"))
    # the run itself is not written over
    before = (trained / "config.json").read_bytes()
    assert "config.json is of something else" in refused(capsys, "export", str(trained), str(trained))
    assert (trained / "config.json").read_bytes() == before
    (tmp_path / "file").write_text("")
    assert "cannot write in" in refused(capsys, "export", str(trained), str(tmp_path / "file"))


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_a_port_that_is_none(capsys, trained, port):
    assert f"port must be 0 … 65535, got {port}" in refused(capsys, "serve", str(trained), "--port", port)


def test_tokenizer_train(capsys, tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(3):
        (tmp_path / "texts" / f"{number}.txt").write_text("the cat and the hat " * 30)
    (tmp_path / "texts" / "image.bin").write_bytes(bytes(range(256)))
    output = tmp_path / "out" / "tokenizer.json"
    assert (
        cli.main(["tokenizer", "train", str(tmp_path / "texts"), "--vocab-size", "263", "--output", str(output)]) == 0
    )
    assert "263 tokens" in capsys.readouterr().out
    assert json.loads(output.read_text())["model"]["type"] == "BPE"
    assert "vocab_size must be >= 257" in refused(
        capsys, "tokenizer", "train", str(tmp_path / "texts"), "--vocab-size", "9", "--output", str(output)
    )


def test_a_tokenizer_that_cannot_be_written_is_refused_before_the_texts_are_read(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    args = ("tokenizer", "train", str(tmp_path / "nowhere"), "--output")
    line = refused(capsys, *args, str(tmp_path / "file" / "tokenizer.json"))
    assert f"cannot write in {tmp_path / 'file'}: File exists; choose another --output" in line
    assert "cannot write in /proc: " in refused(capsys, *args, "/proc/tokenizer.json")


def test_a_tokenizer_whose_writing_fails_after_all(capsys, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dmattn_jax.io.tokenizers.train_tokenizer", full)
    (tmp_path / "a.txt").write_text("abc")
    output = tmp_path / "tokenizer.json"
    line = refused(capsys, "tokenizer", "train", str(tmp_path / "a.txt"), "--output", str(output))
    assert line.endswith(f"cannot write {output}: No space left on device")


def test_texts_of_a_tokenizer_that_cannot_be_read(capsys, tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(2):
        (tmp_path / "texts" / f"{number}.txt").write_text("the cat and the hat " * 30)
    image = tmp_path / "image.png"
    image.write_bytes(bytes(range(256)))
    output = ("--vocab-size", "263", "--output", str(tmp_path / "tokenizer.json"))
    line = refused(capsys, "tokenizer", "train", str(tmp_path / "texts"), str(image), *output)
    assert f"{image} is not text" in line
    line = refused(capsys, "tokenizer", "train", "/proc/self/mem", *output)
    assert line.endswith("/proc/self/mem cannot be read: Input/output error")
    line = refused(capsys, "tokenizer", "train", "hf:owner/name", *output)
    assert "source 'hf:owner/name' is a stream, which only training reads: give files" in line
    assert not (tmp_path / "tokenizer.json").exists()


def test_text_is_held_out_as_it_was_in_training(trained, monkeypatch):
    def asked(data, *args, **options):
        raise ConfigError(f"held out {data.validation_fraction} of {data.source}")

    monkeypatch.setattr("train.data.make_evaluation", asked)
    with pytest.raises(ConfigError, match=r"held out 0\.1 of README\.md"):
        inference.evaluate(trained, text="README.md")


def test_explain_names_the_device(capsys):
    assert cli.main(["explain"]) == 0
    assert "cpu" in capsys.readouterr().out


@pytest.mark.slow
def test_plan_for_a_mesh_larger_than_this_machine(tmp_path):
    config = small_config(tmp_path, mesh=MeshConfig(data=1, fsdp=2, tensor=2), batch_size=6)
    plan = plan_memory(config)
    total = 4 * config.model.num_parameters()
    assert plan.devices == 4
    # cut in four, but for vectors, which are cut in two, and the 257 rows of the vocabulary, which two do not divide
    table = 4 * config.model.vocab_size * config.model.hidden_size
    assert plan.parameters == pytest.approx((total - table) / 4 + table / 2, rel=0.05)
    assert plan.optimizer == pytest.approx(2 * plan.parameters, abs=16)
    assert plan.batch == 3 * 4 * 3 * config.sequence_length
    assert plan.temporary > plan.parameters


def test_plan_of_one_device_is_exact(tmp_path):
    config = small_config(tmp_path)
    plan, _ = compile_step(config)
    assert plan.parameters == 4 * config.model.num_parameters()
    assert plan.batch == 3 * 4 * 4 * 29
    assert f"{config.model.num_parameters() / 1e6:,.2f} M" in describe(config, plan)


def test_plan_refuses_what_a_run_refuses(capsys):
    words = refused(capsys, "plan", "doge-20m", "--mesh.fsdp", "3", "--batch-size", "8", "--steps", "5")
    assert "batch_size 8 cannot be split" in words


@pytest.mark.parametrize("name", PRESETS)
def test_configurations_survive_json(name):
    config = replace(PRESETS[name], model=replace(PRESETS[name].model, num_kv_heads=1, window=(7,)))
    assert config_json.from_json(config_json.to_json(config)) == config


def test_configurations_of_other_versions():
    values = json.loads(config_json.to_json(TrainConfig()))
    del values["log"]["sample_tokens"]
    assert config_json.from_json(json.dumps(values)) == TrainConfig()
    values["model"]["colour"] = "red"
    with pytest.raises(ConfigError, match=r"unknown field model\.colour"):
        config_json.from_json(json.dumps(values))
    with pytest.raises(ConfigError, match="is not JSON"):
        config_json.from_json("{")


def test_differences_are_named():
    changed = replace(TrainConfig(), steps=5, model=replace(TrainConfig().model, window=3))
    assert config_json.differences(TrainConfig(), changed) == {"steps": (1000, 5), "model.window": (1024, 3)}
    assert config_json.may_change_on_resume("steps")
    assert config_json.may_change_on_resume("optimizer.learning_rate")
    assert not config_json.may_change_on_resume("model.window")
    assert not config_json.may_change_on_resume("sequence_length")


def test_the_console_script_is_there():
    script = os.path.join(os.path.dirname(sys.executable), "dmattn")
    if not os.path.exists(script):
        script = sys.executable
    child = subprocess.run(
        [script, *(["-m", "train.cli"] if script == sys.executable else []), "train", "nothing-like-this"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert child.returncode == 2
    assert child.stderr.count("\n") == 1


@pytest.mark.slow
def test_plan_by_the_tpu_compiler(capsys):
    small = ("--model.num-layers", "2", "--batch-size", "4", "--mesh.fsdp", "4")
    assert cli.main(["plan", "doge-20m", *small, "--topology", "v5e:2x2"]) == 0
    assert "compiled for TPU v5 lite" in capsys.readouterr().out
    line = refused(capsys, "plan", "doge-160m", "--batch-size", "512", "--topology", "v5e:2x2")
    assert "does not fit on v5e:2x2" in line
    assert "--model.remat" in line
    assert "not one like v5e:2x2" in refused(capsys, "plan", "doge-20m", "--topology", "v99:2x2")
    assert "not one like v5e:2x2" in refused(capsys, "plan", "doge-20m", "--topology=v99:2x2")


def test_a_topology_needs_a_name(capsys):
    assert "--topology needs a name" in refused(capsys, "plan", "doge-20m", "--topology")


def test_models_from_elsewhere_generate_too(capsys, trained, tmp_path):
    """A Hugging Face folder in the place of a run; what is no model is refused in one line."""
    folder = tmp_path / "exported"
    assert cli.main(["export", str(trained), str(folder)]) == 0
    capsys.readouterr()
    shown = []
    for model in (trained, folder):
        assert cli.main(["generate", str(model), "--prompt", "abc", "--tokens", "9", "--temperature", "0"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    (tmp_path / "text.txt").write_text("abc")
    for other in (str(folder), str(tmp_path / "model.gguf"), "hf:owner/name"):
        line = refused(capsys, "eval", other, "--text", str(tmp_path / "text.txt"))
        assert other in line
        assert "eval --text and export take a run's folder; a Hugging Face folder or a .gguf file is for" in line
    (tmp_path / "garbage.gguf").write_bytes(b"GGUF and nothing else")
    assert "garbage.gguf" in refused(capsys, "generate", str(tmp_path / "garbage.gguf"))

"""The benchmarks run at any size, and write down what they measured."""

import json
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import record as records
from benchmarks.record import rms_ratio
from dmattn_jax import dynamic_mask_attention
from train import cli


@dataclass(frozen=True)
class Size:
    n: int


@pytest.fixture(scope="module")
def generation():
    from benchmarks import generation

    return generation


@pytest.mark.parametrize(
    ("program", "written"),
    [
        (str(Path(records.__file__).with_name("decode.py")), "benchmarks/decode.py"),
        ("/elsewhere/tool", "/elsewhere/tool"),
    ],
)
def test_a_record_names_its_program_by_its_place_in_the_repository(monkeypatch, tmp_path, program, written):
    monkeypatch.setattr(sys, "argv", [program, "--batch", "1"])
    records.write(tmp_path / "made" / "record.json", Size(3), [{"n": 1}], more=2)
    found = json.loads((tmp_path / "made" / "record.json").read_text())
    assert found["command"] == [written, "--batch", "1"]
    assert (found["options"], found["rows"], found["more"]) == ({"n": 3}, [{"n": 1}], 2)


def small(generation, output: Path, **changes):
    return generation.Options(
        **{
            "lengths": (13,),
            "generated": (11,),
            "attentions": ("dma",),
            "prefill_chunk": 8,
            "decode_steps": 3,
            "repeats": 1,
            "vocab_size": 61,
            "hidden_size": 12,
            "layers": 1,
            "heads": 2,
            "kv_heads": 1,
            "head_dim": 6,
            "window": 5,
            "dtype": "float32",
            "output": output,
        }
        | changes
    )


def test_steps_of_decoding(tmp_path):
    from benchmarks import decode

    output = tmp_path / "decode.json"
    options = decode.Options((29, 58), (1, 3), 4, 2, 8, window=29, steps=3, repeats=2, output=output)
    decode.main(options)
    record = json.loads(output.read_text())
    assert [(row["what"], row["batch"], row["context"]) for row in record["rows"]] == [
        ("dma xla", 1, 29), ("dma xla", 1, 58), ("dma xla", 3, 29), ("dma xla", 3, 58),
    ]  # fmt: skip
    assert all(len(row["microseconds"]) == 2 and not row["error"] for row in record["rows"])
    assert len({row["cache_bytes"] // row["batch"] for row in record["rows"]}) == 1
    assert record["errors"]["xla"] <= decode.BAR


def test_short_programs_in_a_row_are_all_run():
    """Neither merged, though they compute the same, nor out of order."""
    from benchmarks.attention import in_a_row

    def function(left, right):
        return jnp.sort(left * right), left.sum()

    pairs = [(jnp.arange(7.0) - n, jnp.full(7, 2.0)) for n in (3, 5, 5)]
    program = jax.jit(in_a_row(function, 3)).lower(*(array for pair in pairs for array in pair)).compile()
    assert program.as_text().count(" sort(") == 3
    results = program(*(array for pair in pairs for array in pair))
    for (products, total), (left, right) in zip(results, pairs, strict=True):
        assert products.tolist() == sorted((left * right).tolist())
        assert float(total) == float(left.sum())


@pytest.mark.slow
def test_a_wrong_gradient_is_named_before_anything_is_timed(monkeypatch):
    from benchmarks import attention

    def wrong(query, key, value, gate, *, window):
        doubled = 2 * key - jax.lax.stop_gradient(key)
        return dynamic_mask_attention(query, doubled, value, gate, window=window)

    options = attention.Options(heads=2, kv_heads=1, head_dim=8, dtype="float32")
    right = partial(dynamic_mask_attention, window=100)
    peers = {"cudnn dense": None, "dma right": right, "dma wrong": partial(wrong, window=100)}
    monkeypatch.setattr(attention, "peers", lambda window: peers)
    named = r"dma wrong is wrong in a window of 100, .* dkey 1\.00e\+00, dvalue \S+e-0[6-9]"
    with pytest.raises(SystemExit, match=named):
        attention.check(options)


def test_rows_of_a_batch_are_rows_of_their_own():
    from benchmarks import attention

    options = attention.Options(batch=3, heads=4, kv_heads=2, head_dim=8)
    arrays = attention.make_inputs(options, 13, "random")
    assert [array.shape for array in arrays] == [(3, 13, 4, 8), *[(3, 13, 2, 8)] * 2, (3, 13, 2), (3, 13, 4, 8)]
    for array in arrays:
        assert len({row.tobytes() for row in array}) == 3


class Device:
    """A device whose queue is done one program after the other, and a machine that learns of an end late, if it waits
    for it."""

    def __init__(self, late: float):
        self.now, self.done, self.late = 0.0, 0.0, late

    def queue(self, seconds: float, *, to_queue: float = 0.0, waits: bool = False):
        """A program; waits: queuing it takes until the device is done with all before it."""
        self.now = (max(self.now, self.done) if waits else self.now) + to_queue
        end = self.done = max(self.now, self.done) + seconds

        class Result:
            def is_ready(_):
                return self.now >= end

            def block_until_ready(result):
                self.now = self.now if self.now >= end else end + self.late
                return result

        return Result()


@pytest.mark.parametrize("late", [0.0, 0.7])
@pytest.mark.parametrize(
    ("calls", "waits", "to_queue", "each"),
    [
        # Queued in less than the first head start; in less than a longer one; and never, so that all of it counts.
        (5, False, 0.1, 0.1),
        (5, False, 0.5, 0.1),
        (1, False, 0.1, 0.1),
        (5, True, 0.2, 0.3),
    ],
)
def test_calls_are_timed_on_the_device(monkeypatch, late, calls, waits, to_queue, each):
    """Calls of 0.1 s behind products of 1 s; the machine takes its time for each, and longer than five to learn of an
    end."""
    from benchmarks import device_clock

    device = Device(late)
    monkeypatch.setattr(device_clock.time, "perf_counter", lambda: device.now)
    ahead = device_clock.HeadStart.__new__(device_clock.HeadStart)
    ahead.product_seconds = 1.0
    ahead._busy = lambda products: device.queue(products * ahead.product_seconds)

    def call(count):
        for _ in range(count):
            result = device.queue(0.1, to_queue=to_queue, waits=waits)
        return result

    # What is timed from its first call on has one late end among all calls.
    unhidden = late / calls if waits or calls == 1 else 0.0
    assert ahead.seconds_each(call, calls) == pytest.approx(each + unhidden)


@pytest.mark.slow
def test_prompts_through_masks(tmp_path):
    from benchmarks import dam

    output = tmp_path / "prefill.json"
    options = dam.Options(
        lengths=(67, 259), dtype="float32", repeats=2, window=5, sinks=2, layers=1, hidden_size=18, output=output
    )
    rows = dam.main(options)
    record = json.loads(output.read_text())
    assert [(row["attention"], row["length"]) for row in record["rows"]] == [
        ("dam", 67), ("dense", 67), ("dam", 259), ("dense", 259),
    ]  # fmt: skip
    assert all(len(row["seconds"]) == 2 and row["temporary_bytes"] > 0 for row in record["rows"])
    # A cache of the masks holds what is within reach and the columns, whatever was read.
    assert rows[0].cache_bytes == rows[2].cache_bytes < rows[1].cache_bytes < rows[3].cache_bytes
    assert record["errors"]["dam"] <= 1e-5


@pytest.mark.slow
def test_prompts_through_wrong_masks_are_not_timed(monkeypatch):
    from benchmarks import dam

    options = dam.Options(dtype="float32", window=5, layers=1, hidden_size=18)
    apply = dam.apply_masks
    calls = []

    def wrong(model, masks):
        calls.append(model)
        return apply(model, masks) if len(calls) == 1 else model

    monkeypatch.setattr(dam, "apply_masks", wrong)
    with pytest.raises(SystemExit, match="masked logits are wrong: RMS ratio"):
        dam.check(options)


def test_nothing_hides_nan():
    assert rms_ratio([3.0, 4.0], [0.0, 5.0]) == pytest.approx(0.4**0.5)
    assert max(0.0, rms_ratio([math.nan, 1.0], [1.0, 1.0])) == math.inf


@pytest.mark.slow
def test_generation_benchmark(generation, tmp_path):
    output = tmp_path / "out" / "generation.json"
    rows = generation.main(small(generation, output))
    record = json.loads(output.read_text())
    assert [(row["what"], row["length"]) for row in record["rows"]] == [
        ("prefill", 13),
        ("decode", 13),
        ("generated", 11),
    ]
    assert all(row["tokens_per_second"] > 0 for row in record["rows"])
    assert all(row.cache_bytes > 0 for row in rows)


@pytest.mark.slow
def test_generation_benchmark_refuses_wrong_steps(generation, tmp_path, monkeypatch):
    read = generation.read_chunk

    def wrong(graph, state, rows, tokens, segment_ids):
        # Steps that forget what was read: what a kernel does that looks at the wrong memory.
        cache = jax.tree.map(jnp.zeros_like, rows.cache) if tokens.shape[1] == 1 else rows.cache
        return read(graph, state, rows._replace(cache=cache), tokens, segment_ids)

    monkeypatch.setattr(generation, "read_chunk", wrong)
    with pytest.raises(SystemExit, match="decoding with dma is wrong: RMS ratio"):
        generation.main(small(generation, tmp_path / "generation.json"))


@pytest.mark.slow
def test_generation_benchmark_compares_memory(generation, tmp_path):
    options = small(generation, tmp_path / "generation.json", lengths=(13, 29), attentions=("dma", "mha"))
    rows = generation.main(options)
    memory = {(row.attention, row.what, row.length): row.cache_bytes for row in rows}
    assert memory["dma", "prefill", 13] == memory["dma", "prefill", 29], "the window's, whatever was read"
    assert memory["mha", "prefill", 29] - memory["mha", "prefill", 13] == 16 * 2 * 6 * 4


def test_generation_is_drawn_from_what_was_measured(tmp_path):
    from benchmarks import generation_plot

    source = Path(__file__).parents[1] / "benchmarks" / "results" / "generation_cpu.json"
    content = json.loads(source.read_text())
    # A row that ran out of memory has no numbers, and is no reason to fail.
    content["rows"].append(content["rows"][0] | {"length": 1 << 20, "error": "out of memory", "seconds": []})
    (tmp_path / "rows.json").write_text(json.dumps(content))
    generation_plot.main(tmp_path / "rows.json", tmp_path / "generation.png")
    assert (tmp_path / "generation.png").stat().st_size > 10_000


def test_running_out_of_memory_is_a_result_and_other_errors_are_not(generation):
    import jax

    options = generation.Options(vocab_size=7, hidden_size=8, layers=1, heads=1, kv_heads=1, head_dim=4, window=2)
    bench = generation.Bench(options, "dma")

    def fail(text: str):
        def measure(row) -> None:
            raise jax.errors.JaxRuntimeError(text)

        return measure

    assert bench.measured("prefill", 5, fail("RESOURCE_EXHAUSTED: Out of memory")).error == "out of memory"
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        bench.measured("prefill", 5, fail("INTERNAL: broken"))


@pytest.mark.slow
def test_train_step_benchmark(monkeypatch, tmp_path):
    from dataclasses import replace

    from benchmarks import train_step as bench
    from configs import PRESETS

    tiny = replace(
        PRESETS["doge-20m"].model, vocab_size=61, hidden_size=16, intermediate_size=16, num_layers=1, window=5
    )
    monkeypatch.setitem(PRESETS, "tiny", replace(PRESETS["doge-20m"], model=tiny))
    output = tmp_path / "train_step.json"
    options = bench.Options(("tiny",), (13,), ("dma", "mha"), tokens=26, repeats=2, output=output)
    rows = bench.main(options)
    assert [(row.attention, row.sequences, len(row.seconds)) for row in rows] == [("dma", 2, 2), ("mha", 2, 2)]
    assert all(row.tokens_per_second > 0 and 0 < row.loss < 10 for row in rows)
    assert len(json.loads(output.read_text())["rows"]) == 2


def test_the_command_finds_benchmarks(capsys):
    assert cli.main(["bench"]) == 0
    assert "train_step" in capsys.readouterr().out
    assert cli.main(["bench", "atention"]) == 2
    assert "did you mean attention" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ("attention --dtype int8", "invalid choice 'int8'"),
        ("attention --gates nope", "invalid choice 'nope'"),
        ("attention --gates random trained", "gates 'trained' needs --checkpoint"),
        ("attention --gates trained --checkpoint nothere", "checkpoint must be a run's folder"),
        ("attention --lengths 64 128 --windows 8", "lengths and windows are pairs, got 2 and 1 of them"),
        ("attention --heads 6 --kv-heads 4", "heads must be a multiple of kv_heads, got 6 and 4"),
        ("attention --lengths 64 0 --windows 8 8", "lengths must be >= 1, got 0"),
        ("attention --lengths 64 --windows -8", "windows must be >= 1, got -8"),
        ("attention --batch 0", "batch must be >= 1, got 0"),
        ("attention --kv-heads 0", "kv_heads must be >= 1, got 0"),
        ("attention --head-dim 0", "head_dim must be >= 1, got 0"),
        ("attention --repeats 0", "repeats must be >= 1, got 0"),
        ("decode --window 0", "window must be >= 1, got 0"),
        ("decode --contexts 64 0", "contexts must be >= 1, got 0"),
        ("decode --batches 0", "batches must be >= 1, got 0"),
        ("decode --steps 0", "steps must be >= 1, got 0"),
        ("decode --heads 6 --kv-heads 4", "heads must be a multiple of kv_heads, got 6 and 4"),
        ("dam --masks nothere", "masks must be a folder that dmattn dam match wrote, got nothere"),
        ("dam --lengths 64 0", "lengths must be >= 1, got 0"),
        ("dam --window 0", "window must be >= 1, got 0"),
        ("dam --sinks -1", "sinks must be >= 0, got -1"),
        ("generation --lengths 64 0", "lengths must be >= 1, got 0"),
        ("generation --generated -1", "generated must be >= 1, got -1"),
        ("generation --decode-steps 0", "decode_steps must be >= 1, got 0"),
        ("generation --heads 6 --kv-heads 4", "heads must be a multiple of kv_heads, got 6 and 4"),
        ("generation --head-dim 7", "head_dim must be even, got 7"),
        ("train_step --tokens 0", "tokens must be >= 1, got 0"),
        ("train_step --repeats 0", "repeats must be >= 1, got 0"),
    ],
)
def test_impossible_options_are_refused_at_once(capsys, args, reason):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", *args.split()])
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert not shown.out
    assert reason in " ".join(shown.err.replace("│", " ").split())


def test_what_a_benchmark_cannot_find_is_one_line(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.gguf").write_bytes(b"GGUF and nothing else")
    random = ["dam", "--layers", "1", "--hidden-size", "18"]
    for args, reason in (
        (["train_step", "--presets", "doge160m"], "unknown preset 'doge160m', did you mean doge-160m?"),
        (["dam", "--model", "nothere.gguf"], "no model at nothere.gguf"),
        (["dam", "--model", str(tmp_path / "bad.gguf")], "bad.gguf"),
        ([*random, "--masks", str(tmp_path / "empty")], "empty has no masks: make them with dmattn dam match"),
        (["decode", "--output", "/proc/x/decode.json"], "cannot write in /proc/x: No such file or directory"),
    ):
        assert cli.main(["bench", *args]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert reason in line


def test_masks_of_another_shape_are_the_users(tmp_path):
    from benchmarks import dam
    from dmattn_jax.dam import save_masks, windows_and_sinks
    from train.errors import CheckpointError

    save_masks(windows_and_sinks(2, 3, 5), tmp_path, {})
    options = dam.Options(masks=tmp_path, layers=1, hidden_size=18)
    with pytest.raises(CheckpointError, match="the masks are of 2 layers of 3 heads"):
        dam.check(options)


def test_a_corpus_too_short_for_trained_gates(monkeypatch):
    from types import SimpleNamespace

    from benchmarks import gates
    from train.errors import ConfigError

    tokenizer = SimpleNamespace(encode=lambda text: [1] * len(text))
    run = SimpleNamespace(config=SimpleNamespace(data=None), tokenizer=tokenizer)
    monkeypatch.setattr(gates, "load_trained", lambda path, best: run)
    monkeypatch.setattr(gates, "training_texts", lambda data: ["abc", "de"])
    with pytest.raises(ConfigError, match="the corpus of a has 5 tokens, and 7 are wanted"):
        gates.make_gates("trained", 7, 1, Path("a"))


def test_tuning_tries_every_size_that_fits():
    from benchmarks import tune
    from pallas_kernels.gpu.config import HEAD_SIZES, block_sizes

    for head_dim in HEAD_SIZES:
        blocks = block_sizes(4096, 4096, 512, head_dim, "bfloat16")
        for name in tune.FIELDS:
            default = getattr(blocks, name)
            found = list(tune.candidates(name, default))
            assert found[0] == default
            assert len(set(found)) == len(found)
            # Small heads leave room for choices; at 256 what fits is nearly all that there is.
            assert len(found) >= (4 if head_dim == 64 else 1)
            assert {sizes.head_dim for sizes in found} == {head_dim}


def test_tuning_says_what_it_needs(capsys):
    from benchmarks import tune

    with pytest.raises(SystemExit, match="nothing to tune here: it needs an NVIDIA Hopper GPU"):
        tune.main(tune.Options())
    for wrong, reason in (
        ({"head_dim": 257}, "head_dim 257 has no tiles to tune: it takes head sizes up to 256"),
        ({"length": 200}, "length must be a multiple of 128, got 200"),
        ({"heads": 5, "kv_heads": 3}, "heads must be a multiple of kv_heads, got 5 and 3"),
    ):
        with pytest.raises(ValueError, match=reason):
            tune.Options(**wrong)
    with pytest.raises(SystemExit):
        cli.main(["bench", "tune", "--help"])
    assert "faster by more than the repeats differ" in " ".join(capsys.readouterr().out.replace("│", " ").split())

"""The benchmark of generation runs at any size, and writes down what it measured."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def generation():
    path = Path(__file__).parents[1] / "benchmarks" / "generation.py"
    spec = importlib.util.spec_from_file_location("benchmark_generation", path)
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up here
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


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
def test_generation_benchmark_compares_memory(generation, tmp_path):
    options = small(generation, tmp_path / "generation.json", lengths=(13, 29), attentions=("dma", "mha"))
    rows = generation.main(options)
    memory = {(row.attention, row.what, row.length): row.cache_bytes for row in rows}
    assert memory["dma", "prefill", 13] == memory["dma", "prefill", 29], "the window's, whatever was read"
    assert memory["mha", "prefill", 29] - memory["mha", "prefill", 13] == 16 * 2 * 6 * 4


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

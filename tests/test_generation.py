"""Generation: the same tokens as the whole forward, alone or in a batch, and clear refusals."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dmattn_jax import decoding, generation
from dmattn_jax.generation import complete, generate, generate_stream
from dmattn_jax.models import DogeConfig, DogeForCausalLM
from dmattn_jax.sampling import Sampling

V = 61
PROMPTS = [[3, 1, 4, 15, 9, 2, 6], [5], [58, 7, 13, 20, 31, 17, 23, 29, 37, 41, 43]]
LONG = [47, 53, 59, 11, 19, 0, 8, 3, 3, 5, 47, 53, 3, 1, 9, 9, 60, 0, 4]


def make(attention="dma", **changes) -> DogeForCausalLM:
    config = DogeConfig(
        vocab_size=V,
        hidden_size=22,
        intermediate_size=37,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=10,
        window=(5, 7),
        attention=attention,
        dtype="float32",
        init_std=0.5,
        tie_embeddings=False,
        **changes,
    )
    model = DogeForCausalLM(config, rngs=nnx.Rngs(1))
    if attention == "dma":
        model.blocks.attention.gate.A[...] = jnp.asarray([[0.9, -0.6], [-0.5, 1.1]])
    return model


MODEL = make()


@nnx.jit
def logits_of(model, tokens, segment_ids):
    return model(tokens, segment_ids)


@pytest.mark.parametrize(
    ("attention", "experts"),
    [("dma", 9), *(pytest.param(kind, 0, marks=pytest.mark.slow) for kind in ("swa", "mha", "nsa"))],
)
def test_greedy_is_the_argmax_of_the_whole_forward(attention, experts):
    blocks = {"compression_block": 2, "selection_block": 4, "selected_blocks": 2}
    model = make(attention, num_experts=experts, num_experts_per_token=3, **blocks)
    for prompt, new in zip(PROMPTS, generate(model, PROMPTS, max_new_tokens=13), strict=True):
        assert len(new) == 13
        row = np.zeros((1, 31), np.int32)
        row[0, : len(prompt) + 13] = prompt + new
        logits = np.asarray(logits_of(model, row, (np.arange(31) < len(prompt) + 13).astype(np.int32)[None]))[0]
        for step, token in enumerate(new):
            here = logits[len(prompt) - 1 + step]
            # The best, or within rounding of it.
            assert here[token] > here.max() - 1e-4 * np.abs(here).max()


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_first_row_is_the_same_alone_and_in_a_batch(temperature):
    options = {"max_new_tokens": 11, "temperature": temperature, "seed": 4}
    prompts = [*PROMPTS[:2], LONG]
    batch = generate(MODEL, prompts, **options)
    assert generate(MODEL, prompts[:1], **options) == batch[:1]
    if temperature == 0:
        assert [generate(MODEL, [prompt], **options)[0] for prompt in prompts] == batch


def test_seed_fixes_the_draw():
    options = {"max_new_tokens": 11, "temperature": 2.0}
    first = generate(MODEL, PROMPTS, seed=1, **options)
    assert generate(MODEL, PROMPTS, seed=1, **options) == first
    assert generate(MODEL, PROMPTS, seed=2, **options) != first
    twins = generate(MODEL, [PROMPTS[0]] * 3, seed=1, **options)
    assert len({tuple(row) for row in twins}) == 3, "rows draw independently"


def test_shorter_generation_is_a_prefix():
    long = generate(MODEL, PROMPTS, max_new_tokens=13, temperature=1.0)
    assert generate(MODEL, PROMPTS, max_new_tokens=3, temperature=1.0) == [row[:3] for row in long]


def test_stop_tokens_end_their_row_alone():
    free = generate(MODEL, PROMPTS, max_new_tokens=11, temperature=1.5)
    stop = free[0][4]
    stopped = generate(MODEL, PROMPTS, max_new_tokens=11, temperature=1.5, stop_tokens=[V - 1, stop, V - 2])
    for full, row in zip(free, stopped, strict=True):
        ends = [i for i, token in enumerate(full) if token in (V - 1, stop, V - 2)]
        assert row == full[: ends[0] if ends else None]
    assert len(stopped[0]) <= 4


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_stream_yields_what_generate_returns(temperature):
    options = {"max_new_tokens": 9, "temperature": temperature, "top_k": 20, "top_p": 0.9, "seed": 3}
    expected = generate(MODEL, PROMPTS[:1], **options)[0]
    assert list(generate_stream(MODEL, PROMPTS[0], **options)) == expected
    cut = expected.index(expected[5])
    assert list(generate_stream(MODEL, PROMPTS[0], stop_tokens=[expected[5]], **options)) == expected[:cut]


def test_layers_side_by_side_generate_the_same(monkeypatch):
    """What a GPU with room for copies does."""
    sampling = Sampling(temperature=1.1, seed=5)
    want = complete(MODEL, PROMPTS, max_new_tokens=9, sampling=sampling)
    asked = []
    monkeypatch.setattr(decoding, "_has_room_for_copies", lambda arrays: asked.append(arrays) or True)
    got = complete(MODEL, PROMPTS, max_new_tokens=9, sampling=sampling)
    assert [row.tokens for row in got] == [row.tokens for row in want]
    np.testing.assert_allclose([row.logprobs for row in got], [row.logprobs for row in want], rtol=1e-4, atol=1e-4)
    assert (
        list(generate_stream(MODEL, PROMPTS[2], max_new_tokens=9)) == generate(MODEL, PROMPTS[2:], max_new_tokens=9)[0]
    )
    assert len(asked) == 3
    # One that is unrolled already stays as it is.
    given = complete(MODEL.unrolled(), PROMPTS, max_new_tokens=9, sampling=sampling)
    assert [row.tokens for row in given] == [row.tokens for row in want]


@pytest.mark.parametrize(
    ("platform", "limit", "expected"),
    [("gpu", 1060, True), ("gpu", 1050, False), ("cpu", 2000, False), ("gpu", None, False)],
)
def test_copies_are_made_where_a_gpu_has_room(platform, limit, expected):
    stats = limit and {"bytes_limit": limit, "bytes_in_use": 500}

    class Device:
        def __init__(self):
            self.platform, self.memory_stats = platform, lambda: stats

    holders = {"own": {Device()}, "other": {Device()}}

    def array(**sizes):
        shards = [SimpleNamespace(nbytes=size, devices=lambda at=holders[at]: at) for at, size in sizes.items()]
        # A leaf of a pytree, with what is asked of an array.
        return SimpleNamespace(addressable_shards=[SimpleNamespace(data=shard) for shard in shards])

    assert decoding._has_room_for_copies([array(own=300, other=900), array(own=150)]) == expected
    # An array gives its own set of devices away, not a copy.
    assert [len(devices) for devices in holders.values()] == [1, 1]


def test_top_k_one_and_tiny_top_p_are_greedy():
    greedy = generate(MODEL, PROMPTS, max_new_tokens=7)
    assert generate(MODEL, PROMPTS, max_new_tokens=7, temperature=5.0, top_k=1) == greedy
    assert generate(MODEL, PROMPTS, max_new_tokens=7, temperature=1.0, top_p=1e-6) == greedy


def test_lengths_in_one_bucket_compile_once():
    programs = (generation._decode_until, decoding.read_chunk, decoding.empty_rows)

    def compiled() -> list[int]:
        return [program._cache_size() for program in programs]

    generate(MODEL, [[1, 2, 3], [4]], max_new_tokens=5)
    before = compiled()
    for length in range(1, 17):
        generate(MODEL, [list(range(length)), [1] * (17 - length)], max_new_tokens=length, temperature=0.1 * length)
    assert compiled() == before


def test_chunked_prompts_compile_once_whatever_their_lengths():
    generate(MODEL, [LONG], max_new_tokens=3, prefill_chunk=5)
    before = decoding.read_chunk._cache_size()
    for length in range(5, 30):
        generate(MODEL, [list(range(length))], max_new_tokens=3, prefill_chunk=5)
    assert decoding.read_chunk._cache_size() == before


@pytest.mark.parametrize(("attention", "chunks"), [("dma", (1, 7)), pytest.param("mha", (7,), marks=pytest.mark.slow)])
def test_prefill_in_chunks_is_the_whole_prefill(attention, chunks):
    model = make(attention)
    graph, state = nnx.split(model)
    prompts = [np.array(prompt, np.int32) for prompt in (LONG, PROMPTS[1], PROMPTS[2])]

    def content(rows: decoding.Rows) -> list[jax.Array]:
        cache = rows.cache
        if attention == "mha":
            return jax.tree.leaves(cache)
        cache = jax.vmap(lambda layer: layer.sorted_by_position())(cache)
        held = cache.position >= 0
        return [jnp.where(held[..., None], cache.keys, 0), jnp.where(held, cache.gate, 0), cache.position]

    whole = decoding.prefill(graph, state, prompts, max_length=32)
    for chunk in chunks:
        parts = decoding.prefill(graph, state, prompts, max_length=32, chunk=chunk)
        np.testing.assert_allclose(parts.logits, whole.logits, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(parts.seen, whole.seen)
        for a, b in zip(content(parts), content(whole), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_generation_does_not_depend_on_the_chunk():
    options = {"max_new_tokens": 9, "temperature": 1.0, "seed": 5}
    whole = generate(MODEL, [LONG], **options)
    assert generate(MODEL, [LONG], prefill_chunk=5, **options) == whole
    assert list(generate_stream(MODEL, LONG, prefill_chunk=5, **options)) == whole[0]


def test_decoding_memory_is_the_window_not_the_context():
    cache = MODEL.init_cache(1, 1 << 20)
    assert cache.keys.shape == (2, 1, 2, 7, 10)
    assert make("swa").init_cache(1, 1 << 20).keys.shape == (2, 1, 2, 7, 10)
    assert make("mha").init_cache(1, 31).keys.shape == (2, 1, 31, 2, 10)


def test_no_prompts_give_no_rows():
    assert generate(MODEL, [], max_new_tokens=3) == []


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([[1], []], {}, "prompts[1] is empty"),
        ([[1, 61]], {}, "prompts[0] must hold token ids in 0 … 60, got 61"),
        ([[-1]], {}, "prompts[0] must hold token ids in 0 … 60, got -1"),
        ([[1.5]], {}, "prompts[0] must hold integer token ids, got float64"),
        ([1, 2], {}, "prompts[0] must be a sequence of token ids, got shape ()"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be an int >= 1, got 0"),
        ([[1]], {"max_new_tokens": 2.0}, "max_new_tokens must be an int >= 1, got 2.0"),
        ([[1]], {"stop_tokens": 3}, "stop_tokens must be a sequence of ids, got 3"),
        ([[1]], {"temperature": -0.1}, "temperature must be >= 0 and finite, got -0.1"),
        ([[1]], {"temperature": float("nan")}, "temperature must be >= 0 and finite, got nan"),
        ([[1]], {"top_k": 0}, "top_k must be >= 1, got 0"),
        ([[1]], {"top_p": 0.0}, "top_p must be in (0, 1], got 0.0"),
        ([[1]], {"top_p": 1.1}, "top_p must be in (0, 1], got 1.1"),
        ([[1]], {"min_p": 1.5}, "min_p must be in [0, 1], got 1.5"),
        ([[1]], {"repetition_penalty": 0.0}, "repetition_penalty must be > 0 and finite, got 0.0"),
        ([[1]], {"seed": 1 << 70}, "seed must fit 64 bits"),
        ([[1]], {"prefill_chunk": 0}, "prefill_chunk must be >= 1, got 0"),
        ([[1]], {"stop_tokens": [99]}, "stop_tokens must hold token ids in 0 … 60, got 99"),
    ],
)
def test_generate_refuses_bad_requests(prompts, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(MODEL, prompts, **{"max_new_tokens": 3} | changes)
    if "prompts" not in message:
        with pytest.raises(ValueError, match=re.escape(message)):
            generate_stream(MODEL, prompts[0], **{"max_new_tokens": 3} | changes)

"""Dynamic Attention Masks: capture, amplify, match, extend, and a frozen model that uses them."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_run import environment

from dmattn_jax.dam import (
    AMPLIFIERS,
    DamError,
    Maps,
    Masks,
    MatchConfig,
    amplify,
    apply_masks,
    capture,
    load_maps,
    load_masks,
    match,
    save_maps,
    save_masks,
    windows_and_sinks,
)
from dmattn_jax.dam.match import pattern_scores
from dmattn_jax.generation import generate
from dmattn_jax.models import DogeConfig, DogeForCausalLM, LlamaConfig, LlamaForCausalLM
from dmattn_jax.scoring import score

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=22,
    intermediate_size=37,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    max_position_embeddings=64,
    dtype="float32",
    init_std=0.3,
)
SIDE = 11
RANDOM = np.random.default_rng(0)
DOCUMENTS = [RANDOM.integers(0, 61, size).tolist() for size in (5, 29, 13, 11)]


@pytest.fixture(scope="module")
def model():
    return LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(3))


@pytest.fixture(scope="module")
def maps(model):
    return capture(model, DOCUMENTS, length=SIDE, batch_size=4)


def random_masks(seed=0, layers=3, heads=6, share=0.3):
    random = np.random.default_rng(seed)
    inside = np.tril(random.random((layers, heads, SIDE, SIDE)) < share) | np.eye(SIDE, dtype=bool)
    vectors = [random.random((layers, heads, SIDE)) < share for _ in range(2)]
    return Masks(inside, *vectors, np.zeros((layers, heads), bool))


@pytest.mark.slow
def test_capture_is_the_attention_of_a_forward_pass(model, maps):
    """One document at a time, by hand, with float64 softmax."""
    total, count = np.zeros((3, 6, SIDE, SIDE)), np.zeros((SIDE, SIDE))
    pieces = [d[at : at + SIDE] for d in DOCUMENTS for at in range(0, len(d), SIDE)]
    pieces = [piece for piece in pieces if len(piece) >= 2]
    for piece in pieces:
        x = model.embed(jnp.asarray([piece]))
        size = len(piece)
        count[:size, :size] += 1
        for layer in range(3):
            block = model.layer(layer)
            query, key, _ = block.attention._project(block.attention_norm(x), jnp.arange(size)[None])
            key = np.repeat(np.asarray(key, np.float64)[0], 3, axis=1)
            logits = np.einsum("thd,shd->hts", np.asarray(query, np.float64)[0], key) * 10**-0.5
            weights = np.tril(np.exp(logits))
            total[layer, :, :size, :size] += weights / weights.sum(-1, keepdims=True)
            x, _ = block(x)
    np.testing.assert_array_equal(maps.count, count)
    np.testing.assert_allclose(maps.total, total, rtol=1e-4, atol=1e-5)
    assert maps.rows == len(pieces)
    assert maps.tokens == sum(map(len, pieces))
    assert maps.total.dtype == np.float32


def test_capture_does_not_depend_on_the_batch(model, maps):
    other = capture(model, DOCUMENTS, length=SIDE, batch_size=3)
    np.testing.assert_allclose(other.total, maps.total, rtol=1e-5, atol=1e-6)
    assert other.model == maps.model


def test_amplifiers():
    total = np.array([[[4.0, 0.0], [1.0, 3.0]], [[4.0, 0.0], [0.36, 3.64]]], np.float32)
    count = np.full((2, 2), 4.0, np.float32)
    mean = total.astype(np.float64) / 4
    want = {
        "box_cox": 2 * np.sqrt(np.maximum(mean, 1e-10)) - 2e-5,
        "average": mean,
        "sum": total,
        "log1p": np.log(1 + mean),
        "sqrt": np.sqrt(mean),
        "min_max": mean,
        "arcsinh": np.log(mean + np.sqrt(mean**2 + 1)),
        "z_score": (mean - mean.mean()) / mean.std(),
        "yeo_johnson": 2 * (np.sqrt(mean + 1) - 1),
    }
    assert set(want) == set(AMPLIFIERS)
    for name, expected in want.items():
        np.testing.assert_allclose(amplify(total, count, name), expected, rtol=2e-6, atol=1e-7, err_msg=name)
    assert amplify(total, count, "box_cox").min() == 0
    # places that no document reached are 0, not NaN
    assert np.isfinite(amplify(total * 0, count * 0, "z_score")).all()


def test_scores_are_those_of_patterns_built_one_by_one():
    mask = np.tril(np.random.default_rng(1).random((3, SIDE, SIDE)) < 0.5)
    row, column = np.indices((SIDE, SIDE))
    diagonal, vertical = pattern_scores(mask)
    for at in range(SIDE):
        for pattern, scores in ((row - column == at, diagonal), ((column == at) & (row >= column), vertical)):
            np.testing.assert_allclose(scores[:, at], (mask & pattern).sum((1, 2)) / pattern.sum())


def planted(threshold_value=0.25):
    """Maps whose amplified (average) values are known: a diagonal, a vertical, a corner, and an empty head."""
    total = np.zeros((1, 4, SIDE, SIDE), np.float32)
    row, column = np.indices((SIDE, SIDE))
    total[0, 0][row - column == 2] = threshold_value
    total[0, 1][(column == 3) & (row >= 3)] = 2 * threshold_value
    total[0, 2][SIDE - 1, 0] = 1
    total[0, 3][(column == 0) & (row % 2 == 0)] = 1
    return Maps(total, np.ones((SIDE, SIDE), np.float32), "", 1, SIDE)


def test_matching_finds_what_is_planted():
    masks = match(planted(), MatchConfig(0.25, 1.0, 3, "average"))
    # a value of exactly the threshold counts
    assert np.flatnonzero(masks.diagonals[0, 0]).tolist() == [2]
    assert not masks.verticals[0, 0].any()
    assert np.flatnonzero(masks.verticals[0, 1]).tolist() == [3]
    # the diagonal of one cell is too short; head 3 has but half of its vertical
    assert masks.fallback[0].tolist() == [False, False, True, True]
    assert np.flatnonzero(masks.diagonals[0, 2]).tolist() == np.flatnonzero(masks.verticals[0, 2]).tolist() == [0]
    assert masks.inside[0, 2].sum() == 1
    short = match(planted(), MatchConfig(0.25, 1.0, 1, "average"))
    assert np.flatnonzero(short.diagonals[0, 2]).tolist() == [SIDE - 1]
    half = match(planted(), MatchConfig(0.25, 0.5, 3, "average"))
    assert not half.fallback[0, 3]
    above = np.nextafter(np.float32(0.25), np.float32(1))
    assert not match(planted(), MatchConfig(float(above), 1.0, 3, "average")).inside[0, 0].any()


def test_density_counts_every_visible_pair():
    masks = random_masks()
    for length in (1, 7, SIDE, SIDE + 1, 40):
        row, column = np.indices((length, length))
        far, distance = row >= SIDE, row - column
        for layer, head in np.ndindex(3, 6):
            cell = masks.inside[layer, head][np.minimum(row, SIDE - 1), np.minimum(column, SIDE - 1)]
            on = (distance < SIDE) & masks.diagonals[layer, head][np.clip(distance, 0, SIDE - 1)]
            on |= (column < SIDE) & masks.verticals[layer, head][np.minimum(column, SIDE - 1)]
            seen = np.where(far, on, cell) & (distance >= 0)
            want = seen.sum() / (length * (length + 1) / 2)
            np.testing.assert_allclose(masks.density(length)[layer, head], want)


def test_a_full_mask_is_the_dense_model(model):
    ids = jnp.asarray(np.random.default_rng(2).integers(0, 61, (2, 37)), jnp.int32)
    everything = apply_masks(model, windows_and_sinks(3, 6, window=37))
    np.testing.assert_allclose(everything(ids), model(ids), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def masked(model):
    return apply_masks(model, random_masks())


@pytest.mark.slow
def test_a_masked_model_decodes_what_it_computes_whole(masked, model):
    ids = jnp.asarray(np.random.default_rng(2).integers(0, 61, (2, 37)), jnp.int32)
    whole = np.asarray(masked(ids))
    assert np.abs(whole - np.asarray(model(ids))).max() > 0.01
    decode = nnx.jit(lambda model, ids, cache: model.decode(ids, cache))
    for cuts in ((0, 9, 37), (0, 36, 37)):
        cache, parts = masked.init_cache(2, 37), []
        for start, end in itertools.pairwise(cuts):
            hidden, cache = decode(masked, ids[:, start:end], cache)
            parts.append(masked.logits(hidden))
        np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_masked_model_generates_and_scores(masked):
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7], [9, 2]]
    out = generate(masked, prompts, max_new_tokens=5, prefill_chunk=4)
    logits = nnx.jit(lambda model, ids: model(ids))
    for prompt, new in zip(prompts, out, strict=True):
        row = list(prompt)
        nats = 0.0
        for token in new:
            last = logits(masked, jnp.asarray([row + [0] * (32 - len(row))]))[0, len(row) - 1]
            assert token == int(jnp.argmax(last))
            nats += float(jax.nn.log_softmax(last)[token])
            row.append(token)
        (scored,) = score(masked, [prompt], [new], batch_size=1)
        assert scored.greedy
        np.testing.assert_allclose(scored.logprob, nats, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_dense_doge_takes_masks_too():
    config = DogeConfig(
        vocab_size=61,
        hidden_size=22,
        intermediate_size=37,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=10,
        attention="mha",
        dtype="float32",
    )
    model = DogeForCausalLM(config, rngs=nnx.Rngs(0))
    maps = capture(model, DOCUMENTS, length=SIDE, batch_size=4)
    masks = match(maps, MatchConfig(threshold=0.1))
    assert np.isfinite(apply_masks(model, masks)(jnp.asarray([DOCUMENTS[1]]))).all()


def test_files_come_back_bit_by_bit(maps, tmp_path):
    save_maps(maps, tmp_path)
    again = load_maps(tmp_path)
    np.testing.assert_array_equal(again.total, maps.total)
    np.testing.assert_array_equal(again.count, maps.count)
    assert (again.model, again.rows, again.tokens) == (maps.model, maps.rows, maps.tokens)
    masks = match(maps, MatchConfig(threshold=0.2))
    save_masks(masks, tmp_path, masks.summary(40))
    back = load_masks(tmp_path)
    for name in ("inside", "diagonals", "verticals", "fallback"):
        np.testing.assert_array_equal(getattr(back, name), getattr(masks, name))
    assert (back.model, back.settings) == (masks.model, masks.settings)
    assert json.loads((tmp_path / "masks.json").read_text())["summary"]["heads"] == 18


def test_damaged_and_missing_files(maps, tmp_path):
    with pytest.raises(DamError, match="has no maps: make them with dmattn dam capture"):
        load_maps(tmp_path)
    save_maps(maps, tmp_path)
    whole = (tmp_path / "maps.safetensors").read_bytes()
    (tmp_path / "maps.safetensors").write_bytes(whole[:-3])
    with pytest.raises(DamError, match=r"maps\.safetensors cannot be read"):
        load_maps(tmp_path)
    masks = random_masks()
    save_masks(masks, tmp_path, {})
    facts = json.loads((tmp_path / "masks.json").read_text())
    facts["bits"]["verticals"] = 99
    (tmp_path / "masks.json").write_text(json.dumps(facts))
    with pytest.raises(DamError, match="verticals has 2 bytes for 99 bits"):
        load_masks(tmp_path)


def test_the_same_weights_in_another_type_are_the_same_model(model, maps):
    """Maps recorded in float32 on one machine serve the model as bfloat16 on another."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16", param_dtype="bfloat16")
    low = LlamaForCausalLM(config, rngs=nnx.Rngs(4))
    _, state = nnx.split(model)
    nnx.update(low, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state))
    masked = apply_masks(low, match(maps, MatchConfig(threshold=0.2)))
    assert masked.hidden(jnp.zeros((1, 3), jnp.int32))[0].dtype == jnp.bfloat16
    graph, state = nnx.split(model)
    moved = jax.tree.map(lambda leaf: leaf * (1 + 2**-6), state)
    with pytest.raises(DamError, match="masks are of another model"):
        apply_masks(nnx.merge(graph, moved), match(maps, MatchConfig(threshold=0.2)))


def test_bad_input_is_named(model, maps):
    other = LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(4))
    masks = match(maps, MatchConfig(threshold=0.2))
    with pytest.raises(DamError, match="masks are of another model"):
        apply_masks(other, masks)
    with pytest.raises(DamError, match="of 2 layers of 6 heads, the model has 3 of 6"):
        apply_masks(model, random_masks(layers=2))
    with pytest.raises(DamError, match=r"must be dense .* got PatternAttention"):
        apply_masks(apply_masks(model, masks), masks)
    with pytest.raises(DamError, match="layers must be stacked: take the decoder from which unrolled"):
        apply_masks(model.unrolled(), masks)
    with pytest.raises(DamError, match=r"length must be in 2 … 64, the model's positions, got 65"):
        capture(model, DOCUMENTS, length=65)
    with pytest.raises(DamError, match="no calibration text"):
        capture(model, [[1]], length=4)
    with pytest.raises(DamError, match=r"threshold 9\.0 empties every head: the largest amplified value is"):
        match(maps, MatchConfig(threshold=9.0))
    # Rows of at most seven tokens leave cells of the map that nobody counted.
    counted = np.zeros_like(maps.count)
    counted[:7, :7] = 1
    with pytest.raises(DamError, match="no calibration text has the capture length of 11 tokens, the longest has 7"):
        match(dataclasses.replace(maps, count=counted))
    for changed, message in (
        ({"match": 0.0}, r"match must be in \(0, 1\], got 0.0"),
        ({"threshold": float("nan")}, "threshold must be finite, got nan"),
        ({"min_length": 0}, "min_length must be >= 1, got 0"),
        ({"amplifier": "square"}, "amplifier must be one of .*, got 'square'"),
    ):
        with pytest.raises(DamError, match=message):
            dataclasses.replace(MatchConfig(), **changed)
    with pytest.raises(ValueError, match="window must be >= 1 and sinks >= 0, got 0 and 0"):
        windows_and_sinks(1, 1, 0)


ON_MESHES = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType
from test_dam import CONFIG, random_masks
from dmattn_jax.dam import apply_masks
from dmattn_jax.models import LlamaForCausalLM

masked = apply_masks(LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(3)), random_masks())
random = np.random.default_rng(2)
ids = jnp.asarray(random.integers(0, 61, (2, 37)), jnp.int32)
segments = jnp.asarray(np.sort(random.integers(0, 3, (2, 37)), axis=-1), jnp.int32)

def run(model, ids, segments):
    cache = model.init_cache(2, 37)
    return model(ids, segments), model.logits(model.decode(ids, cache)[0])

want = nnx.jit(run)(masked, ids, segments)
for sizes in ((2, 1, 2), (1, 1, 4)):
    mesh = jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        for got, expected in zip(nnx.jit(run)(masked, ids, segments), want):
            np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4, err_msg=str(sizes))
print("equal")
"""


@pytest.mark.slow
def test_masks_on_meshes():
    """Whole rows and cached ones: heads over devices that divide them, and over more than there are kv heads."""
    done = subprocess.run(
        [sys.executable, "-c", ON_MESHES],
        env=environment(4),
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip().endswith("equal"), done.stderr[-2000:]

"""What masks are measured with: gathered text, lines chosen for each prompt, needles and lines, the sweep."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gguf_files import random_tensors, write_gguf

from dmattn_jax.dam import Masks, apply_masks, windows_and_sinks
from dmattn_jax.decoding import prefill
from dmattn_jax.generation import generate
from dmattn_jax.io.tokenizers import ByteTokenizer
from dmattn_jax.models import DogeConfig, DogeForCausalLM, LlamaConfig, LlamaForCausalLM
from dmattn_jax.nn import MultiHeadAttention
from train import cli
from train.dam import found_text
from train.dam.evaluate import compare
from train.dam.own_selection import own_rivals
from train.dam.retrieve import retrieve, table
from train.dam.rivals import Rival, rivals
from train.dam.vertical_slash import LAST, VerticalSlashAttention, choose_lines, last_attention
from train.data.corpus import package_files
from train.errors import ConfigError
from train.experiments.deadline import Deadline
from train.experiments.retrieval import Grid
from train.run_files import OpenedModel

HEADS, KV_HEADS, DIM, LENGTH = 6, 2, 10, 97
CHOOSE = jax.jit(choose_lines)
LAST_ATTENTION = jax.jit(last_attention)


@pytest.fixture(scope="module")
def dense():
    return MultiHeadAttention(22, HEADS, KV_HEADS, DIM, rngs=nnx.Rngs(0))


def inputs(length=LENGTH, seed=0):
    random = np.random.default_rng(seed)
    return [random.normal(size=(length, heads, DIM)) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def weights_of(query, key):
    """Causal attention in float64: [H, T, T]."""
    key = np.repeat(key, HEADS // KV_HEADS, axis=1)
    logits = np.einsum("thd,shd->hts", query, key) * DIM**-0.5
    weights = np.tril(np.exp(logits - logits.max()))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("count", [LENGTH, 71, 5])
def test_the_last_queries_attention_is_dense_attentions(count):
    query, key, _ = inputs()
    got = np.asarray(LAST_ATTENTION(*(jnp.asarray(a, jnp.float32) for a in (query, key)), jnp.int32(count), DIM**-0.5))
    whole = weights_of(query[:count], key[:count])
    kept = min(count, LAST)
    np.testing.assert_allclose(got[:, LAST - kept :, :count], whole[:, count - kept :], rtol=2e-4, atol=1e-6)
    assert not got[:, : LAST - kept].any()
    assert not got[:, :, count:].any()


def shown_by(diagonals, verticals, count):
    row, column = np.indices((count, count))
    return (diagonals[:, np.clip(row - column, 0, None)] | verticals[:, column]) & (row >= column)


@pytest.mark.parametrize(("count", "density"), [(LENGTH, 0.1), (LENGTH, 0.5), (71, 0.03), (LENGTH, 1.0)])
def test_chosen_lines_fill_the_budget_with_the_largest(count, density):
    query, key, _ = inputs(seed=3)
    # A head with a strong column, one with a strong diagonal: no budget here is too small for them.
    weights = np.zeros((HEADS, LAST, LENGTH), np.float32)
    kept = min(count, LAST)
    weights[:, LAST - kept :, :count] = weights_of(query[:count], key[:count])[:, count - kept :]
    weights[1, :, 7] += 1
    rows = np.arange(LAST - kept, LAST)
    weights[2, rows, np.maximum(count - LAST + rows - 5, 0)] += 1
    diagonals, verticals = map(np.asarray, CHOOSE(jnp.asarray(weights), jnp.int32(count), jnp.float32(density)))
    shown = shown_by(diagonals[:, :count], verticals[:, :count], count).sum((1, 2))
    budget = density * count * (count + 1) / 2
    assert diagonals[:, 0].all()
    assert not verticals[:, count:].any()
    assert (shown <= budget + 1e-3).all()
    assert (shown > budget - 2 * count).all()
    if density >= 0.1:
        assert verticals[1, 7] or diagonals[1].sum() == count
        assert diagonals[2, 5]


def test_vertical_slash_attends_to_its_lines_and_to_nothing_else(dense):
    """Against a dense softmax over the lines that the row alone would choose, with padding on the right."""
    layer = VerticalSlashAttention(stacked(dense), 0.2)
    row = [jnp.asarray(a, jnp.float32)[None] for a in inputs()]
    padded = [jnp.pad(a, ((0, 0), (0, 13), (0, 0), (0, 0)), constant_values=7.0) for a in row]
    got = np.asarray(layer._attend(*padded, jnp.asarray([[1] * LENGTH + [0] * 13])))
    query, key, value = inputs()
    weights = LAST_ATTENTION(row[0][0], row[1][0], jnp.int32(LENGTH), DIM**-0.5)
    lines = CHOOSE(weights, jnp.int32(LENGTH), jnp.float32(0.2))
    seen = weights_of(query, key) * shown_by(*map(np.asarray, lines), LENGTH)
    want = np.einsum("hts,shd->thd", seen / seen.sum(-1, keepdims=True), np.repeat(value, HEADS // KV_HEADS, axis=1))
    np.testing.assert_allclose(got[0, :LENGTH], want, rtol=1e-3, atol=1e-5)
    assert not got[0, LENGTH:].any()


def test_vertical_slash_names_its_columns(dense):
    """As the contract of patterns asks: a kernel may read columns from nowhere else."""
    layer = VerticalSlashAttention(stacked(dense), 0.3)
    query, key, _ = (jnp.asarray(a, jnp.float32) for a in inputs())
    found = layer._patterns(query, key, jnp.int32(LENGTH))
    union = np.asarray(found.verticals).reshape(KV_HEADS, -1, LENGTH).any(1)
    assert union.sum() > KV_HEADS
    for head, columns in enumerate(np.asarray(found.columns)):
        count = int(union[head].sum())
        np.testing.assert_array_equal(columns[:count], np.flatnonzero(union[head]))
        assert (columns[count:] == -1).all()


def stacked(dense):
    """As a layer of a stack of one sees itself: the rivals give each layer its own variables."""
    graph, state = nnx.split(dense)
    copy = nnx.merge(graph, state)
    copy.query = nnx.Param(dense.query[...][None])
    return copy


@pytest.fixture(scope="module")
def opened():
    tokenizer = ByteTokenizer()
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=22,
        intermediate_size=37,
        num_layers=2,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype="float32",
        init_std=0.3,
    )
    return OpenedModel(LlamaForCausalLM(config, rngs=nnx.Rngs(1)), tokenizer, "toy", Path("toy"))


def random_masks(side=19):
    random = np.random.default_rng(0)
    inside = np.tril(random.random((2, HEADS, side, side)) < 0.3) | np.eye(side, dtype=bool)
    vectors = [random.random((2, HEADS, side)) < 0.2 for _ in range(2)]
    return Masks(inside, *vectors, np.zeros((2, HEADS), bool))


@pytest.mark.slow
def test_rivals_read_a_prompt_as_a_whole_sequence(opened):
    """The caches' first logits are those of the whole row, for all that generate."""
    row = np.random.default_rng(2).integers(0, 256, 83).astype(np.int32)
    found = rivals(opened.model, random_masks(), 83, 2)
    for name, rival in found.items():
        if name == "exact_top":
            with pytest.raises(ValueError, match="exact top attention reads whole sequences"):
                generate(rival.model, [row], max_new_tokens=1)
            continue
        want = nnx.jit(lambda model, ids: model(ids))(rival.model, jnp.asarray(row)[None])[0, -1]
        got = prefill(*nnx.split(rival.model), [row], max_length=90).logits[0]
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_filled_up_masks_are_the_same_masks(opened):
    ids = jnp.asarray(np.random.default_rng(2).integers(0, 256, (1, 43)), jnp.int32)
    run = nnx.jit(lambda model, ids: model.hidden(ids)[0])
    plain, filled = (run(apply_masks(opened.model, random_masks(), granule), ids) for granule in (1, 32))
    np.testing.assert_allclose(filled, plain, rtol=1e-4, atol=1e-5)
    assert apply_masks(opened.model, random_masks(), 32).blocks.attention.reach == 32


@pytest.mark.slow
def test_rows_in_batches_are_rows_one_by_one(opened):
    random = np.random.default_rng(2)
    rows = [random.integers(0, 256, 37).astype(np.int32) for _ in range(3)]
    window = {"w": Rival(apply_masks(opened.model, windows_and_sinks(2, HEADS, 3)), 0.5)}
    for one, many in zip(
        compare(opened.model, rows, window), compare(opened.model, rows, window, batch_size=2), strict=True
    ):
        assert one.rows == many.rows == 3
        np.testing.assert_allclose(many.loss, one.loss, rtol=1e-5)
        np.testing.assert_allclose(many.kl, one.kl, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_needles_and_lines_are_asked_of_every_rival(opened, monkeypatch, tmp_path):
    (tmp_path / "hay.txt").write_text("The grass is green. A long day went by, and nothing happened. " * 60)
    grid = Grid(lengths=(300, 384), depths=(1.0,), batch_size=2)
    few = lambda *args: {name: rivals(*args)[name] for name in ("dam", "vertical_slash", "exact_top")}  # noqa: E731
    monkeypatch.setattr("train.dam.retrieve.rivals", few)
    found = list(retrieve(opened, random_masks(), 2, grid, str(tmp_path / "hay.txt"), tmp_path / "out", Deadline(None)))
    short = Grid(lengths=(200,))
    with pytest.raises(ConfigError, match="lengths must leave room for two lines, got 200"):
        next(retrieve(opened, random_masks(), 2, short, str(tmp_path / "hay.txt"), tmp_path / "no", Deadline(None)))
    names = ["dense", "dam", "vertical_slash"]
    assert [(row["task"], row["name"]) for row in found] == [(t, n) for t in ("needle", "longeval") for n in names]
    assert all(row["lengths"] == [300, 384] and row["accuracy"] == [0.0, 0.0] for row in found)
    answers = {
        name: [
            answer["answer"] for answer in json.loads((tmp_path / "out" / name / "needle.json").read_text())["answers"]
        ]
        for name in names
    }
    # Random weights find nothing, but not in the same words.
    assert len(set(map(str, answers.values()))) == len(names)
    assert "| needle | vertical slash | 0% | 0% |" in table(found)
    assert (tmp_path / "out" / "dam" / "longeval.png").stat().st_size > 1000


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with a dozen packages of code and prose, and copies of a licence."""
    root = tmp_path / "machine"
    random = np.random.default_rng(0)
    for number in range(12):
        folder = root / f"package{number}"
        folder.mkdir(parents=True)
        for name in ("a.py", "b.py", "README.md", "LICENSE.md"):
            (folder / name).write_text(" ".join(random.choice(list("abcde"), 1500)))
        (folder / "short.py").write_text("a b c")
    monkeypatch.setattr(found_text, "package_files", lambda: package_files({"packages": root}))
    monkeypatch.setattr(found_text.importlib.metadata, "distributions", lambda: [])
    return tmp_path


def test_gathered_text_is_the_same_every_time_and_disjoint_by_package(machine):
    first = found_text.gather(machine / "one", 1.0)
    again = found_text.gather(machine / "two", 1.0)
    assert first == again
    assert found_text.digests(machine / "one") == {name: facts["digest"] for name, facts in first.items()}
    units = {split: set() for split in found_text.SPLITS}
    for name, facts in first.items():
        split, kind = name.split("/")
        files = list((machine / "one" / name).iterdir())
        assert len(files) == facts["documents"] == len(facts["names"])
        assert sum(path.stat().st_size for path in files) == facts["bytes"]
        assert not any("LICENSE" in own or "short" in own for own in facts["names"])
        units[split] |= {"/".join(own.split("/")[:2]) for own in facts["names"] if own.startswith("packages")}
        assert kind == "prose" or all(own.endswith(".py") for own in facts["names"])
    assert not units["calibration"] & units["held-out"]
    assert len(units["calibration"] | units["held-out"]) == 12
    # so much and no more: the last document passes the bound
    small = found_text.gather(machine / "three", 0.004)
    assert all(facts["bytes"] < 8000 for name, facts in small.items() if name.endswith("code"))
    with pytest.raises(ConfigError, match="three is not empty"):
        found_text.gather(machine / "three", 1.0)
    with pytest.raises(ConfigError, match=r"megabytes must be > 0, got 0"):
        found_text.gather(machine / "four", 0)


@pytest.mark.slow
def test_the_sweep_measures_once_continues_and_draws(machine, capsys, monkeypatch):
    model = write_gguf(machine / "model.gguf", random_tensors())
    output = machine / "sweep"
    args = ["dam", "sweep", str(model), "--output", str(output), "--captures", "19", "--thresholds", "0.3", "9.0"]
    args += ["--length", "41", "--rows", "2", "--capture-rows", "5", "--batch-size", "2", "--sinks", "2"]
    assert cli.main([*args, "--mus", "0.7"]) == 0
    content = json.loads((output / "results.json").read_text())
    cells = {cell["threshold"]: cell for cell in content["cells"]}
    assert "empties every head" in cells[9.0]["error"]
    rows = cells[0.3]["results"]
    assert {row["text"] for row in rows} == {"prose", "code"}
    assert {row["name"] for row in rows} >= {"dense", "dam", "vertical_slash", "exact_top"}
    assert cells[0.3]["settings"]["text"] == found_text.digests(output / "text")
    assert (output / "quality.png").stat().st_size > 1000
    assert "| 19 | 0.3 | 0.7 | " in (output / "table.md").read_text()
    # What is done is not done again; what is new is.
    capsys.readouterr()
    before = (output / "L19_t0.3_m0.7" / "result.json").stat().st_mtime_ns
    maps = (output / "maps_19" / "maps.safetensors").stat().st_mtime_ns
    assert cli.main([*args, "--mus", "0.7", "0.9"]) == 0
    assert "4 cells, 2 of them done" in capsys.readouterr().out
    assert (output / "L19_t0.3_m0.7" / "result.json").stat().st_mtime_ns == before
    assert (output / "maps_19" / "maps.safetensors").stat().st_mtime_ns == maps
    assert len(json.loads((output / "results.json").read_text())["cells"]) == 4
    assert cli.main([*args, "--mus", "0.7", "--rows", "3"]) == 2
    assert "was measured with other rows: choose another --output" in capsys.readouterr().err
    assert cli.main([*args, "--rows", "0"]) == 2
    assert "rows must be >= 1, got 0" in capsys.readouterr().err


@pytest.mark.slow
def test_own_selection_is_measured_against_the_model_seeing_all(tmp_path):
    """Attention of each rival in float64, gates included, for a layer whose gates are untied."""
    config = DogeConfig(
        vocab_size=61,
        hidden_size=22,
        intermediate_size=37,
        num_layers=1,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        window=9,
        dtype="float32",
    )
    model = DogeForCausalLM(config, rngs=nnx.Rngs(0))
    model.blocks.attention.gate.A[...] += 0.7
    opened, found = own_rivals(model, LENGTH)
    query, key, value = inputs()
    arrays = [jnp.asarray(a, jnp.float32)[None] for a in (query, key, value)]
    gate = np.asarray(model.layer(0).attention.gate(arrays[2]), np.float64)[0]
    bias = np.repeat(gate.T, HEADS // KV_HEADS, axis=0)[:, None, :]
    keys = np.repeat(key, HEADS // KV_HEADS, axis=1)
    logits = np.einsum("thd,shd->hts", query, keys) * DIM**-0.5 + bias
    row, column = np.indices((LENGTH, LENGTH))
    causal = row >= column
    ranked = np.where(causal, np.broadcast_to(bias, logits.shape), -np.inf)
    seen = {
        "dense": causal,
        "sliding_window": causal & (row - column < 9),
        "exact_top": causal & (logits >= np.sort(np.where(causal, logits, -np.inf))[..., [-9]]),
        "own_selection": causal & (ranked >= np.sort(ranked)[..., [-9]]),
    }
    for name, each in {"dense": opened, **{name: rival.model for name, rival in found.items()}}.items():
        weights = np.where(seen[name], np.exp(logits), 0)
        weights /= weights.sum(-1, keepdims=True)
        want = np.einsum("hts,shd->thd", weights, np.repeat(value, HEADS // KV_HEADS, axis=1))
        got = each.layer(0).attention._attend(*arrays, None)[0]
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-5, err_msg=name)
    assert model.blocks.attention.windows == (9, 9)


@pytest.mark.slow
def test_eval_of_a_run_needs_no_masks(capsys, monkeypatch, tmp_path):
    """Dynamic-mask attention is measured by itself; a dense model without masks is refused."""
    model = write_gguf(tmp_path / "model.gguf", random_tensors())
    text = tmp_path / "text.txt"
    text.write_text("a b c d e " * 60)
    assert cli.main(["dam", "eval", str(model), "--text", str(text), "--lengths", "41"]) == 2
    assert "has no selection of its own: give the folder of its masks" in capsys.readouterr().err
    config = DogeConfig(vocab_size=ByteTokenizer().vocab_size, hidden_size=24, intermediate_size=40, num_layers=2,
                        num_heads=4, num_kv_heads=2, head_dim=8, window=9, dtype="float32")  # fmt: skip
    own = DogeForCausalLM(config, rngs=nnx.Rngs(0))
    own.blocks.attention.gate.A[...] += 0.7
    opened = OpenedModel(own, ByteTokenizer(), "run", tmp_path)
    monkeypatch.setattr("train.run_files.open_model", lambda path, best: opened)
    output = tmp_path / "own.json"
    args = ["dam", "eval", str(tmp_path / "run"), "--text", str(text), "--lengths", "41", "--output", str(output)]
    assert cli.main(args) == 0
    rows = {row["name"]: row for row in json.loads(output.read_text())["results"]}
    assert list(rows) == ["dense", "own_selection", "sliding_window", "exact_top"]
    assert rows["own_selection"]["density"] == rows["exact_top"]["density"] < 0.5
    assert 0 < rows["exact_top"]["kl"] < rows["own_selection"]["kl"]
    assert rows["own_selection"]["kl"] != rows["sliding_window"]["kl"]
    assert cli.main([*args, "--retrieval-lengths", "64"]) == 2
    assert "dmattn needle and dmattn longeval ask this model" in capsys.readouterr().err

"""`dmattn dam`: from a model's file to masks, pictures, text and a table, and what it refuses in one line."""

import contextlib
import io
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gguf_files import random_tensors, write_gguf

from dmattn_jax.dam import apply_masks, load_masks, windows_and_sinks
from dmattn_jax.io.pretrained import load_pretrained
from dmattn_jax.nn import MultiHeadAttention
from train import cli
from train.dam.evaluate import compare
from train.dam.plots import visible
from train.dam.rivals import QUERIES, ExactTopAttention, Rival, nearest_window
from train.dam.text import take_rows
from train.errors import ConfigError


def run(*args) -> str:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert cli.main(["dam", *map(str, args)]) == 0
    return shown.getvalue()


def refused(capsys, *args) -> str:
    assert cli.main(["dam", *map(str, args)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("dmattn: ")
    return lines[0]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, text of two kinds, and masks captured and matched by the commands."""
    home = tmp_path_factory.mktemp("dam")
    write_gguf(home / "model.gguf", random_tensors())
    random = np.random.default_rng(0)
    for name in ("seen", "held-out"):
        (home / name).mkdir()
        for number in range(3):
            (home / name / f"{number}.txt").write_text(" ".join(random.choice(list("abcde"), 90)))
    args = ("--text", home / "seen", "--length", 19, "--rows", 5, "--batch-size", 2, "--output", home / "masks")
    assert "5 rows, 95 tokens, capture length 19" in run("capture", home / "model.gguf", *args)
    shown = run("match", home / "masks", "--threshold", 0.3, "--mu", 0.7, "--length", 41)
    assert "heads matched nothing" in shown
    assert "at 41 tokens" in shown
    return home


@pytest.mark.slow
def test_eval_compares_masks_of_equal_density(home):
    output = home / "eval.json"
    args = ("--text", home / "held-out", "--lengths", 41, "--rows", 2, "--sinks", 2, "--output", output)
    shown = run("eval", home / "model.gguf", home / "masks", *args)
    found = json.loads(output.read_text())
    rows = {row["name"]: row for row in found["results"]}
    assert list(rows) == ["dense", "dam", "sliding_window", "sink_and_window", "vertical_slash", "exact_top"]
    assert rows["dense"]["kl"] == pytest.approx(0, abs=1e-5)
    assert rows["dense"]["agreement"] == 1
    for name, row in rows.items():
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert f"| held-out | 41 | {name.replace('_', ' ')} | {row['density']:.1%} |" in shown
        assert name == "dense" or (row["kl"] > 1e-4 and row["agreement"] <= 1)
    for name in ("sliding_window", "sink_and_window", "vertical_slash", "exact_top"):
        # a window is a whole number of keys
        assert abs(rows[name]["density"] - rows["dam"]["density"]) < 1.1 / 41
    assert found["summary"]["heads"] == 8


@pytest.mark.slow
def test_the_loss_of_eval_is_the_models_own(home):
    """Against log-softmax over the whole logits of the dense model."""
    model = load_pretrained(home / "model.gguf")
    row = np.random.default_rng(1).integers(0, 13, 23).astype(np.int32)
    window = apply_masks(model, windows_and_sinks(2, 4, window=3, sinks=1))
    dense, masked = compare(model, [row], {"w": Rival(window, 0.5)})
    truth, got = (
        jax.nn.log_softmax(nnx.jit(lambda model, ids: model(ids))(which, jnp.asarray(row)[None])[0, :-1])
        for which in (model, window)
    )
    at = np.arange(22), row[1:]
    np.testing.assert_allclose(dense.loss, -truth[at].mean(), rtol=1e-5)
    np.testing.assert_allclose(masked.loss, -got[at].mean(), rtol=1e-5)
    np.testing.assert_allclose(masked.kl, (np.exp(truth) * (truth - got)).sum(-1).mean(), rtol=1e-3)
    assert masked.agreement == pytest.approx((truth.argmax(-1) == got.argmax(-1)).mean())


@pytest.mark.slow
def test_apply_continues_and_scores(home):
    args = (home / "model.gguf", home / "masks", "--prompt", "a b c")
    assert run("apply", *args, "--tokens", 3).startswith("a b c")
    assert run("apply", *args, "--continuation", " d e").startswith("log-probability -")


def test_plots(home):
    run("plot", home / "masks")
    for name in ("maps", "masks", "patterns"):
        assert (home / "masks" / f"{name}.png").stat().st_size > 1000
    masks = load_masks(home / "masks")
    shown = visible(masks, 41)
    np.testing.assert_allclose(shown.sum((2, 3)) / (41 * 42 / 2), masks.density(41))


def test_rivals_have_the_nearest_density():
    for sinks in (0, 3):
        for window in (1, 9, 30):
            density = windows_and_sinks(1, 1, window, sinks).density(50).item()
            assert nearest_window(density, 50, sinks) == window


def test_exact_top_is_the_softmax_of_the_largest():
    """Row by row in float64, over a length that is no multiple of the block."""
    length, budget = QUERIES + 7, 5
    dense = MultiHeadAttention(22, 6, 2, 10, rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    query, key, value = (random.normal(size=(1, length, heads, 10)) for heads in (6, 2, 2))
    got = ExactTopAttention(dense, budget)._attend(*(jnp.asarray(a, jnp.float32) for a in (query, key, value)), None)
    for head in range(6):
        for i in (0, 3, 6, length - 1):
            logits = key[0, : i + 1, head // 3] @ query[0, i, head] * 10**-0.5
            chosen = np.argsort(logits)[-budget:]
            weights = np.exp(logits[chosen])
            want = weights @ value[0, chosen, head // 3] / weights.sum()
            np.testing.assert_allclose(got[0, i, head], want, rtol=1e-4, atol=1e-5)


def test_rows_are_spread_over_documents():
    documents = [np.arange(10), np.arange(100, 103), np.arange(200, 204)]
    rows = take_rows(documents, 3, 4)
    assert [row[0] for row in rows] == [0, 100, 200, 3]
    with pytest.raises(ConfigError, match="no document has 11 tokens, the longest has 10"):
        take_rows(documents, 11, 1)


def test_bad_input_in_one_line(capsys, home, tmp_path):
    model, masks, text = home / "model.gguf", home / "masks", home / "held-out"
    assert "did you mean capture?" in refused(capsys, "captrue")
    assert "has no maps: make them with dmattn dam capture" in refused(capsys, "match", tmp_path)
    assert "has no masks: make them with dmattn dam match" in refused(capsys, "apply", model, tmp_path)
    assert "empties every head" in refused(capsys, "match", masks, "--threshold", 9)
    assert "amplifier must be one of box_cox" in refused(capsys, "match", masks, "--amplifier", "cube")
    other = write_gguf(tmp_path / "other.gguf", random_tensors(seed=1))
    assert "the masks are of another model" in refused(capsys, "eval", other, masks, "--text", text, "--lengths", 9)
    long = write_gguf(tmp_path / "short.gguf", random_tensors(), changed={"llama.context_length": 16})
    args = ("--text", text, "--length", 17, "--output", tmp_path / "out")
    assert "length must be in 2 … 16, the model's positions, got 17" in refused(capsys, "capture", long, *args)
    assert "no document has 99 tokens" in refused(capsys, "eval", model, masks, "--text", text, "--lengths", 99)
    assert "nothing to measure: give --text" in refused(capsys, "eval", model, masks)
    assert "rows must be >= 1, got 0" in refused(capsys, "eval", model, masks, "--text", text, "--rows", 0)


@pytest.mark.parametrize("command", ["capture", "match", "apply", "plot", "text", "eval", "sweep"])
def test_help_teaches_by_example(capsys, command):
    with pytest.raises(SystemExit) as ended:
        cli.main(["dam", command, "--help"])
    assert ended.value.code == 0
    assert f"dmattn dam {command}" in capsys.readouterr().out
    assert cli.main(["dam"]) == 0
    assert f"dmattn dam {command} " in capsys.readouterr().out

"""Sampling: each option keeps the documented tokens, rows have their own; stop strings and log-probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generation import MODEL, PROMPTS, logits_of

from dmattn_jax.generation import complete, generate
from dmattn_jax.sampling import Sampling, draw, kept_tokens, row_sampling
from dmattn_jax.text_stream import TextStream

DRAW = jax.jit(draw)


class Words:
    """Every token is a word; token 7 is half of a character, as is token 8."""

    vocab_size, bos_id, eos_id, fingerprint = 61, None, None, "words"

    def decode(self, ids) -> str:
        text = "".join({7: "\xc3", 8: "\xa9"}.get(i, f"w{i} ") for i in ids)
        return text.encode("latin-1").decode(errors="replace")


def test_the_documented_sets_are_kept():
    probability = np.array([[0.4, 0.3, 0.2, 0.06, 0.04]])
    logits = jnp.log(jnp.asarray(probability, jnp.float32))

    def kept(top_k, top_p, min_p=0.0):
        return int(kept_tokens(logits, top_k, top_p, min_p).sum())

    assert [kept(k, 1.0) for k in (1, 2, 5, 99)] == [1, 2, 5, 5]
    assert [kept(99, p) for p in (1e-9, 0.39, 0.41, 0.69, 0.71, 0.95, 1.0)] == [1, 1, 2, 2, 3, 4, 5]
    # Among the top 2 the first has 0.4 / 0.7.
    assert [kept(2, p) for p in (0.56, 0.58)] == [1, 2]
    assert [kept(99, 1.0, p) for p in (0.0, 0.09, 0.11, 0.16, 0.49, 0.51, 0.76, 1.0)] == [5, 5, 4, 3, 3, 2, 1, 1]


def drawn(logits, options: list[Sampling], seen=None, step=0) -> np.ndarray:
    rows = len(options)
    seen = jnp.zeros((rows, logits.shape[-1]), bool) if seen is None else jnp.asarray(seen)
    logits = jnp.broadcast_to(logits, (rows, logits.shape[-1]))
    return np.asarray(DRAW(logits, seen, jnp.full(rows, step, jnp.int32), row_sampling(options, range(rows))))


def test_draws_follow_the_distribution():
    logits = jnp.log(jnp.asarray([0.1, 0.5, 0.15, 0.25], jnp.float32))
    tokens = drawn(logits, [Sampling(temperature=1.0, top_k=3)] * 1500)
    share = np.bincount(tokens, minlength=4) / 1500
    np.testing.assert_allclose(share, np.array([0, 0.5, 0.15, 0.25]) / 0.9, atol=0.05)
    assert share[0] == 0


def test_rows_of_one_batch_have_their_own_options():
    logits = jnp.log(jnp.asarray([0.1, 0.5, 0.15, 0.25], jnp.float32))
    options = [Sampling(), Sampling(temperature=3.0, seed=2), Sampling(temperature=9.0, top_k=1), Sampling()]
    tokens = np.array([drawn(logits, options, step=step) for step in range(40)])
    assert set(tokens[:, 0]) == set(tokens[:, 2]) == set(tokens[:, 3]) == {1}
    assert set(tokens[:, 1]) == {0, 1, 2, 3}


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = jnp.asarray([2.0, 1.5, -1.0, -1.4], jnp.float32)
    assert drawn(logits, [Sampling()] * 2, seen=[[True, False, False, False], [False] * 4]).tolist() == [0, 0]
    penalty = [Sampling(repetition_penalty=2.0)] * 3
    seen = [[True, False, False, False], [False] * 4, [True, True, False, False]]
    assert drawn(logits, penalty, seen=seen).tolist() == [1, 0, 0]
    assert drawn(-logits, [Sampling(repetition_penalty=2.0)], seen=[[False, False, False, True]]).tolist() == [2]
    completions = complete(MODEL, PROMPTS, max_new_tokens=13, sampling=Sampling(repetition_penalty=1e9), top_logprobs=3)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert len(set(completion.tokens)) == 13, "no token comes twice while others are left"
        assert not set(prompt) & set(completion.tokens)


@pytest.mark.parametrize("seed", [0, -1, 2**40, -(2**63)])
def test_any_64_bit_seed(seed):
    options = [Sampling(temperature=9.0, seed=seed), Sampling(temperature=9.0, seed=seed)]
    tokens = [drawn(jnp.zeros(61), options, step=step).tolist() for step in range(5)]
    assert tokens == [drawn(jnp.zeros(61), options, step=step).tolist() for step in range(5)]
    assert any(first != second for first, second in tokens), "rows draw independently"
    other = [Sampling(temperature=9.0, seed=seed + (1 << 32))] * 2
    assert tokens != [drawn(jnp.zeros(61), other, step=step).tolist() for step in range(5)], "all bits count"


def test_logprobs_are_those_of_the_whole_forward():
    completions = complete(
        MODEL, PROMPTS, max_new_tokens=13, sampling=Sampling(temperature=2.0, top_k=9), top_logprobs=3
    )
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        row = np.zeros((1, 31), np.int32)
        row[0, : len(prompt) + 13] = prompt + completion.tokens
        logits = logits_of(MODEL, row, (np.arange(31) < len(prompt) + 13).astype(np.int32)[None])[0]
        logprobs = np.asarray(jax.nn.log_softmax(logits, axis=-1))[len(prompt) - 1 :]
        for step, token in enumerate(completion.tokens):
            np.testing.assert_allclose(completion.logprobs[step], logprobs[step, token], atol=2e-3)
            top = completion.top_logprobs[step]
            assert len(top) == 3
            np.testing.assert_allclose(sorted(top.values()), np.sort(logprobs[step])[-3:], atol=2e-3)
        assert completion.finish_reason == "length"
        assert completion.text is None


def test_stop_strings_end_their_row_before_them():
    options = {"max_new_tokens": 16, "sampling": Sampling(temperature=1.5), "top_logprobs": 3}
    free = complete(MODEL, PROMPTS, tokenizer=Words(), **options)
    third = free[0].tokens[3]
    stop = f"w{third} "[1:]  # begins inside a token
    stopped = complete(MODEL, PROMPTS, tokenizer=Words(), stop_strings=[stop, "zz"], **options)
    for full, row in zip(free, stopped, strict=True):
        assert row.text == full.text.split(stop)[0]
        assert row.tokens == full.tokens[: len(row.tokens)]
        assert Words().decode(row.tokens) == row.text[: len(Words().decode(row.tokens))]
        assert len(row.logprobs) == len(row.tokens)
        assert row.finish_reason == ("stop" if stop in full.text else "length")
    assert len(stopped[0].tokens) <= 3


def test_stop_strings_need_a_tokenizer_and_text():
    with pytest.raises(ValueError, match="stop_strings need the tokenizer"):
        generate(MODEL, [[1]], max_new_tokens=3, stop_strings=["x"])
    with pytest.raises(ValueError, match="stop_strings must not be empty"):
        generate(MODEL, [[1]], max_new_tokens=3, stop_strings=[""], tokenizer=Words())
    with pytest.raises(ValueError, match="top_logprobs must be in 0 … 61, got 62"):
        complete(MODEL, [[1]], max_new_tokens=3, top_logprobs=62)


def test_streamed_text_is_the_decoded_text_in_whole_characters():
    random = np.random.default_rng(3)
    for _ in range(50):
        ids = random.choice([7, 8, 11, 5], size=random.integers(0, 13)).tolist()
        stream = TextStream(Words())
        pieces = [stream.push(i) for i in ids] + [stream.finish()]
        assert "".join(pieces) == Words().decode(ids)
    stream = TextStream(Words())
    assert [stream.push(7), stream.push(8), stream.push(5)] == ["", "é", "w5 "]
    for cut in range(1, 5):
        ids = [5, 7, 8, 5, 6]
        stream = TextStream(Words(), after=ids[:cut])
        pieces = [stream.push(i) for i in ids[cut:]] + [stream.finish()]
        assert "".join(pieces) == Words().decode(ids)[len(Words().decode(ids[:cut]).rstrip("\ufffd")) :]


def test_text_that_may_become_a_stop_string_is_held_back():
    stream = TextStream(Words(), ["w5 w6"])
    assert [stream.push(i) for i in (1, 5, 5, 1, 5)] == ["w1 ", "", "w5 ", "w5 w1 ", ""]
    with pytest.raises(ValueError, match="stop_strings must be a sequence of texts, got one: "):
        TextStream(Words(), "w5 w6")
    assert stream.push(60) == ""
    assert stream.stopped
    assert stream.push(1) == stream.finish() == ""
    held = TextStream(Words(), ["w5 w6"])
    assert held.push(5) + held.finish() == "w5 "
    assert not held.stopped

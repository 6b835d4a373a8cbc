"""lm_eval's three questions, answered as the whole forward answers them, on tasks made here."""

from __future__ import annotations

import importlib.util
import json
import os

import jax
import numpy as np
import pytest
from flax import nnx

from dmattn_jax.io.tokenizers import ByteTokenizer
from dmattn_jax.models import DogeConfig, DogeForCausalLM
from dmattn_jax.scoring import CHUNK, score

TOKENIZER = ByteTokenizer()
CONFIG = DogeConfig(
    vocab_size=257,
    hidden_size=22,
    intermediate_size=37,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=10,
    window=7,
    dtype="float32",
    init_std=0.3,
)
MODEL = DogeForCausalLM(CONFIG, rngs=nnx.Rngs(1))
harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")


@jax.jit
def _logprobs(tokens):
    return jax.nn.log_softmax(MODEL(tokens), axis=-1)


def by_the_whole_forward(context: list[int], continuation: list[int]) -> tuple[float, bool]:
    row = np.zeros((1, 700), np.int32)
    length = len(context) + len(continuation)
    row[0, :length] = context + continuation
    logprobs = np.asarray(_logprobs(row))[0, len(context) - 1 : length - 1]
    chosen = logprobs[np.arange(len(continuation)), continuation]
    return float(chosen.sum()), bool((logprobs.argmax(-1) == continuation).all())


def test_scores_are_those_of_the_whole_forward():
    random = np.random.default_rng(0)
    contexts = [random.integers(0, 257, size).tolist() for size in (1, 30, CHUNK + 60, 7, 5)]
    continuations = [random.integers(0, 257, size).tolist() for size in (5, 1, 90, 0, 13)]
    likeliest = by_the_whole_forward(contexts[1], [0])
    greedy = int(np.asarray(_logprobs(np.pad([contexts[1]], ((0, 0), (0, 670))).astype(np.int32)))[0, 29].argmax())
    continuations[1] = [greedy]
    scores = score(MODEL, contexts, continuations, batch_size=5)
    for context, continuation, found in zip(contexts, continuations, scores, strict=True):
        logprob, is_greedy = by_the_whole_forward(context, continuation)
        assert found.logprob == pytest.approx(logprob, rel=1e-4, abs=1e-4)
        assert found.greedy == is_greedy
    assert scores[1].greedy
    assert scores[1].logprob >= likeliest[0] - 1e-4
    with pytest.raises(ValueError, match=r"contexts\[0\] is empty"):
        score(MODEL, [[]], [[1]])
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        score(MODEL, [[1]], [[1]], batch_size=0)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with a multiple-choice, a perplexity and a generation task, and their documents."""
    home = tmp_path_factory.mktemp("tasks")
    documents = [{"question": f"{n} and {n}", "options": ["even", "odd", "neither"], "answer": n % 3} for n in range(3)]
    (home / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    common = (
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {home / 'documents.jsonl'}}}, cache_dir: {home / 'cache'}}}\n"
        "test_split: test\n"
    )
    (home / "choice.yaml").write_text(
        "task: house_choice\noutput_type: multiple_choice\n"
        "doc_to_text: '{{question}} is'\ndoc_to_choice: options\ndoc_to_target: answer\n"
        "metric_list: [{metric: acc}]\n" + common
    )
    (home / "rolling.yaml").write_text(
        "task: house_rolling\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{question}}'\n"
        "metric_list: [{metric: bits_per_byte}]\n" + common
    )
    (home / "until.yaml").write_text(
        "task: house_until\noutput_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{options[0]}}'\n"
        "generation_kwargs: {until: ['zz'], max_gen_toks: 9, do_sample: false}\n"
        "metric_list: [{metric: exact_match}]\n" + common
    )
    return home


@pytest.fixture
def offline(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        monkeypatch.setitem(os.environ, name, "1")


@pytest.mark.slow
@harness
def test_local_tasks(tasks, offline):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from train.harness import HarnessModel

    results = simple_evaluate(
        HarnessModel(model=MODEL, tokenizer=TOKENIZER, batch_size=3),
        tasks=["house_choice", "house_rolling", "house_until"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        log_samples=False,
    )
    documents = [json.loads(line) for line in (tasks / "documents.jsonl").read_text().splitlines()]
    right, bits, size = 0, 0.0, 0
    for document in documents:
        context = TOKENIZER.encode(document["question"] + " is")
        options = [by_the_whole_forward(context, TOKENIZER.encode(" " + o))[0] for o in document["options"]]
        right += int(np.argmax(options)) == document["answer"]
        text = TOKENIZER.encode(document["question"])
        bits -= by_the_whole_forward([256], text)[0] / np.log(2)
        size += len(text)
    assert results["results"]["house_choice"]["acc,none"] == pytest.approx(right / 3)
    assert results["results"]["house_rolling"]["bits_per_byte,none"] == pytest.approx(bits / size, rel=1e-4)
    assert results["results"]["house_until"]["exact_match,none"] == 0.0


@harness
@pytest.mark.slow
def test_generation_options():
    from lm_eval.api.instance import Instance

    from dmattn_jax.generation import complete
    from train.harness import HarnessModel

    model = HarnessModel(model=MODEL, tokenizer=TOKENIZER, batch_size="3")

    def ask(prompt: str, **options) -> Instance:
        return Instance("generate_until", {}, (prompt, options), 0)

    prompts = [TOKENIZER.encode("longest"), [256], TOKENIZER.encode("other")]
    free = complete(MODEL, prompts, max_new_tokens=9, tokenizer=TOKENIZER, stop_tokens=[256])
    stop = free[0].text[3]
    texts = model.generate_until([ask(text, max_gen_toks=9, until=stop) for text in ("longest", "", "other")])
    assert texts == [completion.text.split(stop)[0] for completion in free]
    with pytest.raises(ValueError, match=r"generation options \['num_beams'\] are not implemented"):
        model.generate_until([ask("x", num_beams=4)])
    with pytest.raises(ValueError, match="batch_size must be a number, got 'auto'"):
        HarnessModel(model=MODEL, tokenizer=TOKENIZER, batch_size="auto")
    with pytest.raises(ValueError, match="needs run=, or model= and tokenizer="):
        HarnessModel()

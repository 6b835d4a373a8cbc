"""Needles and lines: where they are hidden, what counts as found, and maps of models rigged to find or to miss."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from dmattn_jax.io.tokenizers import ByteTokenizer
from dmattn_jax.models import DogeConfig, DogeForCausalLM
from train import cli
from train.errors import ConfigError
from train.experiments.deadline import Deadline
from train.experiments.retrieval import Grid, measure
from train.experiments.retrieval_tasks import (
    Question,
    haystack_tokens,
    lines_is_right,
    lines_question,
    needle_is_right,
    needle_question,
)
from train.run_files import OpenedModel

TOKENIZER = ByteTokenizer()
HAY = TOKENIZER.encode("The grass is green. A long day went by, and nothing happened at all. " * 60)


def finder(seen: int | None = None):
    """Answers what the last `seen` bytes of the prompt say, and goes on; or nothing useful."""

    def answer(prompts):
        out = []
        for prompt in prompts:
            text = TOKENIZER.decode(prompt if seen is None else prompt[-seen:])
            question = text.rsplit("\n", 1)[1]
            found = re.search(re.escape(question) + r"\s*(\d+)", text.rsplit("\n", 1)[0])
            out.append(f" {found.group(1)}>\nline 7" if found else " no idea 12 34")
        return out

    return answer


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("length", [257, 1031])
def test_a_needle_lies_once_at_its_depth_and_is_asked_for_at_the_end(length, depth):
    question = needle_question(TOKENIZER, HAY, length, depth, trial=2)
    assert len(question.prompt) == length
    text = TOKENIZER.decode(question.prompt)
    statements = re.findall(r"The special magic (\w+) number is:( \d+\.)?", text)
    assert statements == [(statements[0][0], f" {question.expected}."), (statements[0][0], "")]
    assert re.fullmatch(r"\d{7}", question.expected)
    assert text.endswith(f"\nThe special magic {statements[0][0]} number is:")
    at = text.index("The special magic")
    # Up to 64 tokens earlier, at the end of a sentence.
    assert -64 - 90 <= at - depth * length <= 2
    assert at < 3 or text[: at - 1].rstrip(" ").endswith((".", "\n")) or depth == 0
    assert needle_question(TOKENIZER, HAY, length, depth, trial=2) == question
    assert needle_question(TOKENIZER, HAY, length, depth, trial=3).prompt != question.prompt


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_lines_have_unique_names_and_one_is_asked_for(depth):
    question = lines_question(TOKENIZER, 1500, depth, trial=0)
    text = TOKENIZER.decode(question.prompt)
    lines = re.findall(r"^line (\w+-\w+): REGISTER_CONTENT is <(\d+)>$", text, re.M)
    assert len({name for name, _ in lines}) == len(lines) > 20
    assert all(1 <= int(content) <= 50_000 for _, content in lines)
    asked = re.search(r"line (\w+-\w+): REGISTER_CONTENT is <$", text)
    assert lines[round(depth * (len(lines) - 1))] == (asked.group(1), question.expected)
    # One more line would not fit.
    assert 1500 - 60 < len(question.prompt) <= 1500


def test_what_counts_as_right():
    needle = Question([], "1234567", 10, 0.5, 0)
    assert needle_is_right(needle, " 1234567. And so on 99")
    assert not needle_is_right(needle, " 123456, 7")
    line = Question([], "321", 10, 0.5, 0)
    assert lines_is_right(line, "321>\nline old-yarn: REGISTER_CONTENT is <5>")
    assert lines_is_right(line, "12 321")
    assert lines_is_right(line, "0321")
    assert not lines_is_right(line, "3210>")
    assert not lines_is_right(line, "5>\nline old-yarn: REGISTER_CONTENT is <321>")
    assert not lines_is_right(line, "no number")


def ask_needle(length, depth, trial):
    return needle_question(TOKENIZER, HAY, length, depth, trial)


def test_maps_of_models_rigged_to_find_to_miss_and_to_look_back_a_little(tmp_path):
    grid = Grid(lengths=(2048, 512), depths=(1.0, 0.0, 0.5), trials=2, batch_size=4)
    found = {}
    for name, answer in {"all": finder(), "none": lambda p: ["7654321" for _ in p], "near": finder(400)}.items():
        result = measure("needle", name, ask_needle, answer, needle_is_right, grid, tmp_path / name, Deadline(None))
        saved = json.loads((tmp_path / name / "needle.json").read_text())
        assert saved == result
        assert (saved["lengths"], saved["depths"], saved["form"]) == ([512, 2048], [0.0, 0.5, 1.0], "completion")
        assert len(saved["answers"]) == 12
        assert (tmp_path / name / "needle.png").stat().st_size > 5_000
        found[name] = np.array(saved["accuracy"])
    np.testing.assert_array_equal(found["all"], 1)
    np.testing.assert_array_equal(found["none"], 0)
    np.testing.assert_array_equal(found["near"], [[0, 1, 1], [0, 0, 1]])


def test_a_deadline_leaves_whole_lengths_out(tmp_path):
    class OneLength(Deadline):
        def __init__(self):
            self.asked = 0

        @property
        def passed(self):
            self.asked += 1
            return self.asked > 1

    grid = Grid(lengths=(512, 1024), depths=(0.0, 1.0))
    result = measure("needle", "x", ask_needle, finder(), needle_is_right, grid, tmp_path, OneLength())
    assert result["lengths"] == [512]


def test_a_haystack_is_as_long_as_it_must_be():
    assert TOKENIZER.decode(haystack_tokens(TOKENIZER, iter(["abc", "defgh", "never"]), 9)) == "abc\n\ndefg"
    with pytest.raises(ConfigError, match="haystack has 5 tokens, less than the 6"):
        haystack_tokens(TOKENIZER, iter(["abc"]), 6)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: needle_question(TOKENIZER, HAY, 70, 0.5, 0), "got 70: use at least"),
        (lambda: needle_question(TOKENIZER, HAY, 10**6, 0.5, 0), "give more text"),
        (lambda: lines_question(TOKENIZER, 150, 0.5, 0), "room for two lines, got 150"),
        (lambda: lines_question(TOKENIZER, 10**6, 0.5, 0), "use a shorter one"),
        (lambda: Grid(depths=(0.5, 1.5)).check(), "depths must be between 0 and 1"),
        (lambda: Grid(lengths=()).check(), "lengths must be numbers >= 1"),
        (lambda: Grid(batch_size=0).check(), "batch-size must be >= 1, got 0"),
    ],
)
def test_impossible_questions_are_refused(ask, message):
    with pytest.raises(ConfigError, match=message):
        ask()


@pytest.fixture
def opened(monkeypatch):
    config = DogeConfig(
        vocab_size=257, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, head_dim=8, window=5
    )
    model = OpenedModel(DogeForCausalLM(config, rngs=nnx.Rngs(0)), TOKENIZER, "tiny", Path("tiny"))
    monkeypatch.setattr("train.run_files.open_model", lambda path, best: model)


@pytest.mark.parametrize("task", ["needle", "longeval"])
def test_commands_write_a_map(task, opened, monkeypatch, tmp_path, capsys):
    def generate(model, prompts, *, max_new_tokens, stop_tokens, prefill_chunk):
        assert (max_new_tokens, stop_tokens) == (32, (TOKENIZER.eos_id,))
        return [TOKENIZER.encode(answer) for answer in finder()(prompts)]

    monkeypatch.setattr("dmattn_jax.generation.generate", generate)
    args = [task, "anything", "--lengths", "300", "600", "--depths", "0", "1", "--output", str(tmp_path)]
    assert cli.main(args) == 0
    assert "600 tokens: 100.0% right" in capsys.readouterr().out
    assert json.loads((tmp_path / f"{task}.json").read_text())["accuracy"] == [[1, 1], [1, 1]]
    assert cli.main([*args[:3], "60"]) == 2
    assert "must leave room" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["needle", "longeval"])
def test_a_map_that_cannot_be_written_is_refused_before_the_model_is_read(task, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("train.run_files.open_model", lambda path, best: pytest.fail("the model was read"))
    (tmp_path / "file").write_text("")
    for output, reason in (("/proc/x", "No such file or directory"), (str(tmp_path / "file"), "File exists")):
        assert cli.main([task, "anything", "--output", output]) == 2
        assert capsys.readouterr().err == f"dmattn: cannot write in {output}: {reason}; choose another --output\n"


@pytest.mark.slow
def test_an_untrained_model_finds_nothing(opened, tmp_path):
    args = ["needle", "anything", "--lengths", "300", "--depths", "0", "1", "--output", str(tmp_path)]
    assert cli.main(args) == 0
    saved = json.loads((tmp_path / "needle.json").read_text())
    assert saved["accuracy"] == [[0, 0]]
    assert all(answer["prompt_tokens"] == 300 for answer in saved["answers"])

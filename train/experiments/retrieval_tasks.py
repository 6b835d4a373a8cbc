"""Prompts that hide something in a long text and end where a model must continue with it."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from collections.abc import Iterable, Sequence

from dmattn_jax.io.tokenizers import Tokenizer
from train.errors import ConfigError

CITIES = (
    "Accra", "Bergen", "Cusco", "Dakar", "Erfurt", "Fukuoka", "Galway", "Hanoi", "Izmir", "Jaipur", "Kigali", "Leeds",
    "Mendoza", "Nantes", "Oulu", "Porto", "Quito", "Riga", "Sofia", "Tampa", "Utrecht", "Varna", "Windhoek", "Zagreb",
)  # fmt: skip
FIRST_WORDS = (
    "amber", "brisk", "calm", "dusty", "eager", "faint", "gentle", "hollow", "icy", "jolly", "keen", "lively",
    "mellow", "narrow", "odd", "pale", "quiet", "rapid", "steep", "tidy", "upper", "vivid", "warm", "young",
    "bitter", "clever", "dark", "early", "fierce", "grand", "humble", "idle", "loud", "minor", "noble", "plain",
    "rough", "silent", "thin", "wild",
)  # fmt: skip
SECOND_WORDS = (
    "anchor", "bridge", "candle", "desert", "engine", "forest", "garden", "harbor", "island", "jacket", "kettle",
    "ladder", "meadow", "needle", "orchard", "pebble", "quarry", "ribbon", "saddle", "temple", "umbrella", "valley",
    "window", "yard", "basket", "canyon", "drum", "feather", "glacier", "hammer", "lantern", "marble", "oven",
    "paddle", "river", "shovel", "thunder", "village", "whistle", "yarn",
)  # fmt: skip
HIGHEST_REGISTER = 50_000
HEADER = "Below is a record of lines to memorise. Each line has a name and the content of a register.\n\n"
SENTENCE_END = re.compile(r"[.\n]\s*$")


@dataclasses.dataclass(frozen=True)
class Question:
    """prompt: token ids, as many as were asked for, or a few less. expected: what the continuation must say."""

    prompt: list[int]
    expected: str
    length: int
    depth: float
    trial: int


def needle_question(
    tokenizer: Tokenizer, haystack: Sequence[int], length: int, depth: float, trial: int, seed: int = 0
) -> Question:
    """A city's seven-digit number inside `length` tokens of text, at `depth` of 0 (the start) … 1 (the end).

    In completion form: the prompt ends with the sentence that holds the number, up to the number. The needle is put
    after the last sentence that ends before its place, when there is one near.
    Raises: ConfigError when length leaves no room for the needle, or the haystack is shorter than length.
    """
    draw = random.Random(f"needle {seed} {length} {depth} {trial}")
    city, number = draw.choice(CITIES), str(draw.randrange(10**6, 10**7))
    statement = f"The special magic {city} number is:"
    needle = tokenizer.encode(f"\n{statement} {number}.\n")
    question, start = tokenizer.encode(f"\n{statement}"), _start(tokenizer)
    room = length - len(start) - len(needle) - len(question)
    if room < 1:
        raise ConfigError(
            f"lengths must leave room for needle and question, got {length}: use at least {length - room + 1}"
        )
    if len(haystack) < room:
        raise ConfigError(
            f"haystack has {len(haystack)} tokens, less than the {room} of a prompt of {length}: give more text"
        )
    offset = draw.randrange(len(haystack) - room + 1)
    text = list(haystack[offset : offset + room])
    place = _sentence_end(tokenizer, text, round(depth * room))
    return Question([*start, *text[:place], *needle, *text[place:], *question], number, length, depth, trial)


def lines_question(tokenizer: Tokenizer, length: int, depth: float, trial: int, seed: int = 0) -> Question:
    """As many lines `line {word-word}: REGISTER_CONTENT is <r>` as fit in `length` tokens, r in 1 … 50,000, no name
    twice; then the start of the line at `depth` again, for the model to complete.

    Raises: ConfigError when not even two lines fit, or there are not enough names.
    """
    draw = random.Random(f"lines {seed} {length} {depth} {trial}")
    names = [f"{first}-{second}" for first, second in itertools.product(FIRST_WORDS, SECOND_WORDS)]
    draw.shuffle(names)
    prompt = _start(tokenizer) + tokenizer.encode(HEADER)
    # The longest question there can be, so that any line may be asked for.
    longest = max(len(tokenizer.encode(_line(name, None))) for name in names)
    registers: list[tuple[str, int]] = []
    for name in names:
        content = draw.randint(1, HIGHEST_REGISTER)
        line = tokenizer.encode(_line(name, content))
        if len(prompt) + len(line) + longest > length:
            break
        prompt += line
        registers.append((name, content))
    else:
        raise ConfigError(f"lengths must be within {len(names)} lines, got {length}: use a shorter one")
    if len(registers) < 2:
        raise ConfigError(f"lengths must leave room for two lines, got {length}: use a longer one")
    name, content = registers[round(depth * (len(registers) - 1))]
    return Question(prompt + tokenizer.encode(_line(name, None)), str(content), length, depth, trial)


def needle_is_right(question: Question, answer: str) -> bool:
    """Whether the digits appear in the answer."""
    return question.expected in answer


def lines_is_right(question: Question, answer: str) -> bool:
    """Whether the last integer of the answer's own line is the register's content. A model that completes goes on
    with more lines, which are not its answer."""
    numbers = re.findall(r"\d+", answer.split(">")[0].split("\n")[0])
    return bool(numbers) and int(numbers[-1]) == int(question.expected)


def haystack_tokens(tokenizer: Tokenizer, texts: Iterable[str], count: int) -> list[int]:
    """The first `count` tokens of the texts, one after the other. Raises: ConfigError when there are less."""
    tokens: list[int] = []
    for text in texts:
        # Of one long text no more than is needed: a token has at least a byte, and seldom more than 16.
        tokens += tokenizer.encode(text[: 16 * count] + "\n\n")
        if len(tokens) >= count:
            return tokens[:count]
    raise ConfigError(f"haystack has {len(tokens)} tokens, less than the {count} that are needed: give more text")


def _line(name: str, content: int | None) -> str:
    start = f"line {name}: REGISTER_CONTENT is <"
    return start if content is None else f"{start}{content}>\n"


def _start(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def _sentence_end(tokenizer: Tokenizer, text: Sequence[int], place: int) -> int:
    """The last place up to `place`, at most 64 tokens before, after which a sentence or a line has ended."""
    for candidate in range(place, max(place - 64, 0), -1):
        if SENTENCE_END.search(tokenizer.decode(text[candidate - 1 : candidate])):
            return candidate
    return place

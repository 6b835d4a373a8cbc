"""Multi-query associative recall as typed data: one cell of the experiment, and a sweep of cells."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from dmattn_jax.models.config import AttentionKind
from dmattn_jax.nn.gate import GateActivation
from train.errors import ConfigError
from train.experiments.ablation_config import MEANINGS, gate_changes
from train.experiments.variants import VARIANTS
from train.resolve import check_seed

TOKENS_PER_STEP = 65_536

Change = Literal[
    "none",
    "earlier_ties",
    "linear_gate",
    "hidden_gate",
    "detached_gate",
    "still_gate",
    "late_gate",
    "second_gate",
    "told_gate",
    "slow_gate",
    "fast_gate",
    "margin",
    "half_recent",
    "all_keys",
]
CHANGES: tuple[Change, ...] = get_args(Change)
GATE_RATES: dict[Change, float] = {
    "still_gate": 0.0,
    "late_gate": 1.0,
    "second_gate": 0.0,
    "told_gate": 0.0,
    "slow_gate": 0.1,
    "fast_gate": 10.0,
}
"""Of what a gate's two parameters learn, to that of all others."""
FIRST_LAYER_ALONE: tuple[Change, ...] = ("second_gate",)
"""Where that is said of the first layer's gate, and the others' learn as published."""
GATE_BEGINS: dict[Change, float] = {"late_gate": 1 / 3}
"""Of all steps, those before which it learns nothing."""
MEANING_OF_CHANGES: dict[Change, str] = {
    **{name: MEANINGS[name] for name in CHANGES if name in MEANINGS},
    **{name: f"the gate's two parameters learn at {rate:g} times the rate" for name, rate in GATE_RATES.items()},
    "still_gate": "the gate stays as it begins, all keys equal: a sliding window, as a control",
    "late_gate": "a sliding window for a third of the steps, in which the gate does not learn; then as published",
    "second_gate": "the first layer's gate stays as it begins, a sliding window; the second layer's learns",
    "told_gate": "no gate learns: the first layer is a sliding window, the second is told to keep the pairs' values",
}


@dataclass(frozen=True)
class MQARConfig:
    """One model and one task (2508.02124v6; the task as zoology defines it, arXiv 2312.04927).

    Fields that are None take the paper's choice for the length and width: see `resolve`.
    """

    attention: AttentionKind = "dma"
    """`mha`, `swa`, `mla`, `nsa` or `dma`, all with one head of the model's width and no rotary positions."""
    length: int = 2048
    """Tokens of an example."""
    dim: int = 128
    """Width of the model, and of its one head."""
    pairs: int | None = None
    """Key-value pairs; None: 512, and length / 4 where that many do not fit."""
    vocab_size: int | None = None
    """None: length + 1. Keys are from its lower half, values from its upper half."""
    window: int | None = None
    """Keys a query sees (`dma`, `swa`), recent keys of `nsa`; None: 512, and length / 2 where that is less."""
    change: Change = "none"
    """One thing that is not as published in `dma`: those of `dmattn ablation`, and a gate that learns at a tenth of the
    rate, at ten times of it, not before a third of the steps (`late_gate`), not in the first layer (`second_gate`), or
    not at all (`still_gate`: a sliding window, as a control; `told_gate`: but the second layer keeps all pairs' values,
    what a perfect gate would do). `margin` sets gate-step, `linear_gate` gate-activation, `all_keys` the window."""
    gate_activation: GateActivation = "exp"
    """`linear` leaves out the exponential of δ (`dma`)."""
    gate_step: float = 0.0
    """Margin in δ by which an older key must beat a later one (`dma`); 0 is the paper."""
    num_layers: int = 2
    power: float = 0.01
    """Of the distribution of gaps, P(g) ∝ (g + 1)^(power − 1)."""
    seed: int = 0
    """Of the initial parameters and of the training examples; the test examples are always the same."""
    train_examples: int = 250_000
    test_examples: int = 1_000
    epochs: float = 100
    """Passes over the training examples, at most."""
    steps: int | None = None
    """Steps at most, in whole calls of scan_steps, after which the cosine has ended; None: as many as the epochs have.
    A sweep that must end in time gives all lengths equal steps, of equal tokens."""
    target: float = 0.99
    """Test accuracy at which training stops."""
    minutes: float | None = None
    """Training minutes after which the cell is finished, whatever its accuracy."""
    batch_size: int | None = None
    """Examples a step; None: 65,536 tokens (64 at 1,024 … 8 at 8,192)."""
    learning_rate: float | None = None
    """Peak of a cosine; None: (9 − log2 dim)·1e-4 (4e-4 at 32 … 1e-4 at 256)."""
    weight_decay: float = 0.1
    init_std: float | None = None
    """Of all matrices and tables; None: 1/√dim. At zoology's 0.02 even easy cells stay on a plateau for long."""
    eval_every: int = 500
    """Steps between tests, each with a row of metrics.csv."""
    scan_steps: int = 50
    """Steps in one call of the device; must divide eval_every."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the computation; parameters, residual stream and loss are float32."""

    @property
    def name(self) -> str:
        """What tells the cell from others of a sweep."""
        changed = "" if self.change == "none" else f"_{self.change}"
        return f"{self.attention}{changed}_L{self.length}_n{self.pairs}_d{self.dim}_s{self.seed}"


@dataclass(frozen=True)
class MQARSweep:
    """Cells: lengths × dims × variants × seeds over one configuration, and those of `dma` once for each change."""

    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    pairs: tuple[int, ...] = ()
    """Key-value pairs of each length; empty: the paper's."""
    dims: tuple[int, ...] = (32, 64, 128, 256)
    variants: tuple[AttentionKind, ...] = VARIANTS
    changes: tuple[Change, ...] = ("none",)
    """What is not as published in `dma`; `none` is the paper's."""
    seeds: tuple[int, ...] = (0,)
    cell: MQARConfig = field(default_factory=MQARConfig)
    """What all cells share."""

    def cells(self) -> list[MQARConfig]:
        """All cells, resolved; those of one length and width together, so that a stopped sweep compares variants.

        Raises: ConfigError on a cell that cannot work.
        """
        if self.pairs and len(self.pairs) != len(self.lengths):
            raise ConfigError(f"pairs must have one number a length ({len(self.lengths)}) or none, got {self.pairs}")
        pairs: tuple[int | None, ...] = self.pairs or (None,) * len(self.lengths)
        return [
            resolve(
                dataclasses.replace(
                    self.cell, attention=variant, change=change, length=length, pairs=count, dim=dim, seed=seed
                )
            )
            for length, count in zip(self.lengths, pairs, strict=True)
            for dim in self.dims
            for seed in self.seeds
            for variant in self.variants
            for change in (self.changes if variant == "dma" else ("none",))
        ]


def resolve(config: MQARConfig) -> MQARConfig:
    """The same with a number for every None but `minutes` and `steps`.

    512 pairs at a length of 1,024 are impossible, since pairs and queries need 4·pairs <= length: 256 there.
    Raises: ConfigError naming what cannot work.
    """
    for name in ("length", "dim", "num_layers", "train_examples", "test_examples", "eval_every", "scan_steps"):
        _at_least_one(config, name)
    check_seed("seed", config.seed)
    if config.change != "none" and config.attention != "dma":
        raise ConfigError(f"change is of dma, got {config.change} of {config.attention}")
    filled: dict[str, Any] = {
        "pairs": min(512, config.length // 4),
        "vocab_size": config.length + 1,
        "window": min(512, max(config.length // 2, 1)),
        "batch_size": max(TOKENS_PER_STEP // config.length, 1),
        "init_std": config.dim**-0.5,
        "learning_rate": max(9 - math.log2(config.dim), 1) * 1e-4,
    }
    config = dataclasses.replace(
        config, **{name: value for name, value in filled.items() if getattr(config, name) is None}
    )
    config = dataclasses.replace(config, **gate_changes(config.change, config.length))
    for name in ("pairs", "vocab_size", "window", "batch_size"):
        _at_least_one(config, name)
    assert config.pairs is not None
    assert config.vocab_size is not None
    assert config.batch_size is not None
    if config.length % 2 or 4 * config.pairs > config.length:
        raise ConfigError(
            f"length must be even and at least 4 * pairs, got length {config.length} with {config.pairs} pairs: "
            f"use at most {config.length // 4} pairs"
        )
    if config.vocab_size // 2 - 1 < config.pairs:
        raise ConfigError(
            f"vocab-size must leave {config.pairs} distinct keys below its half, got {config.vocab_size}: "
            f"use at least {2 * config.pairs + 2}"
        )
    if config.dim % 4:
        raise ConfigError(f"dim must be a multiple of 4, got {config.dim}")
    if config.eval_every % config.scan_steps:
        raise ConfigError(f"scan-steps must divide eval-every, got {config.scan_steps} and {config.eval_every}")
    if config.train_examples < config.batch_size:
        raise ConfigError(
            f"train-examples must be at least one batch of {config.batch_size}, got {config.train_examples}"
        )
    for name in ("epochs", "learning_rate", "power", "init_std"):
        if not getattr(config, name) > 0:
            raise ConfigError(f"{name.replace('_', '-')} must be > 0, got {getattr(config, name)}")
    if config.steps is not None:
        _at_least_one(config, "steps")
    if config.minutes is not None and not config.minutes > 0:
        raise ConfigError(f"minutes must be > 0, got {config.minutes}")
    return config


def _at_least_one(config: MQARConfig, name: str) -> None:
    value = getattr(config, name)
    if value < 1:
        raise ConfigError(f"{name.replace('_', '-')} must be >= 1, got {value}")

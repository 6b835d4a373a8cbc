"""Ablations of dynamic-mask attention as typed data: what is changed, and in which one configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from dmattn_jax.models.config import DogeConfig
from train.config import TrainConfig
from train.errors import ConfigError
from train.experiments.base import on_real_text
from train.resolve import resolve

AblationName = Literal[
    "dma",
    "swa",
    "earlier_ties",
    "linear_gate",
    "windows",
    "hidden_gate",
    "detached_gate",
    "margin",
    "half_recent",
    "all_keys",
    "mha",
]
NAMES: tuple[AblationName, ...] = get_args(AblationName)
MARGIN = 0.1

MEANINGS: dict[AblationName, str] = {
    "dma": "as published: later ties, exp, one window, gate from the values",
    "swa": "no choice: the last keys, as many of them",
    "earlier_ties": "of equal keys the earlier is kept",
    "linear_gate": "δ = A · softplus(v · Δ), without the exp",
    "windows": "a window for each kv head, from w/2 to 3w/2",
    "hidden_gate": "gate from the layer's input instead of its values",
    "detached_gate": "values learn nothing from the gate, which learns from them",
    "half_recent": "half of the window for the last keys, half for chosen ones",
    "all_keys": "a window as long as the row: every key is seen, and the gate is a bias alone",
    "mha": "dense attention, without a gate",
    "margin": f"δ rounded to multiples of {MARGIN} (gate_step)",
}


@dataclass(frozen=True)
class AblationCell:
    """One run. train: its configuration, in which a layer that no configuration names stands as `dma`."""

    ablation: AblationName
    train: TrainConfig

    @property
    def name(self) -> str:
        return self.train.name


@dataclass(frozen=True)
class AblationSweep:
    """Ablations × seeds of one small model on real text; all take the step law's numbers and the same data order."""

    ablations: tuple[AblationName, ...] = NAMES
    seeds: tuple[int, ...] = (0, 1)
    layers: int = 4
    width: int = 256
    """Twice as many heads of head_dim as kv heads, and an MLP of three times the width."""
    head_dim: int = 64
    window: int = 256
    """Keys that a query sees, in every ablation but the last two (in `windows`, in the mean over kv heads)."""
    vocab_size: int = 4096
    """Of a BPE vocabulary that is trained on the text to be trained on; 0 leaves the base's tokenizer."""
    base: TrainConfig = field(default_factory=lambda: on_real_text(every=500))
    """What all runs share: text, tokenizer, steps, devices."""

    def cells(self, output: Path, shards: int = 1) -> list[AblationCell]:
        """One cell a run, all ablations of a seed together. Raises: ConfigError on what cannot work."""
        for name in ("ablations", "seeds"):
            if not getattr(self, name):
                raise ConfigError(f"{name} must not be empty")
        if self.width < 1 or self.width % (2 * self.head_dim):
            raise ConfigError(f"width must be a multiple of 2 * head-dim ({2 * self.head_dim}), got {self.width}")
        if self.base.sequence_length < 4 * self.window or self.window < 2:
            raise ConfigError(
                f"window must be >= 2 and at most a fourth of the sequence length {self.base.sequence_length}, "
                f"got {self.window}"
            )
        heads = self.width // self.head_dim
        if "windows" in self.ablations and heads < 4:
            raise ConfigError(f"width must be at least {4 * self.head_dim} for windows of two sizes, got {self.width}")
        model = replace(
            self.base.model,
            attention="dma",
            num_layers=self.layers,
            hidden_size=self.width,
            intermediate_size=3 * self.width,
            num_heads=heads,
            num_kv_heads=heads // 2,
            head_dim=self.head_dim,
            window=self.window,
        )
        plan = resolve(replace(self.base, model=model), shards)
        numbers = replace(
            self.base,
            runs_dir=str(output),
            batch_size=plan.batch_size,
            steps=plan.steps,
            optimizer=replace(self.base.optimizer, learning_rate=plan.learning_rate),
        )
        return [
            AblationCell(
                ablation,
                replace(
                    numbers,
                    name=f"{ablation}_s{seed}",
                    seed=self.base.seed + seed,
                    model=replace(model, **changes_of(ablation, model, self.base.sequence_length)),
                ),
            )
            for seed in self.seeds
            for ablation in self.ablations
        ]


def changes_of(ablation: AblationName, model: DogeConfig, length: int) -> Mapping[str, Any]:
    """The fields that an ablation changes, for rows of `length`; none where it is another layer."""
    assert isinstance(model.window, int)
    half, heads = model.window // 2, model.num_kv_heads
    spread = tuple(half + round(index * 2 * half / max(heads - 1, 1)) for index in range(heads))
    changes: dict[str, dict[str, Any]] = {
        "swa": {"attention": "swa"},
        "windows": {"window": spread},
        "mha": {"attention": "mha"},
    }
    return changes.get(ablation, gate_changes(ablation, length))


def gate_changes(name: str, length: int) -> Mapping[str, Any]:
    """The fields of dynamic-mask attention that an ablation changes, whatever the model, for rows of `length`."""
    changes: dict[str, dict[str, Any]] = {
        "linear_gate": {"gate_activation": "linear"},
        "margin": {"gate_step": MARGIN},
        "all_keys": {"window": length},
    }
    return changes.get(name, {})

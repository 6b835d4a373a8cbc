"""The scaling experiment as typed data: a ladder of sizes, the variants, the seeds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, replace
from pathlib import Path

from dmattn_jax.models.config import AttentionKind
from train.config import TrainConfig
from train.errors import ConfigError
from train.experiments.base import on_real_text
from train.experiments.variants import VARIANTS
from train.flops import count_parameters
from train.optimizer import step_law_batch_tokens
from train.resolve import resolve

LADDER = ((3, 128, 3), (2, 256, 2), (4, 256, 2), (4, 384, 1), (4, 512, 1), (6, 512, 1))


@dataclass(frozen=True)
class ScalingSweep:
    """Sizes × variants × seeds, at the step law's learning rate and batch and 20 tokens a parameter.

    All variants of a size take the numbers of `mha`, so that each of their steps sees the same tokens in the same
    order. Rows of at least 4 windows, or the variants could not differ.
    """

    sizes: tuple[tuple[int, int, int], ...] = LADDER
    """Layers, width and seeds of each size. Half as many kv heads as heads, an MLP of three times the width; the
    default has 0.6M to 19M parameters without embeddings. Runs of other seeds differ in parameters and data order."""
    variants: tuple[AttentionKind, ...] = VARIANTS
    head_dim: int = 64
    window: int = 512
    """Of `swa` and `dma`. `nsa` selects as many keys and slides over half of them, as in the paper's sizes."""
    tokens_per_parameter: float = 20.0
    vocab_size: int = 4096
    """Of a BPE vocabulary that is trained on the text to be trained on; 0 leaves the base's tokenizer."""
    base: TrainConfig = field(default_factory=lambda: on_real_text(every=1000))
    """What all runs share: text, tokenizer, devices."""

    def cells(self, output: Path, shards: int = 1) -> list[TrainConfig]:
        """One configuration a run, from the smallest size up; all variants of a size and seed together.

        shards: pieces into which the devices cut a batch. Raises: ConfigError on what cannot work.
        """
        if self.base.sequence_length < 4 * self.window:
            raise ConfigError(
                f"sequence_length must be at least 4 windows, got {self.base.sequence_length} with a window of "
                f"{self.window}: the variants could hardly differ"
            )
        if not self.tokens_per_parameter > 0:
            raise ConfigError(f"tokens-per-parameter must be > 0, got {self.tokens_per_parameter}")
        for name in ("sizes", "variants"):
            if not getattr(self, name):
                raise ConfigError(f"{name} must not be empty")
        cells = []
        for layers, hidden, seeds in self.sizes:
            if layers < 1 or seeds < 1 or hidden < 1 or hidden % (2 * self.head_dim):
                raise ConfigError(
                    "a size must have layers and seeds >= 1 and a width that is a multiple of 2 * head_dim "
                    f"({2 * self.head_dim}), got {layers} {hidden} {seeds}"
                )
            dense = self._numbers(self._config(layers, hidden, "mha"), shards)
            for seed in range(seeds):
                for variant in self.variants:
                    model = self._config(layers, hidden, variant).model
                    name = f"{layers}x{hidden}_{variant}_s{seed}"
                    seeded = replace(dense, seed=self.base.seed + seed, runs_dir=str(output))
                    cells.append(replace(seeded, name=name, model=model))
        return cells

    def _config(self, layers: int, hidden: int, variant: AttentionKind) -> TrainConfig:
        heads = hidden // self.head_dim
        sparse = variant == "nsa"
        model = replace(
            self.base.model,
            attention=variant,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=heads // 2,
            head_dim=self.head_dim,
            window=max(self.window // 2, 1) if sparse else self.window,
            selected_blocks=max(self.window // self.base.model.selection_block, 1),
        )
        return replace(self.base, model=model)

    def _numbers(self, config: TrainConfig, shards: int) -> TrainConfig:
        """The configuration with a number for every `auto`."""
        if config.steps == "auto" and self.tokens_per_parameter != 20:
            # The step law again, for another number of tokens than `auto` means.
            tokens = self.tokens_per_parameter * count_parameters(config.model).non_embedding
            batch = config.batch_size
            if batch == "auto":
                pieces = config.accumulate * shards
                batch = max(1, round(step_law_batch_tokens(tokens) / config.sequence_length / pieces)) * pieces
            steps = max(1, round(tokens / (batch * config.sequence_length)))
            config = replace(config, batch_size=batch, steps=steps)
        plan = resolve(config, shards)
        optimizer = dataclasses.replace(config.optimizer, learning_rate=plan.learning_rate)
        return replace(config, batch_size=plan.batch_size, steps=plan.steps, optimizer=optimizer)

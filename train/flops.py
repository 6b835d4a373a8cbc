"""Floating-point operations of a decoder, counted from its shape, and the peak rates of known devices.

Conventions: a multiply-add is 2 operations; the backward pass costs twice the forward; recomputation
(rematerialisation) is not counted; of attention only visible (query, key) pairs count, whatever a kernel
really visits. So model FLOPs utilisation (MFU) compares useful work alone with the device's peak.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dmattn_jax.models.config import DogeConfig

PEAK_BF16_FLOPS: dict[str, float] = {
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "GH200": 989.4e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "V100": 125e12,
    "Tesla T4": 65e12,
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
}
"""Dense bf16 (V100, T4: fp16; TPU v2, v3: per core) peak of one JAX device, by words of its `device_kind`."""


def device_peak_flops(device_kind: str) -> float | None:
    """Peak operations per second of one device, or None where it is not known (every CPU).

    Whole words count, so that an `RTX A1000` is no `A100`, and the longest name wins, so that `H100 PCIe` is not taken
    for `H100`, nor `TPU v5 lite` for `TPU v5`.
    """
    matches = [name for name in PEAK_BF16_FLOPS if re.search(rf"\b{name}\b", device_kind, re.IGNORECASE)]
    return PEAK_BF16_FLOPS[max(matches, key=len)] if matches else None


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by their part in the arithmetic.

    total: all of them. embedding: token table, and the output table of an untied model. inactive: expert rows a
    token does not touch (CDMoE), and block MLPs that do not run for every token (`nsa`). `non_embedding` is the N of
    scaling laws and of the step law.
    """

    total: int
    embedding: int
    inactive: int = 0

    @property
    def non_embedding(self) -> int:
        return self.total - self.embedding

    @property
    def active(self) -> int:
        """Parameters without embeddings that one token is multiplied with."""
        return self.non_embedding - self.inactive


def count_parameters(config: DogeConfig) -> ParameterCount:
    """Parameters of `DogeForCausalLM(config)`, from its shape alone (no array is made)."""
    total = config.num_parameters()
    inactive = 0
    if config.num_experts:
        inactive = 2 * (config.num_experts - config.num_experts_per_token) * config.hidden_size * config.num_layers
    if config.attention == "nsa":
        inactive += config.compressor_parameters() * config.num_layers
    return ParameterCount(total, total - config.num_parameters(embeddings=False), inactive)


def visible_pairs(length: int, window: int | None) -> int:
    """(query, key) pairs of one causal sequence when a query sees at most `window` keys (None: all before it).

    Σ_i min(i + 1, window). The dynamic mask and the sliding window have the same count: both see exactly
    min(i + 1, window) keys.
    """
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def attention_flops(config: DogeConfig, length: int) -> int:
    """Operations of one layer's forward attention over one sequence: 2·D for q·k and 2·D for p·v, per pair and
    query head. For `nsa` the block MLPs are in it, because they run once a block and not once a token."""
    if config.attention == "mla":
        return (
            config.num_heads
            * visible_pairs(length, None)
            * (2 * (config.head_dim + config.head_dim // 2) + 2 * config.head_dim)
        )
    group = config.num_heads // config.num_kv_heads
    if config.attention == "mha":
        windows: tuple[int | None, ...] = (None,) * config.num_kv_heads
    elif isinstance(config.window, int):
        windows = (config.window,) * config.num_kv_heads
    else:
        windows = config.window
    pairs = group * sum(visible_pairs(length, window) for window in windows)
    if config.attention != "nsa":
        return 4 * config.head_dim * pairs
    pairs += config.num_heads * (compressed_pairs(config, length) + selected_pairs(config, length))
    blocks = config.num_kv_heads * (length // config.compression_block)
    return 4 * config.head_dim * pairs + 2 * config.compressor_parameters() * blocks


def compressed_pairs(config: DogeConfig, length: int) -> int:
    """(query, compressed row) pairs of one sequence: the row that is always there, and every block that has ended."""
    size = config.compression_block
    # Block b is seen by the queries from its last token on.
    return length + sum(length - end for end in range(size - 1, length, size))


def selected_pairs(config: DogeConfig, length: int) -> int:
    """(query, key) pairs of the selected branch: its own block up to the query, and whole earlier blocks."""
    size = config.selection_block
    return sum(i % size + 1 + size * min(i // size, config.selected_blocks) for i in range(length))


@dataclass(frozen=True)
class TokenFlops:
    """Operations of training on one token (forward and backward), by part."""

    parameters: float
    """6·N, N the active parameters without embeddings."""
    logits: float
    """6·V·d: the output table, which N leaves out."""
    attention: float
    """Three times the forward attention of all layers, divided by the sequence length."""

    @property
    def total(self) -> float:
        return self.parameters + self.logits + self.attention


def training_flops_per_token(config: DogeConfig, length: int) -> TokenFlops:
    """Operations per trained token at this sequence length, one document a sequence (packing sees fewer pairs)."""
    return TokenFlops(
        parameters=6.0 * count_parameters(config).active,
        logits=6.0 * config.vocab_size * config.hidden_size,
        attention=3.0 * config.num_layers * attention_flops(config, length) / length,
    )

"""Operations and parameters against counts by hand and against the model itself."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from configs import PRESETS
from dmattn_jax.models.config import DogeConfig
from train.flops import (
    attention_flops,
    count_parameters,
    device_peak_flops,
    training_flops_per_token,
    visible_pairs,
)
from train.parameters import make_skeleton


@pytest.mark.parametrize("length", [1, 2, 7, 23])
@pytest.mark.parametrize("window", [1, 3, 7, 22, 23, 50, None])
def test_visible_pairs_by_counting(length, window):
    counted = sum(min(i + 1, window or length) for i in range(length))
    assert visible_pairs(length, window) == counted


def test_attention_flops_by_hand():
    # 6 query heads on 3 kv heads, head size 10; 5 positions with windows 1, 2, 5: 5 + 9 + 15 = 29 pairs a query head,
    # two query heads a kv head, 2·10 for q·k and 2·10 for p·v
    config = DogeConfig(num_heads=6, num_kv_heads=3, head_dim=10, window=(1, 2, 5))
    assert attention_flops(config, 5) == 2 * 29 * (20 + 20)


def test_dense_attention_counts_every_earlier_key():
    config = DogeConfig(num_heads=2, num_kv_heads=1, head_dim=8, window=3, attention="mha")
    assert attention_flops(config, 7) == 2 * 28 * 32
    assert attention_flops(replace(config, attention="swa"), 7) == attention_flops(replace(config, attention="dma"), 7)
    assert attention_flops(replace(config, attention="swa"), 7) == 2 * (1 + 2 + 3 * 5) * 32


def test_token_flops_by_hand():
    config = DogeConfig(
        vocab_size=11,
        hidden_size=4,
        intermediate_size=6,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=2,
        window=3,
    )
    # a layer: q and out 2·4·4, k and v 2·4·2, their norms 2·2, MLP 3·4·6, norms and residuals 4·4, A 1, Δ 2
    parameters = 2 * (32 + 16 + 4 + 72 + 16 + 3) + 4
    count = count_parameters(config)
    assert (count.non_embedding, count.embedding, count.total) == (parameters, 44, parameters + 44)
    flops = training_flops_per_token(config, 5)
    assert flops.parameters == 6 * parameters
    assert flops.logits == 6 * 44
    # 1 + 2 + 3 + 3 + 3 pairs, 2 heads, 4·2 operations, 2 layers, three times the forward, 5 tokens
    assert flops.attention == pytest.approx(12 * 2 * 8 * 2 * 3 / 5)
    assert flops.total == flops.parameters + flops.logits + flops.attention


def test_experts_count_only_where_a_token_goes():
    dense = DogeConfig(hidden_size=8, num_layers=3)
    experts = replace(dense, num_experts=49, num_experts_per_token=5)
    count = count_parameters(experts)
    assert count.inactive == 3 * 2 * (49 - 5) * 8
    assert count.active == count_parameters(dense).active + 3 * (2 * 5 * 8 + 8 * 14)


def test_latent_attention_counts_its_rotated_part():
    config = DogeConfig(num_heads=3, num_kv_heads=1, head_dim=8, attention="mla")
    # 28 pairs of 7 tokens, 2·12 for q·k and 2·8 for p·v, three heads
    assert attention_flops(config, 7) == 3 * 28 * (24 + 16)


def test_native_sparse_attention_counts_its_three_branches_and_the_block_mlps():
    config = DogeConfig(
        hidden_size=20, num_heads=6, num_kv_heads=3, head_dim=10, attention="nsa", window=(1, 2, 5),
        compression_block=2, selection_block=4, selected_blocks=1,
    )  # fmt: skip
    near = 2 * (11 + (1 + 2 * 10) + (1 + 2 + 3 + 4 + 5 * 7))
    compressed = sum(1 + (i + 1) // 2 for i in range(11))
    selected = sum(i % 4 + 1 + 4 * min(i // 4, 1) for i in range(11))
    # five whole blocks, three kv heads, keys and values: 2·10 -> 5 -> 10
    mlps = 5 * 3 * 2 * 2 * (20 * 5 + 5 * 10)
    assert attention_flops(config, 11) == 40 * (near + 6 * (compressed + selected)) + mlps
    count = count_parameters(config)
    assert count.inactive == config.num_layers * 2 * (20 * 5 + 5 * 10)


@pytest.mark.parametrize("attention", ["dma", "swa", "mha", "mla", "nsa"])
@pytest.mark.parametrize("tied", [True, False])
def test_counted_parameters_are_the_models(attention, tied):
    config = DogeConfig(
        vocab_size=13, hidden_size=6, intermediate_size=10, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4,
        attention=attention, tie_embeddings=tied, num_experts=9, num_experts_per_token=2,
    )  # fmt: skip
    made = sum(math.prod(leaf.shape) for leaf in make_skeleton(config).shapes.values())
    assert count_parameters(config).total == made


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA RTX A1000", None),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
    ],
)
def test_device_peaks(kind, peak):
    assert device_peak_flops(kind) == peak


LADDER = {  # layers, width, MLP width, heads, kv heads
    "doge-20m": (8, 256, 512, 2, 1),
    "doge-60m": (16, 512, 1024, 4, 2),
    "doge-160m": (24, 768, 1536, 6, 3),
    "doge-320m": (32, 1024, 2048, 8, 4),
    "80m": (12, 768, 2304, 6, 3),
    "200m": (16, 1024, 3072, 8, 4),
    "680m": (24, 1536, 4608, 12, 6),
    "1.7b": (28, 2048, 6144, 16, 8),
}


@pytest.mark.parametrize("name", LADDER)
def test_presets_have_their_published_shapes(name):
    model = PRESETS[name].model
    shape = (model.num_layers, model.hidden_size, model.intermediate_size, model.num_heads, model.num_kv_heads)
    assert shape == LADDER[name]
    assert model.head_dim == 128


@pytest.mark.parametrize(
    ("name", "millions", "embeddings"),
    [
        ("doge-20m", 13.1, True),  # the release of this name has 13.1M
        ("doge-60m", 54.6, True),
        ("doge-160m", 152.7, True),
        ("doge-320m", 335.8, True),
        ("80m", 85, False),
        ("200m", 201, False),
        ("680m", 680, False),
        ("1.7b", 1410, False),
    ],
)
def test_presets_have_the_size_of_their_name(name, millions, embeddings):
    count = count_parameters(PRESETS[name].model)
    assert (count.total if embeddings else count.non_embedding) / 1e6 == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize(
    ("name", "tokens_per_step", "steps", "rate"),
    [
        ("80m", 0.128e6, 13_500, 3e-3),
        ("200m", 0.192e6, 20_800, 2e-3),
        ("680m", 0.392e6, 35_000, 1e-3),
        ("1.7b", 1e6, 40_000, 1e-3),
    ],
)
def test_the_papers_presets_have_its_recipe(name, tokens_per_step, steps, rate):
    config = PRESETS[name]
    assert isinstance(config.batch_size, int)
    assert config.batch_size * config.sequence_length == pytest.approx(tokens_per_step, rel=0.05)
    assert (config.steps, config.optimizer.learning_rate) == (steps, rate)
    assert config.optimizer.weight_decay == 0.01


def test_presets_are_named_after_themselves_and_look_further_than_their_window():
    for name, config in PRESETS.items():
        assert config.name == name
        assert np.max(config.model.window) < config.sequence_length
    assert 1e6 <= count_parameters(PRESETS["quickstart"].model).total <= 3e6

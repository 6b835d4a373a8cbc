"""The same weights give the same logits as in transformers, and go back to it unchanged.

transformers' Doge differs in places (see `dmattn_jax.io.doge_format`). Its top-k is told here which of equal gates to
take, which PyTorch leaves open, and CDMoE is compared where its router does not mix tokens, and otherwise with a
router that does not.
"""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from dmattn_jax.generation import generate
from dmattn_jax.io import load_pretrained, save_pretrained
from dmattn_jax.io.pretrained import read_config

torch = pytest.importorskip("torch", reason="compares with PyTorch, which is installed on Python 3.11 only")
transformers = pytest.importorskip("transformers", reason="compares with transformers, installed on Python 3.11 only")

VOCABULARY = 61
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "beta_fast": 2.0,
    "original_max_position_embeddings": 16,
}
MODELS = {
    "doge": ("Doge", {"keep_window_size": 64, "tie_word_embeddings": True}),
    "doge-untied-head-size": ("Doge", {"keep_window_size": 64, "tie_word_embeddings": False, "head_dim": 10}),
    # its top-k after the causal mask chooses as the paper does
    "doge-narrow-window": ("Doge", {"keep_window_size": 5}),
    "llama": ("Llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "llama-tied-linear": (
        "Llama",
        {
            "tie_word_embeddings": True,
            "head_dim": 10,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 10, "rope_parameters": YARN, "attention_bias": True}),
    # a window that no layer uses
    "qwen3-plain": (
        "Qwen3",
        {
            "head_dim": 10,
            "use_sliding_window": True,
            "sliding_window": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
}
MOE = {"is_moe": True, "num_experts": 25, "num_experts_per_tok": 4, "keep_window_size": 64}


def theirs(kind: str, seed: int = 0, **fields):
    """A random model of transformers, in which no vector is at its neutral start."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**COMMON | fields)
    model = getattr(transformers, f"{kind}ForCausalLM")._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "dt_proj" in name:
                parameter.normal_()
    return model


def later_of_equals(values, k, dim=-1, largest=True, sorted=True):
    """`torch.topk` where of equal values the later win, as here: a text that repeats a token has equal gates."""
    assert dim == -1
    assert largest
    order = torch.argsort(values.flip(-1), dim=-1, descending=True, stable=True)[..., :k]
    indices = values.shape[-1] - 1 - order
    return torch.return_types.topk((values.gather(-1, indices), indices))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[] if name in ("doge", "llama", "qwen3") else pytest.mark.slow) for name in MODELS
    ],
)
def pair(request, tmp_path_factory):
    """A model of transformers, ours loaded from its files, and the folder."""
    kind, fields = MODELS[request.param]
    model, folder = theirs(kind, **fields), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, load_pretrained(folder), folder


@nnx.jit
def logits_of(model, tokens, segment_ids=None):
    return model(tokens, segment_ids)


def token_ids(batch=2, length=13):
    return np.random.default_rng(0).integers(0, VOCABULARY, (batch, length))


def their_logits(model, ids, mask=None):
    with torch.no_grad():
        out = model(torch.tensor(ids), attention_mask=None if mask is None else torch.tensor(mask), use_cache=False)
    return out.logits.float().numpy()


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_logits_and_padded_batches(pair, monkeypatch):
    monkeypatch.setattr(torch, "topk", later_of_equals)
    model, ours, _ = pair
    ids = token_ids()
    assert_close(logits_of(ours, jnp.asarray(ids), jnp.ones(ids.shape, jnp.int32)), their_logits(model, ids))
    # the second row is shorter by four; rotary positions being relative, on the left too
    for tokens in (slice(0, 9), slice(4, 13)):
        mask = np.ones_like(ids)
        mask[1] = 0
        mask[1, tokens] = 1
        real = mask.astype(bool)
        expected = their_logits(model, ids, mask)[real]
        assert_close(np.asarray(logits_of(ours, jnp.asarray(ids), jnp.asarray(mask, jnp.int32)))[real], expected)


@pytest.mark.slow
def test_greedy_text_is_theirs(pair, monkeypatch):
    monkeypatch.setattr(torch, "topk", later_of_equals)
    model, ours, _ = pair
    prompt = [3, 1, 4, 1, 5]
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=6, do_sample=False, use_cache=False, pad_token_id=0, eos_token_id=None
    )
    assert generate(ours, [prompt], max_new_tokens=6) == [out[0, 5:].tolist()]


def test_files_written_back_are_theirs_bit_for_bit(pair, tmp_path):
    model, ours, folder = pair
    save_pretrained(ours, tmp_path, shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    written = {}
    for file in set(index["weight_map"].values()):
        assert (tmp_path / file).stat().st_size < 25_000
        written |= load_file(tmp_path / file)
    before = load_file(folder / "model.safetensors")
    assert written.keys() == before.keys() == index["weight_map"].keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)
    again, info = type(model).from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
    assert not any(info.values())
    ids = token_ids()
    np.testing.assert_array_equal(their_logits(again, ids), their_logits(model, ids))


@pytest.mark.slow
def test_experts_one_token_at_a_time(tmp_path):
    """One token alone is not mixed with another: their decoding with a cache is our full forward."""
    model = theirs("Doge", **MOE)
    model.save_pretrained(tmp_path)
    ours, ids = load_pretrained(tmp_path), token_ids(batch=1)
    cache, steps = transformers.DynamicCache(config=model.config), []
    with torch.no_grad():
        for at in range(ids.shape[1]):
            steps.append(model(torch.tensor(ids[:, at : at + 1]), cache=cache, use_cache=True).logits)
    assert_close(logits_of(ours, jnp.asarray(ids)), torch.cat(steps, dim=1).numpy())


def test_experts_routed_by_their_own_scores(tmp_path):
    """With the reshape of the router's output corrected, whole padded batches agree, and so do the files."""
    from transformers.models.doge import modeling_doge

    class Router(torch.nn.Module):
        """Scores [tokens, 2K] laid out so that the view to [2, tokens, K] that follows keeps tokens apart."""

        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, hidden):
            scores = self.linear(hidden)
            return scores.reshape(-1, 2, scores.shape[-1] // 2).transpose(0, 1).contiguous()

    model = theirs("Doge", tie_word_embeddings=True, **MOE)
    model.save_pretrained(tmp_path / "theirs")
    ours, ids = load_pretrained(tmp_path / "theirs"), token_ids()
    mixed = their_logits(model, ids)
    for module in model.modules():
        if isinstance(module, modeling_doge.DogeCDMoE):
            module.router_gate = Router(module.router_gate)
    mask = np.ones_like(ids)
    mask[1, 9:] = 0
    real = mask.astype(bool)
    actual = np.asarray(logits_of(ours, jnp.asarray(ids), jnp.asarray(mask)))[real]
    assert_close(actual, their_logits(model, ids, mask)[real])
    assert np.abs(actual - mixed[real]).max() > 1e-2, "the router of transformers no longer mixes tokens"
    save_pretrained(ours, tmp_path / "ours")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)


@pytest.mark.parametrize(
    "changes", [{}, {"truncate": False, "beta_slow": 1.5}, {"attention_factor": 1.25, "factor": 1.0, "rope_theta": 1e6}]
)
def test_yarn_is_theirs(changes, tmp_path):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = YARN | changes
    config = transformers.Qwen3Config(**COMMON, head_dim=24, rope_parameters=rope)
    config.save_pretrained(tmp_path)
    ours = read_config(tmp_path)[1]
    expected, magnitude = ROPE_INIT_FUNCTIONS["yarn"](config, None)
    frequency = ours.rope_theta ** (-jnp.arange(12) / 12)
    np.testing.assert_allclose(ours.rope_scaling.scale(frequency, ours.rope_theta), expected.numpy(), rtol=1e-5)
    assert ours.rope_scaling.magnitude == pytest.approx(magnitude)


@pytest.mark.slow
def test_bfloat16_files(tmp_path):
    """Half the bytes, the same numbers: parameters keep the type of the file."""
    model = theirs("Llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    assert ours.config.dtype == ours.config.param_dtype == "bfloat16"
    wide = load_pretrained(tmp_path, dtype="float32")
    ids = token_ids()
    assert_close(logits_of(wide, jnp.asarray(ids)), their_logits(model.float(), ids))
    save_pretrained(ours, tmp_path / "again")
    before, after = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    for name in before:
        assert before[name].dtype == after[name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(before[name], after[name])


@pytest.mark.slow
def test_what_transformers_cannot_compute_it_refuses(tmp_path):
    from dmattn_jax.models import DogeConfig, DogeForCausalLM

    config = DogeConfig(vocab_size=61, hidden_size=8, intermediate_size=8, num_layers=1, gate_activation="linear")
    save_pretrained(DogeForCausalLM(config, rngs=nnx.Rngs(0)), tmp_path)
    with pytest.raises(ValueError, match="dmattn_doge"):
        transformers.AutoConfig.from_pretrained(tmp_path)

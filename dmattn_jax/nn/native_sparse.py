"""Native sparse attention: every query reads compressed blocks, a few selected blocks, and a sliding window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32

from dmattn_jax.attention import sliding_window_attention
from dmattn_jax.cache import DenseCache, WindowCache, token_positions
from dmattn_jax.documents import document_bounds
from dmattn_jax.nn.attend import attend, attend_window_cache
from dmattn_jax.nn.attention import _GroupedQueryAttention
from dmattn_jax.nn.block_attention import BlockContext, BlockQueries, block_attention, block_ends, take_blocks
from dmattn_jax.nn.linear import linear
from dmattn_jax.nn.norms import RMSNorm
from dmattn_jax.partitioning import normal, parameter
from dmattn_jax.validation import check_window


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NativeSparseCache:
    """What native sparse attention must remember of a row: everything once, its compressed blocks, the last keys."""

    tokens: DenseCache
    """Keys before the rotation, and values."""
    compressed_key: Float[Array, "B C K D"]
    compressed_value: Float[Array, "B C K D"]
    recent: WindowCache

    @property
    def length(self) -> Int32[Array, " B"]:
        return self.tokens.length


class NativeSparseAttention(_GroupedQueryAttention):
    """Σ_branch g_branch ⊙ out_branch over three attentions of the same queries (arXiv 2502.11089).

    Compressed: un-rotated q over one key and value per block of `compression_block` tokens at that stride, made of the
      block's un-rotated keys (values) plus learned positions by an MLP B·D → latent_dim → D with ReLU, and over one
      learned row that is always visible. A block is visible from its last token on.
    Selected: rotated q over the `selected_blocks` earlier blocks of `selection_block` tokens with the greatest
      importance, and the query's own block up to itself. A block's importance is the mean of the compressed logits of
      the blocks inside it, averaged over the query heads of a kv head; the choice carries no gradient, and of equal
      blocks the earlier ones win.
    Sliding: rotated q over the last `window` keys; an int or one per kv head.
    g = sigmoid(x W + b), one number a head and branch; W starts at 0, b at −2, −2 and +2.

    Blocks are counted from the start of each document. Training memory is O(T): queries run in chunks, each against
    a mask of blocks over all keys, or those up to the end of their quarter of the row. A GPU reads them sooner than it
    gathers 16 blocks a query, up to about 8k tokens; so time is quadratic, and decoding reads the whole cache too.
    """

    matrices: ClassVar[tuple[str, ...]] = (*_GroupedQueryAttention.matrices, "branch")

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        latent_dim: int,
        window: int | Sequence[int] = 512,
        compression_block: int = 32,
        selection_block: int = 64,
        selected_blocks: int = 16,
        rope_theta: float | None = 10_000.0,
        qk_norm: bool = True,
        norm_eps: float = 1e-6,
        init_std: float = 0.02,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            hidden_size,
            num_heads,
            num_kv_heads,
            head_dim,
            rope_theta=rope_theta,
            qk_norm=qk_norm,
            norm_eps=norm_eps,
            init_std=init_std,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        check_blocks(compression_block, selection_block, selected_blocks)
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be >= 1, got {latent_dim}")
        self.windows = check_window(window, num_kv_heads)
        self.compression_block = compression_block
        self.selection_block = selection_block
        self.selected_blocks = selected_blocks

        def drawn(shape: Sequence[int], names: Sequence[str | None]) -> nnx.Param:
            return parameter(normal(rngs, shape, init_std, param_dtype), names)

        # The leading 2: for keys, for values.
        self.memory = drawn((2, num_kv_heads, head_dim), (None, "kv_heads", "head_dim"))
        self.block_position = drawn((2, compression_block, head_dim), (None, None, "head_dim"))
        self.compress_in = drawn((2, compression_block, head_dim, latent_dim), (None, None, "head_dim", None))
        self.compress_out = drawn((2, latent_dim, head_dim), (None, None, "head_dim"))
        self.branch = parameter(jnp.zeros((hidden_size, 3, num_heads), param_dtype), ("embed", None, "heads"))
        start = jnp.broadcast_to(jnp.asarray([-2.0, -2.0, 2.0], param_dtype)[:, None], (3, num_heads))
        self.branch_bias = parameter(start, (None, "heads"))

    def __call__(
        self, x: Float[Array, "B T M"], segment_ids: Int[Array, "B T"] | None = None, norm: RMSNorm | None = None
    ) -> Float[Array, "B T M"]:
        """Attention within each document of segment_ids (0 = padding, whose output is 0); computes in `dtype`.

        norm: of x, applied first.
        """
        x = x if norm is None else norm(x)
        if segment_ids is None:
            return self._whole(x, None)
        # Blocks count tokens: padding goes to the end of the row, where it is in no block.
        order = jnp.argsort(segment_ids == 0, axis=1, stable=True)
        segment_ids = jnp.take_along_axis(segment_ids, order, axis=1)
        token = (segment_ids != 0)[..., None]
        x = jnp.where(token, jnp.take_along_axis(x, order[..., None], axis=1), 0)
        out = jnp.where(token, self._whole(x, segment_ids), 0)
        return jnp.take_along_axis(out, jnp.argsort(order, axis=1)[..., None], axis=1)

    def _whole(self, x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        """Rows whose padding, if any, is at their end."""
        batch, length = x.shape[:2]
        documents = document_bounds(segment_ids, batch, length)
        slot = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        raw, raw_key, value = self._heads(x)
        query, key = (self._rotate(heads, slot - documents.start) for heads in (raw, raw_key))
        known = None if segment_ids is None else documents
        ends = block_ends(known, batch, length, self.compression_block)
        compressed = self._compress(raw_key, value, ends)
        context = self._context(key, value, *compressed, ends, block_ends(known, batch, length, self.selection_block))
        near = attend(sliding_window_attention, query, key, value, segment_ids=segment_ids, windows=self.windows)
        return self._mix(x, BlockQueries(raw, query, slot, documents.start), context, near, whole_rows=True)

    def init_cache(self, batch: int, max_length: int) -> NativeSparseCache:
        if max_length < 1:
            raise ValueError(f"max_length must be >= 1, got {max_length}")
        # Whole selection blocks, so that the blocks of the cache are its slots in order.
        capacity = -(-max_length // self.selection_block) * self.selection_block
        sizes = (self.num_kv_heads, self.head_dim)
        blocks = (batch, capacity // self.compression_block, *sizes)
        return NativeSparseCache(
            DenseCache.create(batch, capacity, *sizes, dtype=self.dtype),
            # Not one array twice: a cache can be donated.
            jnp.zeros(blocks, self.dtype),
            jnp.zeros(blocks, self.dtype),
            WindowCache.create(batch, self.windows, *sizes, max_length=max_length, dtype=self.dtype),
        )

    def decode(
        self, x: Float[Array, "B T M"], cache: NativeSparseCache, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T M"], NativeSparseCache]:
        """The next T tokens of every row's one document; segment_ids 0 marks padding, anywhere in the chunk."""
        batch, length = x.shape[:2]
        token = jnp.ones((batch, length), bool) if segment_ids is None else segment_ids != 0
        position = token_positions(cache.length, token)
        raw, raw_key, value = self._heads(x)
        query, key = self._rotate(raw, position), self._rotate(raw_key, position)
        tokens = cache.tokens.append(raw_key, value, token)
        compressed = self._compress_new(cache, tokens, length)
        slots = jnp.arange(tokens.keys.shape[1], dtype=jnp.int32)[None]
        context = self._context(
            self._rotate(tokens.keys, slots),
            tokens.values,
            *compressed,
            block_ends(None, batch, slots.shape[1], self.compression_block),
            block_ends(None, batch, slots.shape[1], self.selection_block),
        )
        gate = jnp.zeros(key.shape[:3], jnp.float32)
        near, recent = attend_window_cache(query, key, value, gate, token, cache.recent)
        queries = BlockQueries(raw, query, position, jnp.zeros_like(position))
        out = self._mix(x, queries, context, near, whole_rows=False)
        return jnp.where(token[..., None], out, 0), NativeSparseCache(tokens, *compressed, recent)

    def _compress_new(self, cache: NativeSparseCache, tokens: DenseCache, length: int) -> tuple[jax.Array, jax.Array]:
        """The compressed blocks of the cache, with those that a chunk of `length` tokens has ended."""
        size = self.compression_block
        block = (cache.length // size)[:, None] + jnp.arange(length // size + 1)
        end = block * size + size - 1
        new = self._compress(tokens.keys, tokens.values, end)
        # Blocks that have not ended yet go nowhere.
        block = jnp.where(end < tokens.length[:, None], block, cache.compressed_key.shape[1])
        row = jnp.arange(block.shape[0])[:, None]
        held = (cache.compressed_key, cache.compressed_value)
        key, value = (old.at[row, block].set(rows, mode="drop") for old, rows in zip(held, new, strict=True))
        return key, value

    def _compress(
        self, key: jax.Array, value: jax.Array, ends: Int32[Array, "B C"]
    ) -> tuple[Float[Array, "B C K D"], Float[Array, "B C K D"]]:
        """One key and one value for each block that ends at `ends`."""
        out = []
        for which, rows in enumerate((key, value)):
            position, inward, outward = (
                array[which].astype(self.dtype) for array in (self.block_position, self.compress_in, self.compress_out)
            )
            blocks = take_blocks(rows, ends, self.compression_block) + position[:, None]
            hidden = jax.nn.relu(jnp.einsum("bcskd,sdl->bckl", blocks, inward))
            out.append(jnp.einsum("bckl,ld->bckd", hidden, outward))
        return out[0], out[1]

    def _context(self, key, value, compressed_key, compressed_value, ends, selection_ends) -> BlockContext:
        memory = jnp.broadcast_to(
            self.memory[...].astype(self.dtype)[:, None, None], (2, key.shape[0], 1, *self.memory.shape[1:])
        )
        return BlockContext(
            key=key,
            value=value,
            compressed_key=jnp.concatenate([memory[0], compressed_key], axis=1),
            compressed_value=jnp.concatenate([memory[1], compressed_value], axis=1),
            compressed_end=ends,
            selection_end=selection_ends,
        )

    def _mix(
        self, x: jax.Array, queries: BlockQueries, context: BlockContext, near: jax.Array, *, whole_rows: bool
    ) -> jax.Array:
        """The three branches by their gates, and the output projection."""
        compressed, selected = block_attention(
            queries,
            context,
            compression_block=self.compression_block,
            selection_block=self.selection_block,
            selected_blocks=self.selected_blocks,
            whole_rows=whole_rows,
        )
        weight = linear(x.astype(self.dtype), self.branch[...].astype(self.dtype))
        weight = jax.nn.sigmoid(weight.astype(jnp.float32) + self.branch_bias[...].astype(jnp.float32))
        weight = weight.astype(self.dtype)[..., None]
        return self._merge(weight[:, :, 0] * compressed + weight[:, :, 1] * selected + weight[:, :, 2] * near)


def check_blocks(compression_block: Any, selection_block: Any, selected_blocks: Any) -> None:
    """Raises: ValueError unless all are ints >= 1 and selection blocks are whole compression blocks."""
    sizes = {
        "compression_block": compression_block,
        "selection_block": selection_block,
        "selected_blocks": selected_blocks,
    }
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be an int >= 1, got {size!r}")
    if selection_block % compression_block:
        raise ValueError(
            f"selection_block must be a multiple of compression_block, got {selection_block} and {compression_block}"
        )

"""What every decoder of the library shares: tables of tokens around one scan over equal blocks.

Whatever reads a decoder (training, generation, files) needs this interface alone, not the kind of its blocks.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dmattn_jax import nn
from dmattn_jax.models.loss import LossOutput, chunked_cross_entropy
from dmattn_jax.partitioning import constrain, normal, parameter
from pallas_kernels import RESIDUALS

HIDDEN = ("batch", None, None)


class DecoderConfig(Protocol):
    """The fields of a configuration that do not depend on the kind of block."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def norm_eps(self) -> float: ...

    @property
    def tie_embeddings(self) -> bool: ...

    @property
    def balance_loss_weight(self) -> float: ...

    @property
    def init_std(self) -> float: ...

    @property
    def dtype(self) -> str: ...

    @property
    def param_dtype(self) -> str: ...

    @property
    def remat(self) -> bool: ...

    @property
    def unroll_layers(self) -> bool: ...


class CausalDecoder(nnx.Module):
    """Embedding, `num_layers` blocks, final norm, unembedding (the embedding's transpose when tied).

    The blocks are one block whose parameters have a leading "layers" axis, and run in one `scan`: compile time
    does not grow with depth, unless the configuration unrolls it. Parameters are param_dtype, computation is dtype,
    logits and losses float32.

    A block has `attention` (with `init_cache`), is called as `block(x, segment_ids) -> (x, balance loss)`, and
    decodes as `block.decode(x, cache, segment_ids) -> (x, cache)`.

    `unrolled` gives a decoder of the same results that has its blocks, and so its caches, as a list.
    """

    config: Any
    """A DecoderConfig: of which kind, a subclass says."""
    matrices: ClassVar[tuple[str, ...]] = ("embedding", "unembedding")

    def __init__(self, config: DecoderConfig, make_block: Callable[..., nnx.Module], *, rngs: nnx.Rngs):
        """make_block(rngs=): one block with fresh parameters."""
        table = (config.vocab_size, config.hidden_size)
        self.config = config
        self.embedding = parameter(normal(rngs, table, config.init_std, config.param_dtype), ("vocab", "embed"))

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stack(rngs: nnx.Rngs) -> Any:
            return make_block(rngs=rngs)

        self.blocks = stack(rngs)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps, param_dtype=config.param_dtype)
        if not config.tie_embeddings:
            initial = normal(rngs, table[::-1], config.init_std, config.param_dtype)
            self.unembedding = parameter(initial, ("embed", "vocab"))

    @property
    def dtype(self) -> jnp.dtype:
        """What the layers compute in."""
        return jnp.dtype(self.config.dtype)

    def __call__(
        self, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T V"]:
        """Logits of the next token, float32. segment_ids: documents packed into a row, 0 = padding.

        For training use `loss`, which never holds all logits at once.
        """
        hidden, _ = self.hidden(tokens, segment_ids)
        return self.logits(hidden)

    def loss(
        self,
        tokens: Int[Array, "B T"],
        targets: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        weights: Float[Array, "B T"] | None = None,
    ) -> LossOutput:
        """Mean cross-entropy of targets [B, T] (token to predict at each position; < 0: not counted)."""
        hidden, balance = self.hidden(tokens, segment_ids)
        total, count = chunked_cross_entropy(hidden, self._unembedding(), targets, weights)
        cross_entropy = total / jnp.where(count > 0, count, 1)
        auxiliary = self.config.balance_loss_weight * balance
        return LossOutput(cross_entropy + auxiliary, cross_entropy, count, auxiliary)

    def hidden(
        self, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T M"], Float[Array, ""]]:
        """The final norm's output and the mean balance loss of the layers."""

        def block(layer: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            return layer(x, segment_ids)

        x, balance = self._scan(block, self.embed(tokens))
        return self.norm(x), jnp.asarray(balance).mean()

    def init_cache(self, batch: int, max_length: int) -> Any:
        """Empty decoding caches of all layers (a leading layers axis; a list of them when unrolled), for at most
        max_length tokens a row."""
        if self.is_unrolled:
            return [block.attention.init_cache(batch, max_length) for block in self.blocks]
        # It depends on the layer's sizes alone, which stacking does not change.
        cache = self.blocks.attention.init_cache(batch, max_length)
        layers = self.config.num_layers
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (layers, *leaf.shape)), cache)

    def decode(
        self, tokens: Int[Array, "B T"], cache: Any, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T M"], Any]:
        """The final norm's output (see `logits`) for the next T tokens of every row, and the caches after them.

        segment_ids 0 marks padding, so that rows may append unequal numbers of tokens.
        """

        def block(layer: Any, x: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
            return layer.decode(x, cache, segment_ids)

        x, cache = self._scan(block, self.embed(tokens), cache)
        return self.norm(x), cache

    def logits(self, hidden: Float[Array, "*n M"]) -> Float[Array, "*n V"]:
        """Unembed the output of `hidden` or `decode`; float32."""
        unembedding = self._unembedding().astype(hidden.dtype)
        return jnp.einsum("...m,mv->...v", hidden, unembedding, preferred_element_type=jnp.float32)

    @jax.named_scope("embed")
    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T M"]:
        """What the first block reads."""
        # Whole rows on every device of fsdp before the look-up: its result is split by batch, not by feature.
        table = constrain(self.embedding[...], ("vocab", None))
        return constrain(table[tokens].astype(self.config.dtype), HIDDEN)

    @property
    def is_unrolled(self) -> bool:
        """Whether the blocks are a list."""
        return isinstance(self.blocks, nnx.List)

    def unrolled(self) -> Self:
        """This decoder with its blocks as a list, each with parameters of its own: a copy of them.

        For loops over tokens on a GPU, where a loop over layers copies the parameters and caches of every layer out of
        their stacks, and caches back, for each token. `from_stack` takes caches along.
        """
        if self.is_unrolled:
            return self
        graph, parameters = nnx.split(self.blocks)
        blocks = [nnx.merge(graph, each) for each in _per_layer(parameters, self.config.num_layers)]
        decoder = nnx.merge(*nnx.split(self))
        decoder.blocks = nnx.List(blocks)
        return decoder

    def from_stack(self, cache: Any) -> Any:
        """The caches of this decoder before it was unrolled, or its own, as it takes them."""
        if not self.is_unrolled or isinstance(cache, list):
            return cache
        return _per_layer(cache, self.config.num_layers)

    def layer(self, index: int | jax.Array) -> Any:
        """The block of one layer by itself; an index beyond the last gives the last."""
        if self.is_unrolled:
            return self.blocks[min(int(index), self.config.num_layers - 1)]
        graph, parameters = nnx.split(self.blocks)
        return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[index], parameters))

    def _unembedding(self) -> jax.Array:
        return self.embedding[...].T if self.config.tie_embeddings else self.unembedding[...]

    def _scan(
        self, block: Callable[..., tuple[jax.Array, Any]], x: jax.Array, *of_layers: Any
    ) -> tuple[jax.Array, Any]:
        """Run `block(layer, x, …) -> (x, y)` through the layers; the y of all layers, stacked or, unrolled, a list."""
        if self.is_unrolled:
            graphs, parameters = zip(*map(nnx.split, self.blocks), strict=True)
            # The layers are equal but for their arrays: traced and lowered once.
            run = jax.jit(lambda parameters, x, *others: block(nnx.merge(graphs[0], parameters), x, *others))
            made = []
            for each in zip(parameters, *of_layers, strict=True):
                x, y = run(each[0], x, *each[1:])
                made.append(y)
            return x, made
        graph, parameters = nnx.split(self.blocks)

        def step(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
            parameters, *others = layer
            return block(nnx.merge(graph, parameters), x, *others)

        policy = jax.checkpoint_policies.nothing_saveable if self.config.remat else _dear_to_compute
        unroll = self.config.num_layers if self.config.unroll_layers else 1
        # A loop keeps the recomputation apart by itself. Without one, and unless memory is short, the compiler may
        # keep what it likes: nothing has to be copied for it.
        step = jax.checkpoint(step, prevent_cse=self.config.remat and unroll > 1, policy=policy)
        return jax.lax.scan(step, x, (parameters, *of_layers), unroll=unroll)


@functools.partial(jax.jit, static_argnums=1)
def _per_layer(stacked: Any, layers: int) -> list[Any]:
    """Arrays with a leading layers axis, as a list of each layer's."""
    return [jax.tree.map(operator.itemgetter(index), stacked) for index in range(layers)]


def _dear_to_compute(primitive: Any, *operands: Any, **parameters: Any) -> bool:
    """What a layer keeps for its backward pass: matrix products and attention.

    Norms, rotations and activations are computed again, which costs less time than keeping them in the scan's stack
    (written, and read again) and half of the memory.
    """
    if primitive.name.startswith("dot_product_attention"):
        return True
    keeps = jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.save_only_these_names(RESIDUALS)
    )
    return keeps(primitive, *operands, **parameters)

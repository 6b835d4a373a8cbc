"""The one table of logical axes, and models that give the same numbers on every mesh."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from dmattn_jax.models import DogeConfig, DogeForCausalLM
from dmattn_jax.partitioning import (
    LOGICAL_AXES,
    MESH_AXES,
    axis_size,
    constrain,
    logical_to_spec,
    map_over_mesh,
    parameter,
)


def test_names_become_mesh_axes():
    assert logical_to_spec(("batch", None, "embed")[:2]) == PartitionSpec(("data", "fsdp"), None)
    assert logical_to_spec(("layers", "embed", "kv_heads", "head_dim")) == PartitionSpec(None, "fsdp", "tensor", None)
    assert logical_to_spec(("batch", "heads"), mesh_axes=("fsdp",)) == PartitionSpec("fsdp", None)
    assert {axis for axes in LOGICAL_AXES.values() for axis in axes} == set(MESH_AXES)


def test_table_refuses_collisions_and_unknown_names():
    with pytest.raises(ValueError, match="mesh axis 'tensor' would split both 'heads' and 'mlp'"):
        logical_to_spec(("heads", "mlp"))
    with pytest.raises(ValueError, match="mesh axis 'fsdp' would split both 'batch' and 'embed'"):
        logical_to_spec(("batch", None, "embed"))
    with pytest.raises(ValueError, match="unknown logical axis 'hidden': use one of batch, embed"):
        logical_to_spec(("hidden",))
    with pytest.raises(ValueError, match="names must name each axis"):
        parameter(jnp.zeros((2, 3)), ("embed",))


@pytest.mark.parametrize("experts", [0, 16])
def test_every_parameter_is_named_and_fits_the_table(experts):
    config = DogeConfig(num_experts=experts, num_experts_per_token=3, tie_embeddings=False)
    model = nnx.eval_shape(lambda: DogeForCausalLM(config, rngs=nnx.Rngs(0)))
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        names = variable.get_metadata("out_sharding")
        assert len(names) == variable.get_value().ndim, path
        assert (names[0] == "layers") == (path[0] == "blocks"), path
        logical_to_spec(names)


def test_nothing_changes_without_a_mesh():
    x = jnp.ones((3, 5))
    assert constrain(x, ("batch", None)) is x
    assert axis_size("batch") == 1
    assert map_over_mesh(lambda a: a + 1, [x], [("batch", None)], ("batch", None)).sum() == 30


def test_explicit_mesh_is_refused():
    mesh = jax.make_mesh((1, 1, 1), MESH_AXES, axis_types=(AxisType.Explicit,) * 3)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="make the mesh with axis_types"):
        axis_size("batch")


PROGRAM = """
import dataclasses, itertools
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from dmattn_jax.generation import generate
from dmattn_jax.models import DogeConfig, DogeForCausalLM
from dmattn_jax.nn.attend import attend_patterns
from dmattn_jax.partitioning import MESH_AXES, logical_to_spec
from pallas_kernels.patterns import Patterns, Places

assert jax.device_count() == 8
base = DogeConfig(vocab_size=64, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=8, num_kv_heads=4,
    head_dim=6, window=(5, 3, 7, 5), num_experts_per_token=3, dtype="float32", init_std=0.2)
ids = jnp.asarray(np.random.default_rng(0).integers(0, 64, (8, 17)), jnp.int32)
segments = jnp.asarray([[1] * 9 + [2] * 8] * 7 + [[1] * 12 + [0] * 5])
targets = jnp.where(segments == 0, -1, jnp.roll(ids, -1, axis=1))

for changes in KINDS:
    model = DogeForCausalLM(dataclasses.replace(base, **changes), rngs=nnx.Rngs(0))
    if changes["attention"] == "dma":
        model.blocks.attention.gate.A[...] = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)
    graph, state = nnx.split(model)
    step = jax.jit(jax.value_and_grad(lambda state, *batch: nnx.merge(graph, state).loss(*batch).loss))
    loss, gradient = step(state, ids, targets, segments)
    tokens = generate(model, [[1, 2, 3], [4]], max_new_tokens=5) if GENERATE else None
    for sizes in MESHES:
        mesh = jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3,
            devices=jax.devices()[: int(np.prod(sizes))])
        def place(v):
            spec = logical_to_spec(v.get_metadata("out_sharding"))
            return v.replace(jax.device_put(v[...], NamedSharding(mesh, spec)))
        placed = jax.tree.map(place, state, is_leaf=lambda v: isinstance(v, nnx.Variable))
        by_row = NamedSharding(mesh, logical_to_spec(("batch", None)))
        batch = [jax.device_put(a, by_row) for a in (ids, targets, segments)]
        with jax.set_mesh(mesh):
            other, slopes = step(placed, *batch)
            np.testing.assert_allclose(other, loss, rtol=1e-6, err_msg=str((changes, sizes)))
            for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(gradient), strict=True):
                small = 1e-6 + 1e-5 * np.abs(b).max()
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=small, err_msg=str((changes, sizes)))
            if GENERATE and sizes == MESHES[-1]:
                assert generate(nnx.merge(graph, placed), [[1, 2, 3], [4]], max_new_tokens=5) == tokens

# Eight devices cannot share four kv heads: each attends with all of them.
with jax.set_mesh(jax.make_mesh((1, 1, 8), MESH_AXES, axis_types=(AxisType.Auto,) * 3)):
    other, slopes = step(state, ids, targets, segments)
np.testing.assert_allclose(other, loss, rtol=1e-6)
for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(gradient), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 + 1e-5 * np.abs(b).max())

def masked(query, key, value, patterns):
    order = jnp.broadcast_to(jnp.arange(31), (4, 31))
    return attend_patterns(query, key, value, patterns, Places(order, jnp.zeros_like(order)))

random = np.random.default_rng(1)
inputs = [jnp.asarray(random.normal(size=(4, 31, heads, 5)), jnp.float32) for heads in (8, 4, 4)]
bits = [jnp.asarray(random.random(shape) < 0.3) for shape in ((8, 7, 7), (8, 9), (8, 13))]
patterns = Patterns(*bits, jnp.broadcast_to(jnp.arange(13, dtype=jnp.int32), (4, 13)), reach=9)
want = jax.jit(masked)(*inputs, patterns)
for sizes in ((2, 1, 4), (1, 1, 8)):
    with jax.set_mesh(jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3)):
        np.testing.assert_allclose(jax.jit(masked)(*inputs, patterns), want, rtol=1e-6)
print("same on every mesh")
"""


def run(kinds: list[dict], meshes: list[tuple[int, int, int]], *, generate: bool) -> str:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    program = f"KINDS, MESHES, GENERATE = {kinds}, {meshes}, {generate}\n" + textwrap.dedent(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_mesh_of_eight_gives_what_one_device_gives():
    assert "same on every mesh" in run([{"attention": "dma", "num_experts": 16}], [(2, 2, 2)], generate=False)


@pytest.mark.slow
def test_every_mesh_gives_what_one_device_gives():
    kinds = [{"attention": "dma"}, {"attention": "swa", "num_experts": 16}, {"attention": "mha"}]
    meshes = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (4, 1, 1), (1, 4, 1), (1, 1, 4), (8, 1, 1), (1, 8, 1), (2, 1, 4)]
    assert "same on every mesh" in run(kinds, meshes, generate=True)

"""Meshes of 1, 2, 4 and 8 devices: the same losses, and checkpoints that any other mesh can read."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from small_run import environment, small_config

from dmattn_jax.models.config import DogeConfig
from train.config import MeshConfig
from train.errors import MeshError
from train.mesh import AXES, check_batch, parameter_shardings, resolve_mesh, undivided_heads

MESHES = [(d, f, t) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) for t in (1, 2, 4, 8) if d * f * t <= 8]
REPRESENTATIVE = [(1, 1, 1), (2, 2, 2)]

LOSSES = """
import json, sys
import jax, jax.numpy as jnp, numpy as np, optax
from dmattn_jax.models.config import DogeConfig
from train import mesh, step
from train.config import MeshConfig, OptimizerConfig
from train.optimizer import make_optimizer
from train.parameters import make_skeleton

model = DogeConfig(vocab_size=37, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=16, num_kv_heads=8,
                   head_dim=4, attention=sys.argv[2], window=5, compression_block=2, selection_block=4,
                   selected_blocks=1, dtype="float32")
generator = np.random.default_rng(3)
tokens = generator.integers(0, 37, (16, 19)).astype(np.int32)
segments = np.sort(generator.integers(0, 3, (16, 19)), axis=-1).astype(np.int32)
same = (segments[..., 1:] == segments[..., :-1]) & (segments[..., 1:] > 0)
targets = np.full_like(tokens, -1)
targets[..., :-1] = np.where(same, tokens[..., 1:], -1)
results = {}
for sizes in json.loads(sys.argv[1]):
    device_mesh = mesh.make_mesh(MeshConfig(*sizes))
    skeleton = make_skeleton(model)
    schedule = optax.constant_schedule(0.02)
    optimizer = make_optimizer(OptimizerConfig(), schedule, skeleton.decay_mask())
    with jax.set_mesh(device_mesh):
        abstract = step.abstract_state(skeleton, optimizer, device_mesh)
        state = step.initial_state(skeleton, optimizer, abstract, 0)
        train_step = step.make_train_step(skeleton, optimizer, schedule, abstract, device_mesh, 2)
        losses = []
        for _ in range(3):
            batch = {"tokens": tokens, "targets": targets, "segment_ids": segments}
            state, metrics = train_step(state, mesh.global_batch(batch, device_mesh))
            losses.append([float(metrics["loss"]), float(metrics["gradient_norm"])])
        for name, leaf in state.params.items():
            assert leaf.sharding.is_equivalent_to(abstract.params[name].sharding, leaf.ndim), name
    results[str(tuple(sizes))] = losses
print(json.dumps(results))
"""


def losses_on(meshes, attention="dma"):
    child = subprocess.run(
        [sys.executable, "-c", LOSSES, json.dumps(meshes), attention],
        env=environment(8),
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout.splitlines()[-1])


def assert_losses_agree(meshes, attention="dma"):
    results = losses_on(meshes, attention)
    expected = np.array(results["(1, 1, 1)"])
    assert expected[-1, 0] < expected[0, 0]
    for name, losses in results.items():
        np.testing.assert_allclose(losses, expected, rtol=2e-5, err_msg=name)


def test_meshes_give_the_losses_of_one_device():
    assert_losses_agree(REPRESENTATIVE)


@pytest.mark.slow
def test_meshes_give_the_losses_of_one_device_with_native_sparse_attention():
    assert_losses_agree(REPRESENTATIVE, "nsa")


@pytest.mark.slow
def test_every_mesh_of_1_2_4_8_devices_gives_the_losses_of_one():
    assert_losses_agree(MESHES)


RESUME = """
import sys
from dataclasses import replace
from pathlib import Path
from train import config_json
from train.config import MeshConfig
from train.loop import run

config = config_json.load(Path(sys.argv[1]))
for steps, mesh in ((4, MeshConfig(2, 2, 2)), (6, MeshConfig(1, 2, 1)), (8, MeshConfig(1, 1, 2))):
    print(run(replace(config, steps=steps, mesh=mesh)).step)
"""


@pytest.mark.slow
def test_a_run_of_8_devices_resumes_on_2_and_goes_on_as_if_nothing_had_been(tmp_path):
    from train.config_json import to_json
    from train.loop import run
    from train.metrics_file import read_metrics

    config = small_config(tmp_path, "moving")
    # a constant rate: the steps of the parts would each have a schedule of their own
    flat = replace(config.optimizer, warmup_fraction=0.0, decay_fraction=0.0)
    config = replace(config, optimizer=flat, log=replace(config.log, eval_every=100))
    path = tmp_path / "moving.json"
    path.write_text(to_json(config))
    child = subprocess.run(
        [sys.executable, "-c", RESUME, str(path)], env=environment(8), capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr[-3000:]
    run(replace(config, name="staying", steps=8))
    moving, staying = (read_metrics(tmp_path / "runs" / name / "metrics.csv") for name in ("moving", "staying"))
    assert [row["step"] for row in moving] == [row["step"] for row in staying]
    for one, other in zip(moving[1:], staying[1:], strict=True):
        assert float(one["loss"]) == pytest.approx(float(other["loss"]), rel=1e-5)


CHECKPOINTS = """
import sys
import jax, jax.numpy as jnp, numpy as np
from pathlib import Path
from train import mesh
from train.checkpoint import CheckpointWriter
from train.config import MeshConfig
from train.mesh import parameter_shardings

axes = {"wide": ("embed", "mlp"), "heads": ("layers", "embed", "kv_heads", "head_dim"), "norm": ("embed",)}
values = {"wide": np.arange(64.0).reshape(8, 8), "norm": np.arange(7.0)}
values["heads"] = np.arange(3 * 8 * 2 * 5.0).reshape(3, 8, 2, 5)

def on(*sizes):
    return parameter_shardings(axes, values, mesh.make_mesh(MeshConfig(*sizes)))

writer = CheckpointWriter(Path(sys.argv[1]), 9, print)
for step, sizes in enumerate([(1, 8, 1), (2, 2, 2), (4, 1, 2), (1, 1, 1)]):
    params = jax.tree.map(jax.device_put, values, on(*sizes))
    writer.save(step, params, {"moments": params}, {}, None)
writer.wait()
for step in range(4):
    for sizes in [(1, 2, 1), (1, 1, 2), (1, 1, 1), (2, 4, 1), (1, 4, 2)]:
        target = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, jnp.float32, sharding=s), values, on(*sizes))
        params, rest, _ = writer.restore(step, target, {"moments": target})
        for tree in (params, rest["moments"]):
            for name, leaf in tree.items():
                assert leaf.sharding == target[name].sharding
                np.testing.assert_array_equal(np.asarray(leaf), values[name])
writer.close()
print("bitwise")
"""


def test_checkpoints_move_between_meshes_bitwise(tmp_path):
    child = subprocess.run(
        [sys.executable, "-c", CHECKPOINTS, str(tmp_path)],
        env=environment(8),
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    assert child.stdout.splitlines()[-1] == "bitwise"


@pytest.mark.parametrize(
    ("config", "count", "sizes"),
    [
        (MeshConfig(), 1, (1, 1, 1)),
        (MeshConfig(), 8, (8, 1, 1)),
        (MeshConfig(data=2, fsdp=-1), 8, (2, 4, 1)),
        (MeshConfig(tensor=2), 6, (3, 1, 2)),
        (MeshConfig(data=1, fsdp=2), 8, (1, 2, 1)),
    ],
)
def test_meshes_take_what_is_left(config, count, sizes):
    assert resolve_mesh(config, count) == sizes


@pytest.mark.parametrize(
    ("config", "count", "words"),
    [
        (MeshConfig(fsdp=3), 8, "cannot be divided by 3"),
        (MeshConfig(data=4, fsdp=4), 8, "needs 16 devices, and this run sees 8"),
        (MeshConfig(data=-1, fsdp=-1), 8, "at most one"),
        (MeshConfig(tensor=0), 8, r"mesh\.tensor must be >= 1"),
    ],
)
def test_meshes_that_cannot_be(config, count, words):
    with pytest.raises(MeshError, match=words):
        resolve_mesh(config, count)


def test_a_batch_that_cannot_be_split_names_one_that_can():
    with pytest.raises(MeshError, match="take a multiple of 6, for example --batch-size 12"):
        check_batch(13, accumulate=2, shards=3)
    check_batch(12, accumulate=2, shards=3)


def test_heads_that_the_tensor_axis_does_not_divide_are_told_of():
    assert undivided_heads(DogeConfig(num_kv_heads=1), 1) is None
    assert "mesh.tensor 4 does not divide model.num_kv_heads 1" in undivided_heads(DogeConfig(num_kv_heads=1), 4)


def test_a_dimension_that_does_not_divide_stays_whole():
    mesh = AbstractMesh((2, 3, 4), AXES)
    axes = {"table": ("vocab", "embed"), "odd": ("vocab", "embed"), "bare": ()}
    shapes = {
        "table": jax.ShapeDtypeStruct((8, 9), float),
        "odd": jax.ShapeDtypeStruct((7, 9), float),
        "bare": jax.ShapeDtypeStruct((5,), float),
    }
    specs = {name: sharding.spec for name, sharding in parameter_shardings(axes, shapes, mesh).items()}
    assert specs["table"] == PartitionSpec("tensor", "fsdp")
    assert specs["odd"] == PartitionSpec(None, "fsdp")
    assert specs["bare"] == PartitionSpec(None)

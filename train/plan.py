"""What a run would need, by abstract compilation: parameters, operations and memory, with nothing allocated.

The step is compiled for a mesh of CPU devices in a process of its own (`python -m train.plan` reads a configuration
on stdin and writes JSON), so a mesh larger than this machine can be planned. What is exact on any device: the
bytes of parameters, optimizer state and batch. The compiler's temporary memory is that of the CPU's program, or, for a
TPU topology that is named, that of the real TPU program: libtpu compiles without a TPU.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from train import config_json
from train.config import TrainConfig
from train.errors import ConfigError, MeshError, MissingExtraError, UserError


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes per device.

    parameters, optimizer, batch: what a device holds of each. gradients: as large as its parameters.
    temporary: activations and gradients together, as the compiler for `compiled_for` lays them out.
    """

    devices: int
    batch_size: int
    steps: int
    tokens: int
    learning_rate: float
    parameters: int
    optimizer: int
    batch: int
    temporary: int
    compiled_for: str = "CPU"

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.batch + self.temporary


def planned_devices(config: TrainConfig) -> int:
    """Devices of the planned mesh; an axis of -1 counts as 1."""
    return math.prod(size for size in dataclasses.astuple(config.mesh) if size != -1)


def plan_memory(config: TrainConfig, topology: str | None = None) -> MemoryPlan:
    """Compiles the training step for the configuration's mesh in another process. Raises what a run would raise.

    topology: a TPU topology such as `v5e:2x2` whose compiler to use; None for the CPU's.
    """
    count = planned_devices(config)
    if count < 1:
        raise MeshError(f"mesh sizes must be >= 1 or -1, got {dataclasses.asdict(config.mesh)}")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    # Without a TPU there is no metadata server to ask, and nothing that its lock would protect.
    for_tpu = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"} if topology else {}
    child = subprocess.run(
        [sys.executable, "-m", "train.plan", *([topology] if topology else [])],
        input=config_json.to_json(config),
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip(), **for_tpu},
        check=False,
    )
    if child.returncode == UserError.exit_code:
        raise ConfigError(child.stderr.strip().splitlines()[-1])
    if child.returncode:
        raise RuntimeError(f"the abstract compilation failed:\n{child.stderr}")
    return MemoryPlan(**json.loads(child.stdout.splitlines()[-1]))


def compile_step(config: TrainConfig, devices: Sequence[Any] | None = None) -> tuple[MemoryPlan, Any]:
    """The plan for this process's devices, or for those of a topology that is not here, and the compiled step.

    Nothing of the model is allocated.
    """
    import jax
    import jax.numpy as jnp

    from train import mesh, step
    from train.optimizer import make_optimizer, make_schedule
    from train.parameters import make_skeleton
    from train.resolve import resolve

    device_mesh = mesh.make_mesh(config.mesh, devices)
    shards = mesh.batch_shards(device_mesh)
    numbers = resolve(config, shards)
    mesh.check_batch(numbers.batch_size, config.accumulate, shards)
    with jax.set_mesh(device_mesh):
        skeleton = make_skeleton(config.model)
        schedule = make_schedule(config.optimizer, numbers.learning_rate, numbers.steps)
        optimizer = make_optimizer(config.optimizer, schedule, skeleton.decay_mask())
        state = step.abstract_state(skeleton, optimizer, device_mesh)
        row = jax.ShapeDtypeStruct(
            (numbers.batch_size, config.sequence_length), jnp.int32, sharding=mesh.batch_sharding(device_mesh)
        )
        batch = dict.fromkeys(("tokens", "targets", "segment_ids"), row)
        train_step = step.make_train_step(skeleton, optimizer, schedule, state, device_mesh, config.accumulate)
        compiled = train_step.lower(state, batch).compile()
    plan = MemoryPlan(
        devices=device_mesh.size,
        batch_size=numbers.batch_size,
        steps=numbers.steps,
        tokens=numbers.tokens,
        learning_rate=numbers.learning_rate,
        parameters=bytes_on_a_device(state.params),
        optimizer=bytes_on_a_device(state.optimizer),
        batch=bytes_on_a_device(batch),
        temporary=compiled.memory_analysis().temp_size_in_bytes,
        compiled_for=devices[0].device_kind if devices else "CPU",
    )
    return plan, compiled


def bytes_on_a_device(tree: Any) -> int:
    """Bytes that one device holds of abstract arrays with shardings."""
    import jax

    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def describe(config: TrainConfig, memory: MemoryPlan) -> str:
    """The plan as text."""
    from train import flops, mesh

    count = flops.count_parameters(config.model)
    token = flops.training_flops_per_token(config.model, config.sequence_length)
    total = token.total * memory.tokens
    lines = [
        f"{config.name}: {config.model.attention}, window {config.model.window}, "
        f"sequences of {config.sequence_length:,}",
        f"  parameters        {count.total / 1e6:12,.2f} M",
        f"    no embeddings   {count.non_embedding / 1e6:12,.2f} M",
    ]
    if count.inactive:
        lines.append(f"    a token uses    {count.active / 1e6:12,.2f} M")
    lines += [
        f"  FLOPs per token   {token.total / 1e6:12,.2f} M   (forward and backward)",
        f"    6 N             {token.parameters / 1e6:12,.2f} M",
        f"    logits          {token.logits / 1e6:12,.2f} M",
        f"    attention       {token.attention / 1e6:12,.2f} M",
        f"  steps             {memory.steps:12,} of {memory.batch_size:,} sequences",
        f"  tokens            {memory.tokens / 1e6:12,.1f} M",
        f"  FLOPs in all      {total:12.3g}   ({_days(total)})",
        f"  learning rate     {memory.learning_rate:12.3g}",
        f"  memory on each of {memory.devices} device{'s' if memory.devices > 1 else ''}",
        f"    parameters      {memory.parameters / 2**20:12,.1f} MiB",
        f"    optimizer       {memory.optimizer / 2**20:12,.1f} MiB",
        f"    batch           {memory.batch / 2**20:12,.1f} MiB",
        f"    temporary       {memory.temporary / 2**20:12,.1f} MiB  "
        f"(gradients and activations, compiled for {memory.compiled_for})",
        f"    together        {memory.total / 2**20:12,.1f} MiB",
    ]
    if note := mesh.undivided_heads(config.model, config.mesh.tensor):
        lines.append(f"  note: {note}")
    return "\n".join(lines)


def _days(total: float) -> str:
    from train.flops import PEAK_BF16_FLOPS

    hours = total / (0.4 * PEAK_BF16_FLOPS["H100"]) / 3600
    return f"{hours:,.2f} hours of one H100 at 40% MFU"


def compile_for_topology(config: TrainConfig, topology: str) -> MemoryPlan:
    """`compile_step` for the first devices of a TPU topology. Raises ConfigError where there is no such topology, or
    the step does not fit in its memory, and MissingExtraError without libtpu."""
    import jax
    from jax.experimental import topologies

    from pallas_kernels.tpu.config import compiling_for

    if importlib.util.find_spec("libtpu") is None:
        raise MissingExtraError("--topology needs the TPU compiler: pip install 'dmattn-jax[tpu]'")
    try:
        devices: list[Any] = list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"topology {topology!r} is not one like v5e:2x2 or v5p:2x2x1: {_one_line(error)}") from None
    try:
        with compiling_for(devices[0].device_kind):
            return compile_step(config, devices)[0]
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ConfigError(
            f"the step does not fit on {topology}: {_one_line(error)}; "
            "try --model.remat, a smaller --batch-size, --accumulate or more devices"
        ) from None


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]


def main() -> int:
    try:
        config = config_json.from_json(sys.stdin.read(), "the configuration")
        result = compile_for_topology(config, sys.argv[1]) if sys.argv[1:] else compile_step(config)[0]
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(dataclasses.asdict(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

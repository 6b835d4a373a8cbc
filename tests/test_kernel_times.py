"""Kernels of a profile, filed under the parts of the program that launched them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from benchmarks.kernel_times import Kernel, breakdown, kernels_of, part_of, profile

PROGRAM = """
ENTRY %main (p: f32[3]) -> f32[3] {
  %gemm_fusion_dot.7 = bf16[3,5]{1,0} fusion(%p), metadata={op_name="jit(step)/jvp(mlp)/dot_general"}
  %loop_multiply_fusion.2 = bf16[3,5]{1,0} fusion(%p), metadata={op_name="jit(step)/transpose(jvp(mlp))/mul"}
  %mpmd_map.4 = bf16[3,5]{1,0} custom-call(%p), metadata={op_name="jit(step)/interval_attention/entry/mpmd_map"}
  %mpmd_map.5 = s32[5]{0} custom-call(%p), metadata={op_name="jit(step)/interval_attention/select_keys/mpmd_map"}
  ROOT %loop_fusion = f32[3]{0} fusion(%p), metadata={op_name="jit(step)/interval_attention/select_n"}
}
"""


def test_kernels_are_filed_by_part():
    kernels = [
        Kernel("loop_fusion", "loop_fusion", 7.0, 0.5),
        Kernel("gemm_fusion_dot.7", "nvjet_tst_128x128", 1.0, 2.0),
        # Beside the product, on another stream: no idle time before it.
        Kernel("command_buffer_1", "loop_multiply_fusion_2", 2.0, 2.0),
        Kernel("command_buffer_1", "attention_forward_mosaic_gpu_kernel", 5.0, 1.0),
        Kernel("command_buffer_1", "gathers_mosaic_gpu_kernel", 6.0, 0.25),
        Kernel("mpmd_map.5", "gathers_mosaic_gpu_kernel", 6.25, 0.25),
        Kernel("", "MemcpyD2D", 6.5, 0.25),
        Kernel("copy.3", "wrapped_copy", 7.5, 0.125),
    ]
    found = breakdown(kernels, PROGRAM)
    assert found.milliseconds == {
        "matrix products": 2000, "mlp": 2000, "attention": 1000, "lists": 500, "around attention": 500,
        "copies": 250, "other": 125,
    }  # fmt: skip
    assert found.kernels["lists"] == 2
    assert sum(found.kernels.values()) == len(kernels)
    # Between 4 and 5, and between 6.75 and 7.
    assert found.idle == pytest.approx(1250)
    assert found.slowest[:3] == [
        ("matrix products", "nvjet_tst_128x128", 2000.0), ("mlp", "loop_multiply_fusion", 2000.0),
        ("attention", "attention_forward_mosaic_gpu_kernel", 1000.0),
    ]  # fmt: skip
    twice = breakdown([*kernels, *(replace(kernel, start=kernel.start + 7) for kernel in kernels)], PROGRAM, runs=2)
    assert twice.milliseconds == found.milliseconds
    assert twice.kernels == found.kernels
    # Each, and what lies between the runs.
    assert twice.idle == pytest.approx(1250 + 375 / 2)


@pytest.mark.parametrize(
    ("operation", "kernel", "part"),
    [
        ("custom-call.3", "cudnn_generated_fort_native_sdpa_sm90_flash_bprop", "attention"),
        ("custom-call.3", "nvjet_hsh_192x192_64x4", "matrix products"),
        ("", "void cutlass::Kernel2<cutlass_80_tensorop>", "matrix products"),
        ("loop_add_fusion", "loop_add_fusion", "other"),
        ("dynamic_slice_fusion.2", "head_gradients_mosaic_gpu_kernel", "norm"),
    ],
)
def test_kernels_of_libraries(operation, kernel, part):
    assert part_of(operation, kernel, "") == part


def test_gradients_of_the_residual_stream_are_a_norms():
    where = "jit(step)/transpose(jvp())/eval_jaxpr/checkpoint/"
    assert part_of("input_add_reduce_fusion", "input_add_reduce_fusion", where + "add_any") == "norm"
    assert part_of("loop_add_fusion", "loop_add_fusion", where + "gate/add_any") == "gate"
    assert part_of("loop_add_fusion", "loop_add_fusion", "jit(step)/jvp()/eval_jaxpr/add") == "other"


def test_kernels_are_read_from_the_streams_of_gpus():
    space = ProfileData.text_proto_to_serialized_xspace("""
planes {
  name: "/device:GPU:0"
  event_metadata { key: 1 value { id: 1 name: "loop_fusion_3" } }
  stat_metadata { key: 2 value { id: 2 name: "hlo_op" } }
  lines { name: "Stream #13(Compute)" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 2000000 duration_ps: 5000000
      stats { metadata_id: 2 str_value: "loop_fusion.3" } }
    events { metadata_id: 1 offset_ps: 9000000 duration_ps: 1000000 } }
  lines { name: "XLA Ops" timestamp_ns: 1000 events { metadata_id: 1 offset_ps: 2000000 duration_ps: 5000000 } }
}
planes { name: "/host:CPU" event_metadata { key: 1 value { id: 1 name: "python" } }
  lines { name: "Stream #1" events { metadata_id: 1 duration_ps: 5000000 } } }
""")
    found = list(kernels_of(ProfileData.from_serialized_xspace(space)))
    assert [(kernel.operation, kernel.name) for kernel in found] == [
        ("loop_fusion.3", "loop_fusion_3"), ("", "loop_fusion_3"),
    ]  # fmt: skip
    assert found[0].start == pytest.approx(3e-6)
    assert [kernel.seconds for kernel in found] == pytest.approx([5e-6, 1e-6])


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="for a machine without a GPU")
def test_a_machine_without_a_gpu_has_no_breakdown():
    compiled = jax.jit(jnp.sin).lower(jnp.ones(7)).compile()
    assert profile(lambda: compiled(jnp.ones(7)).block_until_ready(), compiled.as_text()) is None

"""Inputs that try to break things, and the float64 truth to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from dmattn_jax.attention import dynamic_mask_attention
from dmattn_jax.oracle import attention_oracle
from pallas_kernels import IMPLEMENTATIONS

GATES = ("random", "tied", "rising", "falling", "walk", "rounded", "holes")
NAMES = ("out", "dquery", "dkey", "dvalue", "dgate")

# Reliability bars: RMS error over RMS of the truth, per dtype.
RATIO = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 5e-3}
# And 100% of elements, over the truth's largest.
EACH = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


def make_gate(kind: str, rng: np.random.Generator, batch: int, length: int, heads: int) -> np.ndarray:
    """A float32 gate [B, S, K] of the named kind; every value is exact in float32, so ties are ties everywhere."""
    shape = (batch, length, heads)
    ramp = np.broadcast_to(np.arange(length)[None, :, None] / max(length, 1), shape)
    noise = rng.standard_normal(shape)
    made = {
        "random": lambda: 2 * noise,
        "tied": lambda: np.ones(shape),
        "rising": lambda: 3 * ramp,
        "falling": lambda: -3 * ramp,
        "walk": lambda: 0.2 * np.cumsum(noise, axis=1),
        "rounded": lambda: np.round(noise),
        "holes": lambda: np.where(rng.random(shape) < 0.3, -np.inf, np.round(2 * noise) / 2),
    }[kind]()
    return made.astype(np.float32)


def make_segments(kind: str, rng: np.random.Generator, batch: int, length: int) -> np.ndarray | None:
    """segment_ids [B, S] int32: none, packed documents, packed with padding, padded left, right, or inside."""
    if kind == "none":
        return None
    ids = np.sort(rng.integers(1, 4, (batch, length)), axis=1)
    position = np.arange(length)
    cut = rng.integers(0, length + 1, (batch, 1))
    made = {
        "packed": lambda: ids,
        "right": lambda: np.where(position < cut, ids, 0),
        "left": lambda: np.where(position >= cut, ids, 0),
        "inside": lambda: np.where(rng.random(ids.shape) < 0.25, 0, ids),
        "returning": lambda: rng.integers(0, 3, ids.shape),
        "empty": lambda: np.zeros_like(ids),
    }[kind]()
    return made.astype(np.int32)


@dataclass(frozen=True)
class Case:
    """One call of attention and a cotangent; arrays are float64 numpy, the gate exact in float32."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    gate: np.ndarray
    cotangent: np.ndarray
    window: int | Sequence[int]
    segment_ids: np.ndarray | None = None
    options: dict = field(default_factory=dict)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.query, self.key, self.value, self.gate


def make_case(
    *,
    batch: int = 2,
    queries: int | None = None,
    keys: int = 131,
    kv_heads: int = 3,
    group: int = 2,
    dim: int = 24,
    window: int | Sequence[int] = 17,
    gate: str = "random",
    segments: str = "none",
    seed: int = 0,
    **options,
) -> Case:
    """Distinct sizes on every axis by default, so that a swapped axis cannot pass."""
    rng = np.random.default_rng(seed)
    queries = keys if queries is None else queries
    shape = (batch, queries, kv_heads * group, dim)
    return Case(
        query=rng.standard_normal(shape),
        key=rng.standard_normal((batch, keys, kv_heads, dim)),
        value=rng.standard_normal((batch, keys, kv_heads, dim)),
        gate=make_gate(gate, rng, batch, keys, kv_heads),
        cotangent=rng.standard_normal(shape),
        window=window,
        segment_ids=make_segments(segments, rng, batch, keys),
        options=options,
    )


def rounded(case: Case, dtype: str) -> Case:
    """The case with its arrays rounded to dtype: error is then of the arithmetic, not of the inputs."""
    query, key, value, cotangent = (
        np.asarray(jnp.asarray(array, jnp.float32).astype(dtype).astype(jnp.float32), np.float64)
        for array in (case.query, case.key, case.value, case.cotangent)
    )
    return Case(query, key, value, case.gate, cotangent, case.window, case.segment_ids, case.options)


def _output_and_gradients(attention, window, options, arrays, segment_ids, cotangent):
    out, pull = jax.vjp(
        lambda *args: attention(*args, window=window, segment_ids=segment_ids, **dict(options)), *arrays
    )
    return (out, *pull(cotangent))


_compiled = jax.jit(_output_and_gradients, static_argnums=(0, 1, 2))
_optimised = jax.jit(
    _output_and_gradients, static_argnums=(0, 1, 2), compiler_options={"xla_backend_optimization_level": 3}
)


def run(
    case: Case, dtype: str = "float32", attention=dynamic_mask_attention, *, optimised: bool = False, **options
) -> list[np.ndarray]:
    """[out, dquery, dkey, dvalue, dgate] of the case in dtype, as numpy arrays of the dtype they come in.

    optimised: compile as users do, where a test is about the last bit and the quick compilation of tests rounds a
    repeated product otherwise than its first copy.
    """
    gate_dtype = "float64" if dtype == "float64" else "float32"
    arrays = tuple(jnp.asarray(array, dtype) for array in case.arrays[:3])
    arrays = (*arrays, jnp.asarray(case.gate, gate_dtype))
    segment_ids = None if case.segment_ids is None else jnp.asarray(case.segment_ids)
    window = case.window if isinstance(case.window, int) else tuple(case.window)
    static = tuple(sorted({**case.options, **options}.items()))
    cotangent = jnp.asarray(case.cotangent, dtype)
    results = (_optimised if optimised else _compiled)(attention, window, static, arrays, segment_ids, cotangent)
    return [np.asarray(result) for result in results]


def truth(case: Case, attention=attention_oracle, **options) -> list[np.ndarray]:
    """The same by the dense oracle in float64."""
    with jax.enable_x64(True):
        return run(case, "float64", attention, **options)


def rms_ratio(got: np.ndarray, want: np.ndarray) -> float:
    """RMS of the error over the RMS of the truth; inf where the truth is 0 and the result is not."""
    error = np.sqrt(np.mean((np.asarray(got, np.float64) - want) ** 2))
    size = np.sqrt(np.mean(want**2))
    if not np.isfinite(error):
        return float("inf")
    return float(error / size) if size else (0.0 if error == 0 else float("inf"))


def assert_close(
    got: list[np.ndarray], want: list[np.ndarray], *, ratio: float, each: float, zero: float = 0.0
) -> None:
    """Every tensor within an RMS ratio, and 100% of its elements within `each` of the truth's largest value.

    zero: what may stand where the truth of a whole tensor is 0.
    """
    for name, left, right in zip(NAMES, got, want, strict=False):
        assert left.shape == right.shape, f"{name}: {left.shape} for {right.shape}"
        if not right.any():
            assert np.abs(left).max() <= zero, f"{name}: {np.abs(left).max():.2e} where the truth is 0"
            continue
        assert rms_ratio(left, right) <= ratio, f"{name}: RMS ratio {rms_ratio(left, right):.2e} > {ratio:.0e}"
        error = np.abs(np.asarray(left, np.float64) - right)
        bound = each * max(np.abs(right).max(), 1e-30)
        assert (error <= bound).all(), f"{name}: {error.max():.2e} > {bound:.2e} at {np.argmax(error)}"


def dtype_of(implementation: str, dim: int = 24) -> str:
    """The most precise type that the implementation takes."""
    return next(d for d in RATIO if not IMPLEMENTATIONS[implementation].unsupported(jnp.dtype(d), dim))


def check(case: Case, implementation: str) -> None:
    """The implementation, in its most precise type, against float64: values and gradients within the bars."""
    dtype = dtype_of(implementation)
    case = rounded(case, dtype)
    got = run(case, dtype, implementation=implementation)
    assert_close(got, truth(case), ratio=RATIO[dtype], each=EACH[dtype], zero=residue(case, dtype))


def residue(case: Case, dtype: str) -> float:
    """What half precision may leave of dp − Σ dout·out where one key has all the weight; float32 leaves nothing."""
    if dtype == "float32":
        return 0.0
    return float(jnp.finfo(dtype).eps) * float(np.abs(case.value).max() * np.abs(case.cotangent).max())


def check_hidden_numbers(implementation: str, window: int, packed: bool) -> None:
    """What is hidden by a gate, as padding, or in another document may be so large that its products are infinite."""
    case = rounded(make_case(batch=1, keys=131, kv_heads=2, dim=64, window=window, gate="holes"), "bfloat16")
    ids = np.repeat([1, 0, 2], [50, 20, 61])[None].astype(np.int32) if packed else None
    case = Case(*case.arrays, case.cotangent, window, ids)
    hidden, kept = np.isneginf(case.gate), slice(None)
    if packed:
        hidden, kept = hidden | (ids != 2)[..., None], slice(70, None)
    # Of one sign, so that infinities add up.
    arrays = [np.where(hidden[..., None], 3e38, np.abs(array)) for array in (case.key, case.value)]
    clean, large = (
        run(
            Case(np.abs(case.query), *pair, case.gate, case.cotangent, window, ids),
            "bfloat16",
            implementation=implementation,
        )
        for pair in ([np.where(hidden[..., None], 0, array) for array in arrays], arrays)
    )
    for name, left, right in zip(NAMES, large, clean, strict=True):
        assert np.isfinite(np.asarray(right, np.float32)).all()
        np.testing.assert_array_equal(left[:, kept], right[:, kept], err_msg=name)


def check_gates_of_any_size(implementation: str, window: int) -> None:
    """Only −inf hides, and only +inf and NaN make NaN."""
    case = rounded(make_case(batch=1, keys=37, kv_heads=2, dim=64, window=window), "bfloat16")
    most = float(np.finfo(np.float32).max)
    one = np.zeros_like(case.gate)
    one[0, 5] = most
    for gate in (np.full_like(case.gate, -1e31), np.full_like(case.gate, -most), np.full_like(case.gate, most), one):
        large = Case(case.query, case.key, case.value, gate, case.cotangent, window)
        got = run(large, "bfloat16", implementation=implementation)[:1]
        assert_close(got, truth(large)[:1], ratio=RATIO["bfloat16"], each=EACH["bfloat16"])

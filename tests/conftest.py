"""Test session set-up: run-time shape checks, quick compilation, one logged random seed for the property tests."""

from __future__ import annotations

import glob
import importlib.util
import os
import secrets
import shutil
from pathlib import Path

import jax
import pytest
import quick_compilation
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray
from jaxtyping import install_import_hook

# Shapes in annotations are checked in every module whose own errors do not come first.
install_import_hook(
    [
        "pallas_kernels.vjp",
        "pallas_kernels.xla",
        "dmattn_jax.documents",
        "dmattn_jax.layout",
        "dmattn_jax.oracle",
    ],
    "beartype.beartype",
)


MOST_COMPILED = 1 << 30
"""Bytes of compiled programs that sessions leave to later ones."""


def pytest_configure(config: pytest.Config) -> None:
    # Not before the hook above: it would come too late for what this imports.
    from train.experiments.jobs import visible_gpus

    # Workers of pytest-xdist inherit the environment, so all of them draw from the seed in the report's header.
    seed = os.environ.setdefault("DMATTN_TEST_SEED", str(secrets.randbits(32)))
    if config.getoption("hypothesisseed", None) is None:
        config.option.hypothesisseed = int(seed)
    # The TPU compiler is installed for the tests that compile; without a TPU, looking for one only costs messages and a
    # lock that other processes may hold.
    if importlib.util.find_spec("libtpu") and not (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*")):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Workers share the GPUs of the machine, one each.
    worker, gpus = os.environ.get("PYTEST_XDIST_WORKER", ""), visible_gpus(os.environ)
    if worker and len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[int(worker.removeprefix("gw")) % len(gpus)]
    # The default tests are nearly all compilation, so they compile without optimisation; the slow ones compile as a
    # user does. Workers and child processes inherit this; whoever sets XLA_FLAGS decides for himself.
    if "not slow" in config.option.markexpr:
        os.environ.setdefault("XLA_FLAGS", quick_compilation.FLAGS)
    # Each program is compiled once, for all workers, child processes and later sessions.
    if hasattr(config, "cache"):
        _keep_compiled_programs(config.cache.mkdir("compiled"))


def _keep_compiled_programs(folder: Path) -> None:
    if sum(path.stat().st_size for path in folder.iterdir()) > MOST_COMPILED:
        shutil.rmtree(folder)
    for name, value in (
        ("jax_compilation_cache_dir", str(folder)),
        ("jax_persistent_cache_min_compile_time_secs", 0.0),
        ("jax_persistent_cache_min_entry_size_bytes", -1),
    ):
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs():
    """Thousands of programs would otherwise stay mapped, and Linux limits a process's mappings."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _short_rows_have_lists(monkeypatch):
    """The Hopper kernels leave short rows as they lie; tests of lists, which are of short rows, would be of none."""
    monkeypatch.setattr("pallas_kernels.gpu.config.SHORT_ROW", 0)


@pytest.fixture
def float32_products():
    """Products of float32 that round as float32: a GPU takes TF32 where nothing is said, if it finds that faster."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def only_signed_integers(monkeypatch):
    """Fails a test that lowers a Mosaic GPU kernel in which integers are treated as unsigned. None of ours is; but the
    lowering forgets it where a selection's first choice is a number, and would put negative gates above positive ones.
    """
    found = []
    for name in ("__lt__", "__le__", "__gt__", "__ge__", "__floordiv__", "__mod__", "max", "min", "reduce"):
        operation = getattr(FragmentedArray, name)

        def recorded(self, *args, operation=operation, name=name, **options):
            if self.is_signed is False and self.mlir_dtype.width > 1:
                found.append(f"{name} of {self.shape}")
            return operation(self, *args, **options)

        monkeypatch.setattr(FragmentedArray, name, recorded)
    yield
    assert not found


def pytest_report_header(config: pytest.Config) -> str:
    return f"property tests: --hypothesis-seed={config.option.hypothesisseed}"

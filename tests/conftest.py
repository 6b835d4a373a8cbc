"""Test session set-up: run-time shape checks, and one logged random seed for the property tests."""

from __future__ import annotations

import os
import secrets

import pytest
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


def pytest_configure(config: pytest.Config) -> None:
    # Workers of pytest-xdist inherit the environment, so all of them draw from the seed in the report's header.
    seed = os.environ.setdefault("DMATTN_TEST_SEED", str(secrets.randbits(32)))
    if config.getoption("hypothesisseed", None) is None:
        config.option.hypothesisseed = int(seed)


def pytest_report_header(config: pytest.Config) -> str:
    return f"property tests: --hypothesis-seed={config.option.hypothesisseed}"

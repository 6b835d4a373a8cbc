"""The same inputs give bitwise the same outputs and gradients, run after run and process after process."""

import hashlib
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from reference import dtype_of, make_case, run

from pallas_kernels import IMPLEMENTATIONS


def fingerprint(implementation: str) -> str:
    case = make_case(gate="rounded", segments="inside")
    digest = hashlib.sha256()
    for result in run(case, dtype_of(implementation), implementation=implementation):
        digest.update(np.ascontiguousarray(result).tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("implementation", [name for name, it in IMPLEMENTATIONS.items() if it.unavailable() is None])
def test_bitwise_equal_across_processes(implementation):
    environment = dict(os.environ)
    if implementation == "xla" and jax.default_backend() == "gpu":
        # XLA's products are those that were fastest when this process tried them; with the flag the first that can.
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"
        environment["XLA_FLAGS"] = flags.strip()
    call = f"fingerprint({implementation!r})"
    found = []
    for _ in range(2):
        process = subprocess.run(
            [sys.executable, "-c", f"from test_determinism import fingerprint; print({call}, {call})"],
            capture_output=True,
            text=True,
            check=True,
            cwd=os.path.dirname(__file__),
            env=environment,
        )
        found += process.stdout.split()
    assert len(found) == 4
    assert len(set(found)) == 1

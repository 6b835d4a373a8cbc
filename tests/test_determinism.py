"""The same inputs give bitwise the same outputs and gradients, run after run and process after process."""

import hashlib
import os
import subprocess
import sys

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
    here = fingerprint(implementation)
    assert fingerprint(implementation) == here
    program = f"from test_determinism import fingerprint; print(fingerprint({implementation!r}))"
    for _ in range(2):
        other = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            cwd=os.path.dirname(__file__),
        )
        assert other.stdout.strip() == here

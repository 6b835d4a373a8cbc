"""Property tests: any gate, packing, window and shape of a palette, against the float64 oracle.

The palette keeps compilations few; Hypothesis picks among them and draws the contents. The seed is in the header of
the report, and repeats a run: `pytest tests/test_properties.py --hypothesis-seed=…`.
"""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import GATES, check, make_case

from pallas_kernels import IMPLEMENTATIONS

AVAILABLE = [name for name, entry in IMPLEMENTATIONS.items() if entry.unavailable() is None]
SHAPES = [
    {"keys": 71, "kv_heads": 1, "group": 3, "dim": 16, "window": 5},
    {"keys": 71, "kv_heads": 1, "group": 3, "dim": 16, "window": 71},
    {"keys": 139, "kv_heads": 2, "group": 1, "dim": 16, "window": (3, 31)},
    {"keys": 139, "queries": 13, "kv_heads": 2, "group": 1, "dim": 16, "window": 31},
    {"keys": 139, "kv_heads": 2, "group": 2, "dim": 16, "window": 1},
    # More than one block of keys, also of those that are chosen at once.
    {"keys": 601, "kv_heads": 1, "group": 1, "dim": 8, "window": 523},
]
cases = st.fixed_dictionaries(
    {
        "gate": st.sampled_from(GATES),
        "segments": st.sampled_from(["none", "packed", "right", "left", "inside", "returning", "empty"]),
        "seed": st.integers(0, 2**32 - 1),
    }
)


def attention_is_the_oracles(shape, contents, causal, implementation):
    options = {} if causal else {"causal": False}
    case = make_case(**shape, **contents, **options)
    check(case, implementation)


@pytest.mark.parametrize("implementation", AVAILABLE)
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(shape=st.sampled_from(SHAPES[2:4]), contents=cases)
def test_some_cases(implementation, shape, contents):
    attention_is_the_oracles(shape, contents, True, implementation)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", AVAILABLE)
@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(shape=st.sampled_from(SHAPES), contents=cases, causal=st.booleans())
def test_many_cases(implementation, shape, contents, causal):
    attention_is_the_oracles(shape, contents, causal, implementation)

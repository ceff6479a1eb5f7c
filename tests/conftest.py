"""Hypothesis profiles and the fixtures that more than one test file uses."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("cases", "good_calls")

# Python processes that tests start import the installed package, not the source tree that they are started in.
os.environ["PYTHONSAFEPATH"] = "1"

# The examples are the same in every run under CI; at a desk they differ from run to run. "thorough" is for a night.
_common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("ci", max_examples=50, derandomize=True, **_common)
settings.register_profile("desk", max_examples=50, **_common)
settings.register_profile("thorough", max_examples=1000, **_common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "desk"))


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """torch's own thread count is none of the kernels' business, and small tensors are faster on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def kernel_threads() -> Iterator[Callable[[int], None]]:
    """`pyppo.ops.set_num_threads`, put back afterwards."""
    from pyppo import ops

    before = ops.get_num_threads()
    yield ops.set_num_threads
    ops.set_num_threads(before)

"""Tests that need a GPU. Without one each is skipped, and the run says at its end that no GPU was used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def missing() -> str | None:
    """Why there is nothing to test on, or None."""
    from pyppo import ops

    if not torch.cuda.is_available():
        return "no GPU: torch.cuda.is_available() is False (no device, no driver, or a torch without CUDA)"
    if not ops.build_info()["cuda_runtime_version"]:
        return f"pyppo has no CUDA kernels: {ops.build_info()['cuda_status']}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cuda)


@pytest.fixture(autouse=True)
def _gpu() -> None:
    reason = missing()
    if reason:
        pytest.skip(reason)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ours = [r for r in terminalreporter.stats.get("skipped", []) if r.nodeid.startswith("tests/cuda/")]
    reason = missing()
    if ours and reason:
        terminalreporter.write_line(f"tests/cuda: {len(ours)} tests skipped; {reason}")

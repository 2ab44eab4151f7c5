"""What the kernel tests share. Everything that needs torch is skipped where torch is not installed."""

from __future__ import annotations

import importlib.util
import sys

import pytest

HAS_TORCH = importlib.util.find_spec("torch") is not None


@pytest.fixture
def cpu():
    """The CPU as a Device."""
    pytest.importorskip("torch")
    from kernels.device import find_device

    return find_device("cpu")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors on two busy cores are faster on one thread, and the tests do not wait for each other's spinning."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if HAS_TORCH and "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)

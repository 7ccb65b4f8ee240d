"""Both ways to select, and PyTorch with several threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from torch_rsst.selection import topk
from torch_rsst.utils import bool_ops, threads


@pytest.fixture
def any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done on other devices than the CPU, done here on the CPU."""
    for module in (topk, bool_ops):
        monkeypatch.setattr(module, "numpy_reads", lambda tensor: False)


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if "MUTANT_UNDER_TEST" in os.environ:
        # Mutants run in forked processes, where PyTorch would wait for threads that were not copied.
        pretended = SimpleNamespace(
            get_num_threads=lambda: 3, set_num_threads=lambda _: None, no_grad=torch.no_grad
        )
        monkeypatch.setattr(threads, "torch", pretended)
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)

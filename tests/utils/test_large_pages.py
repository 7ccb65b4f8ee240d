"""Large pages are advice: tensors are as they were."""

from __future__ import annotations

import mmap

import pytest
import torch

from torch_rsst.utils.large_pages import with_large_pages


@pytest.mark.parametrize("size", [0, 3, (1 << 20) + 5])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tensor_is_given_back_as_it_was(size, device):
    tensor = torch.ones(size, device=device)
    assert with_large_pages(tensor) is tensor
    assert device == "meta" or bool((tensor == 1).all())


def test_a_system_without_large_pages_does_as_well(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    tensor = torch.ones(1 << 20)
    assert with_large_pages(tensor) is tensor

"""Blocks of weights against whole tensors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_rsst.masking.entry_blocks import acting, add_along, blocks

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@given(shape=shapes, size=st.integers(1, 40))
def test_every_entry_is_in_one_block_and_no_block_is_larger_than_asked(shape, size):
    seen = torch.zeros(shape, dtype=torch.int64)
    for index in blocks(shape, size):
        assert len(index) == len(shape)
        assert seen[index].numel() <= size
        assert math.prod(part.stop - part.start for part in index) == seen[index].numel()
        seen[index] += 1
    assert bool((seen == 1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask_dtype", [None, torch.bool, torch.float32, "own"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_weight_acts_as_it_does_in_a_whole_tensor(
    dtype, mask_dtype, double, channels_last, monkeypatch
):
    monkeypatch.setattr("torch_rsst.masking.entry_blocks._BLOCK", 7)
    weight = torch.randn(3, 4, 2, 2).to(dtype)
    weight[0, 0, 0], weight[1, 0, 0, 0] = torch.inf, -0.0
    mask = torch.rand(weight.shape) > 0.4
    mask[0, 0, 0] = False
    expected = weight if mask_dtype is None else torch.where(mask, weight, 0.0)
    if channels_last:
        weight = weight.contiguous(memory_format=torch.channels_last)
    given = None if mask_dtype is None else mask.to(dtype if mask_dtype == "own" else mask_dtype)
    found, sums = torch.full_like(expected, 9.0), torch.zeros(4, dtype=torch.float64)
    of_two = torch.zeros(3, 2, dtype=torch.float64)
    before = weight.clone()
    for index, block in acting(weight, given, double=double):
        assert block.dtype == (torch.float64 if double or dtype == torch.float64 else torch.float32)
        found[index] = block.to(dtype)
        add_along(block.bool(), (1,), index, sums)
        add_along(block.bool(), (0, 3), index, of_two)
    assert torch.equal(found, expected)
    assert sums.tolist() == (expected != 0).sum((0, 2, 3)).tolist()
    assert of_two.tolist() == (expected != 0).sum((1, 2)).tolist()
    assert torch.equal(weight, before)


def test_nothing_is_done_for_an_empty_weight():
    assert list(acting(torch.empty(0, 3), None)) == []

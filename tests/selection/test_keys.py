"""Keys have the order of the scores; tensors are cut into blocks by their shape alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranked_scores import FLOATS, LAYOUTS
from torch import Tensor

from torch_rsst.selection.keys import Block, Buffers, KeyType, split


def keys_of(scores: Tensor, *, absolute: bool) -> Tensor:
    key_type = KeyType.of([scores], absolute=absolute)
    every = Block(0, scores, None, 0, 0, Buffers(scores.numel(), key_type), None, True)
    (block,) = every.pieces()
    return block.keys()


LADDER = [-math.inf, -3.0, -1.0, -(2.0**-14), 0.0, 2.0**-14, 1.0, 3.0, math.inf]


@pytest.mark.parametrize("dtype", FLOATS)
def test_keys_have_the_order_of_the_scores(dtype: torch.dtype) -> None:
    keys = keys_of(torch.tensor(LADDER, dtype=dtype), absolute=False)
    assert torch.equal(keys, keys.sort().values)
    assert len(keys.unique()) == len(LADDER)
    key_type = KeyType.of([torch.zeros(1, dtype=dtype)], absolute=False)
    assert key_type.lowest < keys[0]
    assert keys[-1] == key_type.infinity < key_type.highest


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_both_zeros_have_one_key_and_nan_lies_above_infinity(
    dtype: torch.dtype, absolute: bool
) -> None:
    score = torch.tensor([0.0, -0.0, math.nan, -math.nan], dtype=dtype)
    zero, other, *nan = keys_of(score, absolute=absolute).tolist()
    assert zero == other == 0
    assert min(nan) > KeyType.of([score], absolute=absolute).infinity


@pytest.mark.parametrize("layout", LAYOUTS)
@given(shape=st.lists(st.integers(0, 5), max_size=4), size=st.integers(1, 40))
def test_pieces_are_views_of_at_most_some_entries_in_order(
    layout: str, shape: list[int], size: int
) -> None:
    whole = torch.arange(float(math.prod(shape))).reshape(shape)
    tensor = LAYOUTS[layout](whole)
    pieces = split(tensor, size)
    assert [number for piece in pieces for number in piece.flatten().tolist()] == list(
        range(whole.numel())
    )
    assert all(0 < piece.numel() <= size for piece in pieces)
    assert [piece.shape for piece in pieces] == [piece.shape for piece in split(whole, size)]
    for piece in pieces:
        piece.fill_(-1)
    assert bool((tensor == -1).all())

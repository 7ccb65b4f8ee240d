"""Flags against PyTorch's own operations, which are the slow oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torch_rsst.utils import bool_ops as flags

COMPARISONS = {"<=": torch.le, ">": torch.gt, ">=": torch.ge, "==": torch.eq}
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64]
INTEGERS = st.lists(st.integers(-3, 3), max_size=40)


def blank(values: Tensor) -> Tensor:
    return torch.empty(values.shape, dtype=torch.bool)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", COMPARISONS)
@given(values=INTEGERS, bound=st.integers(-3, 3))
def test_comparisons_are_those_of_pytorch(
    dtype: torch.dtype, how: flags.Comparison, values: list[int], bound: int
) -> None:
    tensor = torch.tensor(values, dtype=dtype)
    out = blank(tensor)
    assert flags.compare(tensor, how, bound, out=out) is out
    assert torch.equal(out, COMPARISONS[how](tensor, bound))


@pytest.mark.parametrize("how", COMPARISONS)
@given(pairs=st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), max_size=40))
def test_each_entry_may_have_its_own_bound(
    how: flags.Comparison, pairs: list[tuple[int, int]]
) -> None:
    values, bounds = torch.tensor(pairs, dtype=torch.int32).view(-1, 2).unbind(1)
    out = flags.compare(values, how, bounds.contiguous(), out=blank(values))
    assert torch.equal(out, COMPARISONS[how](values, bounds))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_bounds_reach_from_the_lowest_to_the_highest_integer(dtype: torch.dtype) -> None:
    ends = torch.iinfo(dtype)
    values = torch.tensor([ends.min, ends.min + 1, 0, ends.max], dtype=dtype)
    assert flags.compare(values, "<=", ends.min, out=blank(values)).tolist() == [True] + 3 * [False]
    assert flags.compare(values, ">=", ends.max, out=blank(values)).tolist() == 3 * [False] + [True]


@pytest.mark.parametrize(
    "dtype", [*DTYPES, torch.bool, torch.uint8, torch.int8, torch.float8_e4m3fn]
)
@given(values=INTEGERS)
def test_nonzero_entries_are_those_of_pytorch(dtype: torch.dtype, values: list[int]) -> None:
    tensor = torch.tensor([abs(v) for v in values]).to(dtype)
    assert torch.equal(flags.compare(tensor, "!=", 0, out=blank(tensor)), tensor.float() != 0)


def test_nan_is_nonzero_and_both_zeros_are_not() -> None:
    values = torch.tensor([torch.nan, 0.0, -0.0, torch.inf])
    assert flags.compare(values, "!=", 0, out=blank(values)).tolist() == [True, False, False, True]


def test_what_is_read_may_need_gradients_or_lie_apart() -> None:
    values = torch.tensor([[1.0, 0.0], [0.0, 2.0]], requires_grad=True)
    column = values[:, 1]
    assert flags.compare(column, "!=", 0, out=blank(column)).tolist() == [False, True]


@given(values=st.lists(st.booleans(), max_size=70))
def test_counts_positions_and_bits_say_what_the_flags_say(values: list[bool]) -> None:
    tensor = torch.tensor(values, dtype=torch.bool)
    assert flags.count(tensor) == sum(values)
    assert flags.positions(tensor).tolist() == [i for i, value in enumerate(values) if value]
    bits = flags.packed(tensor)
    assert bits.numel() == -(-len(values) // 8)
    assert torch.equal(flags.unpacked(bits, len(values)), tensor)

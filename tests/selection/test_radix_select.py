"""The k-th smallest from histograms, against sorting."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torch_rsst.selection.radix_select import Found, kth_smallest

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@given(data=st.data())
def test_the_kth_smallest_is_that_of_a_sorted_list(dtype: torch.dtype, data: st.DataObject) -> None:
    ends = torch.iinfo(dtype)
    integers = st.one_of(st.integers(-5, 5), st.integers(ends.min, ends.max - 2**11))
    blocks = data.draw(st.lists(st.lists(integers, max_size=20), min_size=1, max_size=4))
    ascending = sorted(number for block in blocks for number in block)
    if not ascending:
        return
    k = data.draw(st.integers(1, len(ascending)))
    value = ascending[k - 1]
    low, high = data.draw(st.integers(ends.min, value)), data.draw(st.integers(value, ends.max))
    found = kth_smallest(
        lambda: [torch.tensor(block, dtype=dtype) for block in blocks],
        k,
        low=max(low, ends.min + 1) if high - low < 2**11 else low,
        high=high,
        device=CPU,
        all_reduce=lambda counts: counts,
    )
    assert found == Found(value, k - ascending.index(value), ascending.count(value))


def test_integers_of_several_ranks_are_searched_by_their_counts() -> None:
    whole = torch.randint(-300, 300, (3000,), generator=torch.Generator().manual_seed(0))
    parts, width = whole.split([1, 2000, 999]), len(whole.unique())
    barrier, shares = threading.Barrier(3), [torch.empty(0)] * 3
    bytes_reduced = [0, 0, 0]
    found: list[list[Found]] = [[], [], []]

    def rank(number: int) -> None:
        def add_up(counts: Tensor) -> Tensor:
            shares[number] = counts
            bytes_reduced[number] += counts.numel() * counts.element_size()
            barrier.wait()
            total = torch.stack(shares).sum(0)
            barrier.wait()
            return total

        for k in (1, 1500, 3000):
            low, high = -(2**31), 2**31 - 1
            found[number].append(
                kth_smallest(
                    lambda: [parts[number]], k, low=low, high=high, device=CPU, all_reduce=add_up
                )
            )

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    order = whole.sort().values
    assert width < 3000
    assert found[0] == found[1] == found[2]
    for k, (value, tie, ties) in zip((1, 1500, 3000), found[0], strict=True):
        assert value == order[k - 1]
        assert tie == k - int((whole < value).sum())
        assert ties == int((whole == value).sum())
    assert max(bytes_reduced) < 3 * 100_000

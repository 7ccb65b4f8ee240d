"""Damped least squares from streamed sums, against torch.linalg.lstsq on all rows at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torch_rsst.reconstruction.least_squares import FitSums, solve


def problem(seed: int, groups: int, outputs: int, features: int, rows: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    a, residual = draw(groups, rows, features) + 0.5, draw(groups, rows, outputs)
    free = torch.rand(groups, outputs, features + 1, generator=generator) < 0.6
    return a, residual, free


def by_lstsq(a: Tensor, residual: Tensor, free: Tensor, damping: float) -> Tensor:
    """Row by row: damping is that of extra equations √λ·change = 0."""
    change = torch.zeros(free.shape, dtype=torch.float64)
    for group, outputs in enumerate(free):
        whole = torch.cat([a[group], torch.ones(a.shape[1], 1, dtype=torch.float64)], 1)
        for row, entries in enumerate(outputs):
            index = entries.nonzero().flatten()
            if not index.numel():
                continue
            some = whole[:, index]
            features = index < whole.shape[1] - 1
            scale = some[:, features].square().sum(0).mean() if bool(features.any()) else 0.0
            damp = torch.diag(features.double() * (damping * scale) ** 0.5)
            target = torch.cat([residual[group, :, row], torch.zeros(len(index)).double()])
            solution = torch.linalg.lstsq(torch.cat([some, damp]), target[:, None], driver="gelsd")
            change[group, row, index] = solution.solution[:, 0]
    return change


@given(
    seed=st.integers(0, 999),
    groups=st.integers(1, 3),
    outputs=st.integers(1, 4),
    features=st.integers(1, 6),
    rows=st.integers(8, 20),
    damping=st.sampled_from([0.0, 1e-4, 0.1]),
)
def test_against_lstsq_row_by_row(seed, groups, outputs, features, rows, damping):
    a, residual, free = problem(seed, groups, outputs, features, rows)
    sums = FitSums.zeros(groups, outputs, features, torch.device("cpu"))
    for part in (slice(0, 3), slice(3, None)):
        sums.add(a[:, part], residual[:, part])
    change = solve(sums, free, damping)
    torch.testing.assert_close(change, by_lstsq(a, residual, free, damping), rtol=1e-6, atol=1e-8)
    assert not bool(change[~free].any())
    ones = torch.ones(groups, rows, 1, dtype=torch.float64)
    after = residual - torch.cat([a, ones], 2) @ change.mT
    assert sums.error_after(change) == pytest.approx(float(after.square().sum()), abs=1e-9)
    assert sums.error_after(change) <= float(sums.error) + 1e-9


def test_features_that_depend_on_each_other_have_the_smallest_solution():
    a = torch.tensor([[[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]], dtype=torch.float64)
    sums = FitSums.zeros(1, 1, 2, torch.device("cpu"))
    sums.add(a, 4.0 * a[..., :1])
    free = torch.tensor([[[True, True, False]]])
    torch.testing.assert_close(solve(sums, free, 0.0)[0, 0], torch.tensor([2.0, 2.0, 0.0]).double())


@given(
    seed=st.integers(0, 9999),
    rank=st.integers(1, 3),
    features=st.integers(2, 6),
    scale=st.sampled_from([1e-3, 1.0, 7.0, 1e3]),
)
def test_of_dependent_features_the_solution_is_the_smallest_on_any_processor(
    seed, rank, features, scale
):
    """Factorizations of singular matrices go through or fail, as sums are rounded."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(-3, 4, (1, 12, rank), generator=generator)
    mixing = torch.randint(-2, 3, (1, rank, features), generator=generator)
    a = scale * (base @ mixing).double()
    residual = torch.randn(1, 12, 2, generator=generator, dtype=torch.float64)
    free = torch.ones(1, 2, features + 1, dtype=torch.bool)
    free[..., -1] = False
    sums = FitSums.zeros(1, 2, features, torch.device("cpu"))
    sums.add(a, residual)
    change, wanted = solve(sums, free, 0.0), by_lstsq(a, residual, free, 0.0)
    torch.testing.assert_close(change * scale, wanted * scale, rtol=1e-5, atol=1e-6)


def test_inputs_that_are_all_zero_change_nothing_but_the_constant():
    sums = FitSums.zeros(1, 1, 2, torch.device("cpu"))
    sums.add(torch.zeros(1, 4, 2).double(), torch.full((1, 4, 1), 3.0).double())
    change = solve(sums, torch.ones(1, 1, 3, dtype=torch.bool), 1e-4)
    torch.testing.assert_close(change[0, 0], torch.tensor([0.0, 0.0, 3.0]).double())

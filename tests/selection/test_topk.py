"""The exact selector against sorting: what the CPU does, and what other devices do."""

from __future__ import annotations

import math
import random
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranked_scores import (
    DISTRIBUTIONS,
    FLOATS,
    Problem,
    assert_sorts,
    awkward_problems,
    by_sorting,
    flat,
    in_small,
    problems,
    uniform,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.two_tensor import TwoTensor

import torch_rsst
from torch_rsst.masking import mask_undo as saved_masks
from torch_rsst.selection import topk
from torch_rsst.selection.topk import Ranking, lowest
from torch_rsst.testing import weights

INF, NAN = math.inf, math.nan


@pytest.fixture(params=["CPU", "any device"], autouse=True)
def way(request: pytest.FixtureRequest) -> None:
    """Every test here runs twice: as on the CPU, and with the operations that other devices take."""
    if request.param == "any device":
        request.getfixturevalue("any_device")


@given(problems(), st.booleans())
def test_selection_is_sorting(problem: Problem, absolute: bool) -> None:
    scores, among, k = problem
    marked = lowest(scores, k, among=among, absolute=absolute)
    assert flat(marked) == by_sorting(scores, k, among, absolute)
    assert [m.shape for m in marked] == [s.shape for s in scores]
    assert all(m.dtype == torch.bool for m in marked)
    assert sum(int(m.sum()) for m in marked) == k


@given(awkward_problems(), st.booleans(), st.integers(1, 9), st.integers(1, 9))
def test_every_dtype_shape_and_layout_is_sorted(
    problem: Problem, absolute: bool, block: int, sample: int
) -> None:
    scores, among, k = problem
    with pytest.MonkeyPatch.context() as patch:
        in_small(patch, block=block, sample=sample)
        ranking = Ranking(scores, among=among, absolute=absolute)
        assert_sorts(ranking, problem, absolute)
        outs = [torch.full_like(score, 7) for score in scores]
        ranking.cut(k).write_stays(outs)
    stays = ranking.cut(k).stays()
    assert all(torch.equal(out, mask.to(out.dtype)) for out, mask in zip(outs, stays, strict=True))


@given(problems(), st.booleans(), st.integers(1, 5))
def test_blocks_bound_the_memory_not_the_result(
    problem: Problem, absolute: bool, block: int
) -> None:
    scores, among, k = problem
    with pytest.MonkeyPatch.context() as patch:
        in_small(patch, block=block, sample=1 << 17)
        marked = lowest(scores, k, among=among, absolute=absolute)
    assert flat(marked) == by_sorting(scores, k, among, absolute)


@given(weights(dtypes=FLOATS, allow_infinity=True), st.data())
def test_the_result_does_not_depend_on_the_split(score: Tensor, data: st.DataObject) -> None:
    whole = score.reshape(-1)
    cuts = sorted(data.draw(st.lists(st.integers(0, whole.numel()), max_size=3)))
    parts = [
        whole[a:b] for a, b in zip([0, *cuts], [*cuts, whole.numel()], strict=True)
    ]  # empty parts too
    k = data.draw(st.integers(0, whole.numel()))
    joined = torch.cat(lowest(parts, k))
    assert torch.equal(joined, lowest([whole], k)[0])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [0, 1, 500, 999, 1000])
def test_heavy_ties_against_a_stable_sort(dtype: torch.dtype, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    score = torch.randint(-3, 4, (1000,), generator=generator).to(dtype)
    order = torch.sort(score.abs().double(), stable=True).indices
    expected = torch.zeros(1000, dtype=torch.bool)
    expected[order[:k]] = True
    assert torch.equal(lowest([score], k, absolute=True)[0], expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("score", "k", "marked"),
    [
        ([5, 5, 5, 5], 0, [0, 0, 0, 0]),
        ([5, 5, 5, 5], 1, [1, 0, 0, 0]),
        ([5, 5, 5, 5], 3, [1, 1, 1, 0]),
        ([5, 5, 5, 5], 4, [1, 1, 1, 1]),
        ([0.0, -0.0, 0.0, -0.0], 2, [1, 1, 0, 0]),
        ([-0.0, 0.0, -1, 1], 2, [1, 0, 1, 0]),
        ([INF, -INF, 0, INF], 1, [0, 1, 0, 0]),
        ([INF, -INF, 0, INF], 3, [1, 1, 1, 0]),
        ([-1, -2, -3, 3], 2, [0, 1, 1, 0]),
    ],
)
def test_literal_cases(dtype: torch.dtype, score: list[float], k: int, marked: list[int]) -> None:
    found = lowest([torch.tensor(score, dtype=dtype)], k)
    assert found[0].int().tolist() == marked


@pytest.mark.parametrize(
    ("score", "k", "marked"),
    [
        ([-1, 1, -1, 1], 2, [1, 1, 0, 0]),
        ([INF, -INF, 3, -4], 3, [1, 0, 1, 1]),
        ([-5, 4, -3, 2], 2, [0, 0, 1, 1]),
    ],
)
def test_literal_cases_of_magnitude(score: list[float], k: int, marked: list[int]) -> None:
    found = lowest([torch.tensor(score, dtype=torch.float32)], k, absolute=True)
    assert found[0].int().tolist() == marked


@pytest.mark.parametrize("dtype", FLOATS)
def test_neighbors_and_denormals_are_told_apart(dtype: torch.dtype) -> None:
    tiny = torch.tensor(0.0, dtype=dtype)
    ladder = (
        [tiny := torch.nextafter(tiny, torch.tensor(1.0, dtype=dtype)) for _ in range(4)]
        if (dtype in (torch.float32, torch.float64))
        else [
            torch.tensor(torch.finfo(dtype).smallest_normal * f, dtype=dtype)
            for f in (0.25, 0.5, 1, 2)
        ]
    )
    score = torch.stack([ladder[i] for i in (2, 0, 3, 1)])
    assert lowest([score], 2)[0].tolist() == [False, True, False, True]
    assert lowest([-score], 2)[0].tolist() == [True, False, True, False]


def test_float64_scores_are_not_rounded_to_float32() -> None:
    score = torch.tensor([1.0 + 2.0**-40, 1.0, 1.0 + 2.0**-50], dtype=torch.float64)
    assert lowest([score], 1)[0].tolist() == [False, True, False]
    assert lowest([score], 2)[0].tolist() == [False, True, True]


def test_tensors_of_several_dtypes_compete_by_value() -> None:
    scores = [
        torch.tensor([1.0, 3.0], dtype=torch.bfloat16),
        torch.tensor([2.0, 0.5], dtype=torch.float64),
        torch.tensor([1, 4]),
        torch.tensor([1.0, 0.25], dtype=torch.float16),
    ]
    assert flat(lowest(scores, 4)) == [[True, False], [False, True], [True, False], [False, True]]


def test_integers_are_ranked_too() -> None:
    assert lowest([torch.tensor([3, -2, 0, -2])], 2)[0].tolist() == [False, True, False, True]


def test_channels_last_counts_in_logical_order() -> None:
    score = torch.arange(48.0).sub(20).abs().reshape(2, 3, 4, 2)
    strided = score.to(memory_format=torch.channels_last)
    assert not strided.is_contiguous()
    for k in range(49):
        assert torch.equal(lowest([strided], k)[0], lowest([score], k)[0])


def test_views_and_expanded_tensors() -> None:
    base = torch.tensor([[4.0, 9.0], [1.0, 9.0], [3.0, 9.0]])
    assert lowest([base[:, 0]], 1)[0].tolist() == [False, True, False]
    assert lowest([torch.tensor(2.0).expand(3)], 2)[0].tolist() == [True, True, False]


def test_everything_dead_but_one() -> None:
    alive = torch.zeros(9, dtype=torch.bool)
    alive[5] = True
    marked = lowest([torch.full((9,), -7.0)], 1, among=[alive])
    assert torch.equal(marked[0], alive)


def test_scalars_empty_tensors_and_no_tensors() -> None:
    scalar = torch.tensor(2.0)
    marked = lowest([torch.zeros(0, 3), scalar, torch.tensor([1.0])], 2)
    assert [m.shape for m in marked] == [(0, 3), (), (1,)]
    assert flat(marked) == [[], [True], [True]]
    assert lowest([], 0) == []
    assert lowest([torch.zeros(0)], 0)[0].numel() == 0


def test_many_random_ranks() -> None:
    generator = torch.Generator().manual_seed(1)
    chooser = random.Random(1)
    scores = [torch.randn(n, generator=generator) for n in (5000, 3, 70000)]
    joined = torch.cat(scores)
    order = torch.sort(joined, stable=True).indices
    for k in [chooser.randrange(joined.numel()) for _ in range(5)]:
        expected = torch.zeros_like(joined, dtype=torch.bool)
        expected[order[:k]] = True
        assert torch.equal(torch.cat(lowest(scores, k)), expected)


def test_inputs_are_not_written_to() -> None:
    score, alive = torch.tensor([2.0, -1.0, -0.0]), torch.tensor([True, False, True])
    lowest([score], 1, among=[alive], absolute=True)
    assert score.tolist() == [2.0, -1.0, -0.0]
    assert math.copysign(1.0, score[2].item()) == -1.0
    assert alive.tolist() == [True, False, True]


@pytest.mark.parametrize("k", [-1, 3])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match="k: expected 0 to 2 candidates"):
        lowest([torch.ones(3)], k, among=[torch.tensor([True, True, False])])


@pytest.mark.parametrize("k", [0, 1])
def test_nan_among_competitors_names_the_tensor(k: int) -> None:
    scores = [torch.ones(2), torch.tensor([NAN, 1.0, NAN])]
    with pytest.raises(ValueError, match=r"scores\[1\]: expected numbers, got 2 NaN"):
        lowest(scores, k)
    with pytest.raises(ValueError, match="scores of fc"):
        lowest(scores, k, names=["head", "fc"])


def test_nan_outside_the_competition_is_fine() -> None:
    score, alive = torch.tensor([NAN, 2.0, 1.0]), torch.tensor([False, True, True])
    assert lowest([score], 1, among=[alive])[0].tolist() == [False, False, True]
    assert lowest([score], 2, among=[alive], absolute=True)[0].tolist() == [False, True, True]


# As large tensors are ranked: a sample, collected candidates, many blocks, several threads.


@pytest.mark.usefixtures("three_threads")
@given(problems(), st.booleans(), st.integers(1, 40), st.integers(1, 40), st.sampled_from((0, 0.2)))
def test_samples_blocks_and_threads_do_not_change_the_result(
    problem: Problem, absolute: bool, block: int, sample: int, collected: float
) -> None:
    scores, among, _ = problem
    with pytest.MonkeyPatch.context() as patch:
        in_small(patch, block=block, sample=sample, collected=collected)
        assert_sorts(Ranking(scores, among=among, absolute=absolute), problem, absolute)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("absolute", [False, True])
def test_adversarial_scores_against_a_stable_sort(
    distribution: str, dtype: torch.dtype, absolute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = 20_000
    whole = DISTRIBUTIONS[distribution](n).to(dtype)
    alive = uniform(n + 1)[1:] < 0.2
    alive_indices = alive.nonzero()[:, 0]
    ranked = whole.abs() if absolute else whole
    order = alive_indices[torch.sort(ranked[alive].double(), stable=True).indices]
    in_small(monkeypatch, block=3000, sample=256, collected=0.5)
    sizes = [4096, 1, n - 4097]
    parts = [part.reshape(-1, 2) if part.numel() % 2 == 0 else part for part in whole.split(sizes)]
    # As bools and as a mask buffer has them.
    among = [alive.split(sizes)[i].to(t)[:] for i, t in enumerate((torch.bool, dtype, dtype))]
    among = [mask.reshape(part.shape) for mask, part in zip(among, parts, strict=True)]
    ranking = Ranking(parts, among=among, absolute=absolute)
    assert ranking.available == len(order)
    for k in (0, 1, len(order) // 5, len(order) // 2, len(order) - 1, len(order)):
        expected = torch.zeros(n, dtype=torch.bool)
        expected[order[:k]] = True
        cut = ranking.cut(k)
        assert torch.equal(torch.cat([mask.reshape(-1) for mask in cut.goes()]), expected)
        stays = torch.cat([mask.reshape(-1) for mask in cut.stays()])
        assert torch.equal(stays, alive & ~expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.uint8])
def test_many_integers(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    in_small(monkeypatch, block=700, sample=100)
    score = (uniform(10_000) * 200).abs().to(dtype)
    for k in (1, 3333, 9999):
        expected = torch.zeros(10_000, dtype=torch.bool)
        expected[torch.sort(score, stable=True).indices[:k]] = True
        assert torch.equal(lowest([score], k)[0], expected)


def test_layouts_in_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    in_small(monkeypatch, block=100, sample=64)
    score = (uniform(6400) * 8).round().reshape(8, 8, 10, 10)
    alive = uniform(6401)[1:].reshape(8, 8, 10, 10) < 0.3
    expected = lowest([score], 3000, among=[alive])[0]
    last, turned = torch.channels_last, (3, 1, 0, 2)
    assert torch.equal(lowest([score.to(memory_format=last)], 3000, among=[alive])[0], expected)
    assert torch.equal(lowest([score], 3000, among=[alive.to(memory_format=last)])[0], expected)
    # The same logical tensor, its memory in another order.
    stored = score.permute(turned).contiguous()
    back = [turned.index(dim) for dim in range(4)]
    assert torch.equal(lowest([stored.permute(back)], 3000, among=[alive])[0], expected)
    out = torch.empty_like(score, memory_format=last)
    Ranking([score], among=[alive]).cut(3000).write_stays([out])
    assert torch.equal(out != 0, alive & ~expected)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("nan", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, -0x400000, -1])
def test_nan_of_every_kind(nan: int, absolute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    in_small(monkeypatch, block=700, sample=100, collected=0.5)
    bits = uniform(10_000).view(torch.int32)
    bits[7777] = nan
    score = bits.view(torch.float32)
    alive = torch.ones(10_000)
    for k in (0, 5, 10_000):
        with pytest.raises(ValueError, match=r"scores\[1\]: expected numbers, got 1 NaN"):
            lowest([uniform(10), score], k, among=[None, alive], absolute=absolute)
    alive[7777] = 0
    cut = Ranking([score], among=[alive], absolute=absolute).cut(9998)
    assert int(cut.stays()[0].sum()) == 1
    assert not cut.stays()[0][7777]
    assert not cut.goes()[0][7777]


def test_a_mask_may_be_overwritten_with_what_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    in_small(monkeypatch, block=64, sample=50, collected=0.5)
    score, mask = uniform(1000).round(decimals=1), (uniform(1001)[1:] < 0.3).float()
    expected = Ranking([score], among=[mask], absolute=True).cut(300).stays()[0]
    Ranking([score], among=[mask], absolute=True).cut(300).write_stays([mask])
    assert torch.equal(mask, expected.float())


# From selection to masks: lazily, all or none, in little memory.


def layers(*sizes: int) -> nn.ModuleList:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.ModuleList(nn.Linear(n, n, bias=False) for n in sizes)


@pytest.mark.parametrize("fails_at", range(5))
def test_a_failure_while_masks_are_written_changes_nothing(
    fails_at: int,
    fingerprint: Callable[[nn.Module], list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = layers(5, 6, 7, 8, 9)
    parameters = [(layer, "weight") for layer in model]
    torch_rsst.global_unstructured(parameters[1:4], torch_rsst.GlobalL1, amount=0.4)
    before = fingerprint(model)
    write, written = topk._write, []

    def failing(marks: Tensor, out: Tensor) -> None:
        write(marks, out)
        written.append(out)
        if len(written) > fails_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(topk, "_write", failing)
    with pytest.raises(KeyboardInterrupt):
        torch_rsst.global_unstructured(parameters, torch_rsst.GlobalL1, amount=0.4)
    assert fingerprint(model) == before
    monkeypatch.undo()
    torch_rsst.global_unstructured(parameters, torch_rsst.GlobalL1, amount=0.4)
    assert fingerprint(model) != before


def test_scores_may_be_masks_that_change() -> None:
    model = layers(4, 4)
    parameters = [(layer, "weight") for layer in model]
    torch_rsst.global_unstructured(parameters, torch_rsst.GlobalL1, amount=8)
    first, second = (layer.weight_mask for layer in model)
    given = {parameters[1]: first, parameters[0]: second.clone()}
    copies = {key: score.clone() for key, score in given.items()}
    goes = lowest(
        [copies[parameters[0]], copies[parameters[1]]], 9, among=[first.clone(), second.clone()]
    )
    expected = [(first != 0) & ~goes[0], (second != 0) & ~goes[1]]
    torch_rsst.global_unstructured(parameters, torch_rsst.GlobalL1, given, amount=9)
    for layer, mask in zip(model, expected, strict=True):
        assert torch.equal(layer.weight_mask != 0, mask)


@pytest.mark.usefixtures("three_threads")
def test_inference_mode_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    in_small(monkeypatch, block=64, sample=50)
    model, twin = layers(20, 30), layers(20, 30)
    for net, mode in ((model, True), (twin, False)):
        for _ in range(2):
            with torch.inference_mode(mode):
                parameters = [(layer, "weight") for layer in net]
                torch_rsst.global_unstructured(parameters, torch_rsst.GlobalL1, amount=0.3)
    for layer, other in zip(model, twin, strict=True):
        assert torch.equal(layer.weight_mask, other.weight_mask)
        assert not layer.weight_mask.is_inference()
    with torch.inference_mode():
        marked = lowest([layer.weight for layer in model], 500, absolute=True)
    assert sum(int(mask.sum()) for mask in marked) == 500


def peak_of(work: Callable[[], object]) -> int:
    """The most bytes that PyTorch's allocator held at once for ``work``, and NumPy's when called again."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    tracemalloc.start()
    work()
    _, of_numpy = tracemalloc.get_traced_memory()  # with Python's own
    tracemalloc.stop()
    events: Any = profiler.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak + of_numpy


@pytest.mark.parametrize("sizes", [(512,) * 8, (1448,)], ids=["several", "one"])
def test_memory_of_a_call(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    # What does not grow with the weights would count for more here than it does with many.
    in_small(monkeypatch, block=1 << 15, sample=1 << 15)
    monkeypatch.setattr(saved_masks, "_PACKED", 1 << 16)
    model = layers(*sizes)
    parameters = [(layer, "weight") for layer in model]
    weights = sum(layer.weight.numel() * 4 for layer in model)

    def call() -> None:
        torch_rsst.global_unstructured(parameters, torch_rsst.GlobalL1, amount=0.2)

    assert peak_of(call) < 1.25 * weights  # new masks
    assert peak_of(call) < 0.25 * weights  # in place, the way back included


def test_rounds_hold_no_more_memory() -> None:
    model = layers(64, 64)
    parameters = [(layer, "weight") for layer in model]
    torch_rsst.global_unstructured(parameters, torch_rsst.GlobalL1, amount=0.2)

    def held_by_rounds() -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            for _ in range(5):
                torch_rsst.global_unstructured(parameters, torch_rsst.GlobalL1, amount=0.2)
        events: Any = profiler.profiler.kineto_results.events()
        return sum(event.nbytes() for event in events if event.name() == "[memory]")

    assert held_by_rounds() == 0


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("absolute", [False, True])
def test_views_with_the_sign_turned_are_read_as_such(dtype: torch.dtype, absolute: bool) -> None:
    turned = torch._neg_view(torch.tensor([-3.0, -1.0, 2.0, -5.0], dtype=dtype))
    marks = lowest([turned], 1, absolute=absolute)[0]
    assert marks.tolist() == [False, absolute, not absolute, False]


@pytest.mark.parametrize("among", [[torch.ones(1)], [torch.ones(6)], [], [torch.ones(4, 1)]])
def test_masks_have_the_shapes_of_the_scores(among: list[Tensor]) -> None:
    with pytest.raises(
        ValueError,
        match=r"among: expected \[\(4,\)\], got \[.*\]\. Pass a mask of the same shape for each tensor, or None\.$",
    ):
        lowest([torch.arange(4.0)], 1, among=among)


def test_wrappers_around_tensors_are_pruned_again_and_again() -> None:
    layer = nn.Linear(8, 8)
    pair = TwoTensor(torch.randn(8, 8), torch.randn(8, 8))
    layer.weight = nn.Parameter(pair)
    for masked in (10, 20):
        torch_rsst.global_unstructured([(layer, "weight")], torch_rsst.GlobalL1, amount=10)
        assert int((layer.weight_mask == 0).sum()) == masked


def test_infinity_is_no_nan() -> None:
    score = torch.tensor([math.inf, NAN, 1.0, -math.inf, NAN])
    with pytest.raises(ValueError, match="got 2 NaN among the entries to rank"):
        lowest([score], 1)


class Waits(TorchFunctionMode):
    """Counts what would wait for a device: each makes a number, or a shape, out of values."""

    CALLS = frozenset(
        {
            *(torch.nonzero, torch.masked_select, torch.equal, torch.unique),
            *(Tensor.item, Tensor.tolist, Tensor.nonzero, Tensor.masked_select, Tensor.cpu),
            *(Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.numpy),
        }
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        indices = args[1] if func is Tensor.__getitem__ else None
        chooses = isinstance(indices, Tensor) and indices.dtype == torch.bool
        self.count += func in self.CALLS or chooses
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("values", ["many", "few"])
def test_other_devices_are_waited_for_a_few_times_whatever_there_is_to_rank(
    values: str, dtype: torch.dtype, any_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_small(monkeypatch, block=50)
    scores = [uniform(n).to(dtype) for n in range(100, 130)]
    if values == "few":
        scores = [score.round() for score in scores]
    among: list[Tensor | None] = [uniform(n + 1)[1:] < 0.3 for n in range(100, 130)]
    with Waits() as waits:
        cut = Ranking(scores, among=among, absolute=True).cut(1000)
        assert waits.count <= 5  # the highest key of a number is computed on the CPU
        before = waits.count
        cut.goes()
        assert waits.count == before


@pytest.mark.parametrize("k", [0, 1, 7000, 20_000])
def test_all_devices_find_the_same(k: int, monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    scores = [(uniform(n) * 50).round() for n in (9000, 1, 11_000)]
    in_small(monkeypatch, block=700, sample=200)
    found = lowest(scores, k, absolute=True)
    request.getfixturevalue("any_device")
    others = lowest(scores, k, absolute=True)
    assert all(torch.equal(a, b) for a, b in zip(found, others, strict=True))

"""The kernels for CUDA devices against sorting; without a device, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranked_scores import (
    DISTRIBUTIONS,
    Problem,
    assert_sorts,
    by_sorting,
    flat,
    problems,
    uniform,
)
from torch import Tensor, nn

import torch_rsst
from torch_rsst import RSSTWarning
from torch_rsst.distributed.dtensor import Layout
from torch_rsst.selection import bracket as candidates
from torch_rsst.selection import topk as selection
from torch_rsst.selection.keys import Column
from torch_rsst.selection.radix_select import alone
from torch_rsst.selection.topk import Ranking, lowest

pytest.importorskip("triton")
from torch_rsst.selection import fused

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RANKED = [torch.float32, torch.float16, torch.bfloat16]


class Small:
    """Makes small tensors go the way of large ones, and counts how often all entries are searched."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch, self.searches_of_all = patch, 0
        everything = selection.everything

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.searches_of_all += 1
            return everything(*args, **kwargs)

        patch.setattr(selection, "everything", counted)
        patch.setattr(selection, "fused_passes", self.passes)

    def passes(self, columns: Sequence[Column], reduce: Any) -> fused.Fused | None:
        """As on a device, whatever the device."""
        ready = all(
            c.scores.dtype in RANKED and c.scores.is_contiguous() and _ready(c.among)
            for c in columns
        )
        return fused.Fused(columns) if columns and ready else None

    def set(self, *, block: int = 64, sample: int = 50, few: float = 0.2, least: int = 1) -> Small:
        for name, value in {
            "_BLOCK": block,
            "_SAMPLE": sample,
            "_FEW": few,
            "_LEAST": least,
        }.items():
            self.patch.setattr(fused, name, value)
        return self


def _ready(among: Tensor | None) -> bool:
    return among is None or (among.dtype in fused._MARKS and among.is_contiguous())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Small:
    return Small(monkeypatch).set()


def placed(tensors: Sequence[Tensor | None]) -> list[Any]:
    return [None if t is None else t.to(DEVICE).contiguous() for t in tensors]


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    problems(dtypes=RANKED),
    st.booleans(),
    st.sampled_from((16, 64)),
    st.integers(1, 40),
    st.sampled_from((0.05, 0.5)),
)
def test_selection_is_sorting(
    problem: Problem, absolute: bool, block: int, sample: int, few: float
) -> None:
    scores, among, _ = problem
    with pytest.MonkeyPatch.context() as patch:
        Small(patch).set(block=block, sample=sample, few=few)
        ranking = Ranking(placed(scores), among=placed(among), absolute=absolute)
        assert ranking._fused is not None
        assert_sorts(ranking, problem, absolute)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("dtype", RANKED)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_adversarial_scores_against_a_stable_sort(
    distribution: str, dtype: torch.dtype, absolute: bool, small: Small
) -> None:
    small.set(block=512, sample=256)
    n = 6000
    whole = DISTRIBUTIONS[distribution](n).to(dtype)
    sortable = whole.abs() if absolute else whole
    order = torch.sort(sortable.float(), stable=True).indices
    parts = [part.to(DEVICE) for part in whole.split([1, 4000, 1999])]
    for k in (1, n // 5, n // 2, n - 1, n):
        expected = torch.zeros(n, dtype=torch.bool)
        expected[order[:k]] = True
        marked = torch.cat(lowest(parts, k, absolute=absolute)).cpu()
        assert torch.equal(marked, expected)


def test_what_is_collected_is_sorted(small: Small) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("digits are counted where several ranks add counts up")

    small.set(few=0.9)
    small.patch.setattr(candidates, "kth_lowest", refused)
    score = uniform(4000).round(decimals=2)  # many equal ones
    marked = lowest([score.to(DEVICE)], 1234, absolute=True)
    assert flat(marked) == by_sorting([score], 1234, None, True)


@pytest.mark.parametrize(
    ("distribution", "searches"),
    [("uniform", 0), ("sorted", 0), ("all equal", 1), ("misleading", 1)],
)
def test_all_entries_are_searched_where_the_sample_does_not_help(
    distribution: str, searches: int, small: Small
) -> None:
    small.set(block=512, sample=256, few=0.4)
    lowest([DISTRIBUTIONS[distribution](20_000).to(DEVICE)], 4000, absolute=True)
    assert small.searches_of_all == searches


def test_too_many_to_collect_are_searched_where_they_lie(small: Small) -> None:
    small.set(block=512, sample=256, few=0.4)
    score = uniform(20_000).abs()
    score[1::2] = 0.1  # the sample's stride is odd, but these lie where its guess does
    expected = by_sorting([score], 5000, None, True)
    small.patch.setattr(fused, "_FEW", 0.6)
    ranking = Ranking([score.to(DEVICE)], absolute=True)
    assert ranking._fused is not None
    ranking._fused._own = 10  # as on a rank that has less workspace than it needs
    assert flat(ranking.cut(5000).goes()) == expected
    assert small.searches_of_all == 1


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("nan", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, -0x400000, -1])
@pytest.mark.parametrize("k", [0, 300])
def test_nan_of_every_kind(nan: int, k: int, absolute: bool, small: Small) -> None:
    score = uniform(1000)
    score.view(torch.int32)[777] = nan
    alive = torch.ones(1000)
    scores = placed([uniform(500), score])
    with pytest.raises(ValueError, match=r"scores\[1\]: expected numbers, got 1 NaN"):
        lowest(scores, k, among=placed([None, alive]), absolute=absolute)
    alive[777] = 0
    assert sum(int(m.sum()) for m in lowest(scores, k, among=placed([None, alive]))) == k


@pytest.mark.parametrize("dtype", [*RANKED, torch.float64, torch.bool, torch.int32])
def test_marks_are_written_in_whatever_dtype(dtype: torch.dtype, small: Small) -> None:
    score, alive = uniform(1000).to(DEVICE), (uniform(1001)[1:] < 0.3).to(DEVICE)
    cut = Ranking([score, score[:100]], among=[alive, None], absolute=True).cut(300)
    outs = [torch.empty(1000, dtype=dtype, device=DEVICE), torch.empty(100, device=DEVICE)]
    cut.write_stays(outs)
    assert all(out._version == 1 for out in outs)
    for out, stays in zip(outs, cut.stays(), strict=True):
        assert torch.equal(out, stays.to(out.dtype))
    assert int(outs[0].sum() + outs[1].sum()) == int(alive.sum()) + 100 - 300


@pytest.mark.parametrize("shape", [(40, 25), (25, 40)])
def test_transposed_outputs(shape: tuple[int, int], small: Small) -> None:
    cut = Ranking([uniform(1000).view(shape).to(DEVICE)], absolute=True).cut(400)
    out = torch.empty(shape[::-1], device=DEVICE).t()
    cut.write_stays([out])
    assert torch.equal(out, cut.stays()[0].float())


@pytest.mark.parametrize("dtype", RANKED)
def test_rounds_of_global_pruning_equal_those_of_the_cpu(dtype: torch.dtype, small: Small) -> None:
    def layers() -> nn.ModuleList:
        made = nn.ModuleList(nn.Linear(n, 20, bias=n == 30) for n in (20, 30, 7)).to(dtype)
        with torch.no_grad():
            for number, parameter in enumerate(made.parameters()):
                values = uniform(parameter.numel() + number)[number:]
                parameter.copy_(values.view_as(parameter).round(decimals=2))
        return made

    model, twin = layers().to(DEVICE), layers()
    for amount in (0.2, 0.2, 17, 0.5, 0.0):
        for net in (model, twin):
            if net is twin:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(selection, "fused_passes", lambda *_: None)
                    prune(net, amount)
            else:
                prune(net, amount)
        for layer, other in zip(model, twin, strict=True):
            assert torch.equal(layer.weight_mask.cpu(), other.weight_mask)
            assert layer.weight_mask.dtype == dtype


def prune(net: nn.ModuleList, amount: float) -> None:
    parameters = [(layer, "weight") for layer in net]
    torch_rsst.global_unstructured(parameters, torch_rsst.GlobalL1, amount=amount)


SHARDS: dict[str, Callable[[], list[Layout]]] = {
    "rows": lambda: [Layout((6, 100), (2, 0), (3, 100), True)],
    "columns": lambda: [Layout((30, 20), (0, 5), (30, 10), True)],
    "replica": lambda: [Layout((30, 10), (0, 0), (30, 10), False)],
}


@pytest.mark.parametrize("kind", SHARDS)
def test_parts_of_sharded_tensors_are_marked_by_where_they_lie_in_the_whole(
    kind: str, small: Small
) -> None:
    (layout,) = SHARDS[kind]()
    part = uniform(300).round(decimals=1).view(layout.size)
    other = uniform(200).round(decimals=1)

    def ranking(device: torch.device, passes: Any) -> Ranking:
        """As on a rank that holds a part of the first tensor."""
        small.patch.setattr(selection, "fused_passes", lambda *_: None)
        made = Ranking([part.to(device), other.to(device)], absolute=True)
        first, second = made._columns
        whole = layout.shape[0] * layout.shape[1]
        made._columns = [
            Column(first.scores, None, 0, first.scratch, layout, layout.counts),
            Column(second.scores, None, whole, second.scratch),
        ]
        made._entries = sum(c.scores.numel() for c in made._columns if c.counts)
        made._fused = passes(made._columns)
        return made

    for k in (1, 70, 150, 199):
        cuts = [
            ranking(torch.device("cpu"), lambda _: None).cut(k),
            ranking(DEVICE, fused.Fused).cut(k),
        ]
        assert cuts[0].key == cuts[1].key
        for marks, expected in zip(cuts[1].goes(), cuts[0].goes(), strict=True):
            assert torch.equal(marks.cpu(), expected)


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_obstacles", {})
    monkeypatch.setattr(fused, "_told", set())


@pytest.mark.usefixtures("untried")
def test_kernels_that_run_are_relied_on() -> None:
    assert fused._obstacle(DEVICE) == ""
    fused.tell_of_obstacles()


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize("broken", ["result", "compiler"])
def test_kernels_are_tried_before_they_are_relied_on(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = fused._Group.launch

    def other(group: Any, kernel: Any, *arguments: Any, **rest: Any) -> None:
        if broken == "compiler":
            raise RuntimeError("Failed to find C compiler")
        launch(group, kernel, *arguments, **rest | {"goes": False} if "goes" in rest else rest)

    monkeypatch.setattr(fused._Group, "launch", other)
    assert fused._obstacle(DEVICE)
    said = {
        "result": "its kernels give other results than sorting",
        "compiler": r"Triton cannot build kernels \(RuntimeError: Failed to find C compiler\)",
    }
    with pytest.warns(RSSTWarning, match=f"Ranking on {DEVICE} goes tensor by .*: {said[broken]}"):
        fused.tell_of_obstacles()
    fused.tell_of_obstacles()  # says it once


@pytest.mark.usefixtures("untried")
def test_a_lack_of_memory_says_nothing_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(fused._Group, "launch", full)
        assert fused._obstacle(DEVICE) == "there is no memory to try them"
        fused.tell_of_obstacles()
    assert fused._obstacle(DEVICE) == ""


COMPILE = """
from triton import compile, language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from torch_rsst.selection import kernels

pointers = {"table": "*i64", "count": "*i64", "counts": "*i64", "sample": "*i32", "found": "*i32",
            "tensor_of": "*i32", "index_of": "*i64"}
numbers = dict.fromkeys(("stride", "low", "high", "workspace", "key"), "i32")
for score, among, absolute in ((tl.float32, tl.float32, True), (tl.bfloat16, None, False),
                               (tl.float16, tl.int8, True)):
    chosen = {"score": score, "among": among, "absolute": absolute, "block": 1024,
              "out": tl.float32, "goes": absolute}
    for kernel in (kernels.count_and_sample, kernels.survey, kernels.mark):
        names = kernel.arg_names
        types = {n: (pointers | numbers).get(n, "constexpr") for n in names}
        constants = {(names.index(n),): v for n, v in chosen.items() if n in names}
        source = ASTSource(fn=kernel, signature=types, constexprs=constants)
        print(kernel.__name__, len(compile(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]))
"""


def test_kernels_compile_for_a_device_that_is_not_here() -> None:
    # The interpreter takes what a compiler would not.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.splitlines()) == 9


def test_what_kernels_do_not_hold_goes_block_by_block() -> None:
    scratch = Ranking([torch.ones(1)])._columns[0].scratch
    column = Column(torch.ones(4, 5), None, 0, scratch)
    assert not fused.suits([column])  # on the CPU
    assert selection.fused_passes([column], alone) is None


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (torch.ones(4, 5), True),
        (torch.ones(4, 5).bfloat16(), True),
        (torch.ones(4, 5).t(), False),
        (torch.ones(4, 5).double(), False),
    ],
)
def test_kernels_are_taken_where_they_suit(scores: Tensor, expected: bool) -> None:
    ranking = Ranking([scores.cuda()], absolute=True)
    assert (ranking._fused is not None) == expected
    assert int(ranking.cut(7).goes()[0].sum()) == 7

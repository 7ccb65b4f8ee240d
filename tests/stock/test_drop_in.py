"""``import torch_rsst as prune`` in place of ``from torch.nn.utils import prune``."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as stock

import torch_rsst
import torch_rsst as prune

# As with PyTorch, remove() is called without a word about the zeros that it leaves.
pytestmark = pytest.mark.filterwarnings("ignore::torch_rsst.UnfrozenZerosWarning")

DEFINED = sorted(
    name
    for name, value in vars(stock).items()
    if getattr(value, "__module__", None) == stock.__name__
    and (inspect.isclass(value) or inspect.isfunction(value))
)


def test_the_stock_module_defines_something() -> None:
    assert {"BasePruningMethod", "l1_unstructured", "_validate_pruning_dim"} <= set(DEFINED)


@pytest.mark.parametrize("name", DEFINED)
def test_everything_defined_there_is_here(name: str) -> None:
    ours, theirs = getattr(torch_rsst, name), getattr(stock, name)
    if inspect.isclass(theirs):
        assert issubclass(ours, theirs)
        assert ours.compute_mask is theirs.compute_mask
    if not name.startswith("_"):
        assert name in torch_rsst.__all__


@pytest.mark.parametrize("name", [n for n in DEFINED if inspect.isfunction(getattr(stock, n))])
def test_signatures_only_gain_keyword_arguments(name: str) -> None:
    ours = inspect.signature(getattr(torch_rsst, name)).parameters
    theirs = inspect.signature(getattr(stock, name)).parameters
    shared = [p for p in ours.values() if p.name in theirs]
    assert [(p.name, p.kind, p.default) for p in shared] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]
    gained = [p for p in ours.values() if p.name not in theirs]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in gained)
    assert all(p.default is not inspect.Parameter.empty for p in gained)


@pytest.mark.parametrize("name", torch_rsst.__all__)
def test_all_names_exist(name: str) -> None:
    assert hasattr(torch_rsst, name)


def test_all_is_sorted_and_without_repeats() -> None:
    assert len(set(torch_rsst.__all__)) == len(torch_rsst.__all__)


def test_unknown_attributes_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'l1_structured'"):
        _ = torch_rsst.l1_structured


@pytest.mark.parametrize("method", [prune.GlobalL1, prune.HeadRegroup, prune.Fillback])
def test_methods_keep_the_stock_apply(method: Any) -> None:
    ours = inspect.signature(method.apply).parameters
    theirs = inspect.signature(stock.BasePruningMethod.apply).parameters
    assert [name for name in ours if name in theirs] == list(theirs)
    assert {name for name in ours if name not in theirs} == {"process_group"}
    assert ours["process_group"].kind is inspect.Parameter.KEYWORD_ONLY
    assert issubclass(method, stock.BasePruningMethod)


def test_a_stock_script_runs() -> None:
    net = nn.Sequential(nn.Linear(10, 4), nn.ReLU(), nn.Linear(4, 1))
    prune.random_unstructured(net[0], name="weight", amount=0.3)
    prune.l1_unstructured(net[0], name="bias", amount=3)
    prune.ln_structured(net[0], name="weight", amount=0.5, n=2, dim=0)
    prune.custom_from_mask(net[2], name="bias", mask=torch.tensor([0]))
    parameters = ((net[0], "weight"), (net[2], "weight"))
    prune.global_unstructured(parameters, pruning_method=prune.L1Unstructured, amount=2)
    assert prune.is_pruned(net)
    assert all(isinstance(h, stock.BasePruningMethod) for h in net[0]._forward_pre_hooks.values())
    net(torch.ones(2, 10)).sum().backward()
    for module, name in [*parameters, (net[0], "bias"), (net[2], "bias")]:
        assert prune.remove(module, name) is module
    assert not prune.is_pruned(net)
    assert int((net[0].bias == 0).sum()) == 3


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_stock_remove_undoes_ours(name: str) -> None:
    layer = nn.Linear(4, 3)
    original = getattr(layer, name)
    prune.global_unstructured([(layer, name)], prune.GlobalL1, amount=2)
    prune.remove(layer, name)
    assert getattr(layer, name) is original
    assert int((original == 0).sum()) == 2
    assert list(layer._parameters) == ["weight", "bias"]
    with pytest.raises(ValueError, match="has to be pruned before"):
        prune.remove(layer, name)


def test_patching_the_stock_rule_is_honored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        stock.L1Unstructured, "compute_mask", lambda self, t, default_mask: torch.zeros_like(t)
    )
    layer = nn.Linear(4, 3)
    prune.global_unstructured([(layer, "weight")], prune.L1Unstructured, amount=1)
    assert int(layer.weight_mask.sum()) == 0

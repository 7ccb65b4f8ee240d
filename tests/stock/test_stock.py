"""PyTorch's own pruning functions, called through this library: same result, none of the faults."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import gradient_step, linear, same, tokens
from torch import nn
from torch.nn.utils import prune as stock

import torch_rsst as prune
from torch_rsst.stock import stock as stock_calls

# As with PyTorch, remove() is called without a word about the zeros that it leaves.
pytestmark = pytest.mark.filterwarnings("ignore::torch_rsst.UnfrozenZerosWarning")

Fingerprint = Callable[[nn.Module], list[Any]]
MASK = torch.tensor([[1.0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 0]])
CALLS: dict[str, dict[str, Any]] = {
    "identity": {},
    "random_unstructured": {"amount": 0.5},
    "l1_unstructured": {"amount": 4},
    "random_structured": {"amount": 1, "dim": 0},
    "ln_structured": {"amount": 1, "n": 2, "dim": 1},
    "custom_from_mask": {"mask": MASK},
}
every_call = pytest.mark.parametrize(("call", "arguments"), CALLS.items(), ids=CALLS)


def pruned(call: str, arguments: dict[str, Any], times: int = 1) -> nn.Linear:
    layer = linear()
    torch.manual_seed(0)
    for _ in range(times):
        assert getattr(prune, call)(layer, "weight", **arguments) is layer
    return layer


@every_call
@pytest.mark.parametrize("times", [1, 2])
def test_the_mask_is_that_of_the_stock_function(
    call: str, arguments: dict[str, Any], times: int
) -> None:
    theirs = linear()
    torch.manual_seed(0)
    for _ in range(times):
        getattr(stock, call)(theirs, "weight", **arguments)
    ours = pruned(call, arguments, times)
    assert same(ours.weight_mask, theirs.weight_mask)
    assert same(ours.weight, theirs.weight)
    hooks = [[type(h) for h in m._forward_pre_hooks.values()] for m in (ours, theirs)]
    assert hooks[0] == hooks[1]


@every_call
def test_the_order_of_parameters_is_kept(call: str, arguments: dict[str, Any]) -> None:
    layer = pruned(call, arguments)
    assert [name for name, _ in layer.named_parameters()] == ["weight_orig", "bias"]
    prune.remove(layer, "weight")
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert type(layer) is nn.Linear
    assert not layer._forward_pre_hooks
    assert "weight" not in vars(layer)


@every_call
def test_a_pruned_module_can_be_copied(call: str, arguments: dict[str, Any]) -> None:
    layer = pruned(call, arguments)
    layer(tokens(0, 2, 4)).sum().backward()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert same(twin.weight, layer.weight)
        assert same(twin(tokens(0, 2, 4)), layer(tokens(0, 2, 4)))


@every_call
def test_the_weight_is_never_stale(call: str, arguments: dict[str, Any]) -> None:
    layer = pruned(call, arguments)
    gradient_step(layer, torch.optim.SGD(layer.parameters(), lr=0.1), 0)
    assert same(layer.weight, layer.weight_orig * layer.weight_mask)
    state = layer.state_dict()
    layer.load_state_dict({**state, "weight_orig": 3 * state["weight_orig"]})
    assert same(layer.weight, layer.weight_orig * layer.weight_mask)


def test_scores_follow_the_present_weights() -> None:
    layer = pruned("identity", {})
    with torch.no_grad():
        layer.weight_orig[1, 2] = 1e-3  # after the product was stored
    prune.l1_unstructured(layer, "weight", 1)
    assert layer.weight_mask.flatten().argmin() == 6


@pytest.mark.parametrize(
    ("call", "arguments", "error"),
    [
        ("l1_unstructured", {"amount": 99}, ValueError),
        ("random_unstructured", {"amount": 1.5}, ValueError),
        ("ln_structured", {"amount": 1, "n": 2, "dim": 9}, IndexError),
        ("custom_from_mask", {"mask": torch.ones(2, 2)}, (AssertionError, RuntimeError)),
    ],
)
@pytest.mark.parametrize("before", [[], ["identity"], ["ours"], ["identity", "ours"]])
def test_a_failing_call_changes_nothing(
    call: str,
    arguments: dict[str, Any],
    error: Any,
    before: list[str],
    fingerprint: Fingerprint,
) -> None:
    layer = linear()
    for step in before:
        if step == "ours":
            prune.global_unstructured([(layer, "weight")], prune.GlobalL1, amount=1)
        else:
            prune.identity(layer, "weight")
    state = fingerprint(layer)
    with pytest.raises(error):
        getattr(prune, call)(layer, "weight", **arguments)
    assert fingerprint(layer) == state


ODD_VALUES = [0.5, 2.0, -1.0, float("nan"), float("inf")]


@pytest.mark.parametrize("value", ODD_VALUES)
@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("where", [(0, 0), (0, 1)])  # the second is masked before
def test_a_mask_of_other_values_than_0_and_1_is_refused_and_changes_nothing(
    value: float, by_name: bool, where: tuple[int, int], fingerprint: Fingerprint
) -> None:
    mask = torch.ones(3, 4)
    mask[where] = value
    args, named = ((), {"mask": mask}) if by_name else ((mask,), {})
    text = r"mask of 'weight' of Linear: expected zeros and ones, got other values\. Compare with"
    for layer in (linear(), pruned("custom_from_mask", {"mask": MASK})):
        before = fingerprint(layer)
        with pytest.raises(ValueError, match=text):
            prune.custom_from_mask(layer, "weight", *args, **named)
        assert fingerprint(layer) == before


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16])
def test_masks_of_zeros_and_ones_are_taken_in_every_dtype(dtype: torch.dtype) -> None:
    layer = prune.custom_from_mask(linear(), "weight", MASK.to(dtype))
    assert same(layer.weight_mask, MASK)


def test_a_rule_that_makes_fractions_is_refused_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, fingerprint: Fingerprint
) -> None:
    class Soft(stock.BasePruningMethod):
        PRUNING_TYPE = "unstructured"

        def compute_mask(self, t: torch.Tensor, default_mask: torch.Tensor) -> torch.Tensor:
            return default_mask * 0.5

    layer = linear()
    before = fingerprint(layer)
    with pytest.raises(ValueError, match="mask of Soft: expected zeros and ones"):
        prune.global_unstructured([(layer, "weight")], Soft)
    monkeypatch.setattr(stock.Identity, "compute_mask", Soft.compute_mask)
    with pytest.raises(ValueError, match="mask of 'weight' of Linear: expected zeros and ones"):
        prune.identity(layer, "weight")
    assert fingerprint(layer) == before


@every_call
@pytest.mark.parametrize("times", [1, 2])
def test_masks_made_in_inference_mode_can_be_trained_with(
    call: str, arguments: dict[str, Any], times: int
) -> None:
    layer = linear()
    with torch.inference_mode():
        for _ in range(times):
            getattr(prune, call)(layer, "weight", **arguments)
        assert torch.is_inference_mode_enabled()
    assert not layer.weight_mask.is_inference()
    gradient_step(layer, torch.optim.SGD(layer.parameters(), lr=0.1), 0)
    assert same(layer.weight == 0, layer.weight_mask == 0)
    with torch.inference_mode():
        prune.remove(layer, "weight", freeze_zeros=True)
    gradient_step(layer, torch.optim.SGD(layer.parameters(), lr=0.1), 1)


def test_a_mask_that_requires_a_gradient_leaves_a_module_that_can_be_copied() -> None:
    layer = prune.custom_from_mask(linear(), "weight", MASK.clone().requires_grad_())
    assert torch.equal(copy.deepcopy(layer).weight_mask, MASK)


def test_a_mask_that_was_computed_with_a_graph_is_copied_with_its_module() -> None:
    """The hook of a custom mask keeps it, beside the buffer."""
    scores = torch.rand(MASK.shape, requires_grad=True)
    mask = torch.where(MASK > 0, (scores - scores) + 1.0, 0.0 * scores)
    layer = prune.custom_from_mask(linear(), "weight", mask=mask)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin.weight_mask, MASK.to(twin.weight_mask))
    assert mask.requires_grad


def test_recurrent_layers_keep_their_list_of_weights() -> None:
    recurrent = nn.LSTM(2, 3)
    order = list(recurrent._parameters)
    prune.l1_unstructured(recurrent, "weight_ih_l0", 0.5)
    assert same(recurrent._flat_weights[0], recurrent.weight_ih_l0)
    assert sum(isinstance(w, nn.Parameter) for w in recurrent._flat_weights) == 3
    prune.remove(recurrent, "weight_ih_l0")
    assert list(recurrent._parameters) == order
    assert all(isinstance(w, nn.Parameter) for w in recurrent._flat_weights)


def test_errors_stay_those_of_pytorch() -> None:
    with pytest.raises(AttributeError):
        prune.l1_unstructured(linear(), "nothing", 1)
    with pytest.raises(AttributeError):
        prune.l1_unstructured(3, "weight", 1)
    with pytest.raises(ValueError, match="has to be pruned before pruning can be removed"):
        prune.remove(linear(), "weight")


@pytest.mark.parametrize("call", [*CALLS, "remove"])
@pytest.mark.parametrize("name", [None, 3, b"weight"])
def test_a_name_that_is_no_text_is_told_before_anything_changes(call: str, name: object) -> None:
    layer = linear()
    before = layer.weight.clone()
    with pytest.raises(
        TypeError, match=r"^name: expected the name of a parameter, got .* as in 'weight'"
    ):
        getattr(prune, call)(layer, name, **CALLS.get(call, {}))
    assert [key for key, _ in layer.named_parameters()] == ["weight", "bias"]
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("name", [*CALLS, "remove"])
def test_functions_look_like_the_stock_ones(name: str) -> None:
    ours, theirs = getattr(prune, name), getattr(stock, name)
    gained = [] if name == "remove" else ["process_group"]
    known = dict(inspect.signature(ours).parameters)
    assert [known.pop(each).kind for each in gained] == [inspect.Parameter.KEYWORD_ONLY] * len(
        gained
    )
    assert known == inspect.signature(theirs).parameters
    assert ours.__doc__.startswith(theirs.__doc__)
    assert all(each in ours.__doc__ for each in gained)
    assert pickle.loads(pickle.dumps(ours)) is ours


def test_a_removal_that_fails_keeps_latents_and_mask(fingerprint: Fingerprint) -> None:
    class Stubborn(nn.Linear):
        closed = False

        def __setattr__(self, name: str, value: Any) -> None:
            if self.closed and name == "weight":
                raise RuntimeError("closed")
            super().__setattr__(name, value)

    layer = Stubborn(4, 3)
    prune.l1_unstructured(layer, "weight", 5)
    layer.closed = True
    before = fingerprint(layer)
    with pytest.raises(RuntimeError, match="closed"):
        prune.remove(layer, "weight")
    assert fingerprint(layer) == before


def test_a_hook_with_a_removal_of_its_own_is_asked() -> None:
    class Telling(stock.L1Unstructured):
        removed = 0

        def remove(self, module: nn.Module) -> None:
            type(self).removed += 1
            super().remove(module)

    layer = linear()
    Telling.apply(layer, "weight", amount=1)
    prune.remove(layer, "weight")
    assert Telling.removed == 1
    assert not prune.is_pruned(layer)


def test_zeros_stay_frozen_where_a_stock_call_fails_at_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = nn.Linear(3, 2)
    prune.apply_mask(layer, {"weight": torch.eye(2, 3)})
    prune.remove_all(layer, freeze_zeros=True)
    end_freeze = stock_calls.end_freeze

    def fail(ref: Any) -> None:
        end_freeze(ref)
        raise KeyboardInterrupt

    monkeypatch.setattr(stock_calls, "end_freeze", fail)
    with pytest.raises(KeyboardInterrupt):
        prune.l1_unstructured(layer, "weight", amount=1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert layer.weight[torch.eye(2, 3) == 0].tolist() == [0.0] * 4

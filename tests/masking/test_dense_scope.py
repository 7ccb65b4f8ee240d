"""Within ``dense_weights`` no call changes, or counts on, masks that are put back on leaving."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import gradient_step, mlp
from torch import nn

import torch_rsst
from torch_rsst.testing import assert_mask_invariants

Fingerprint = Callable[[nn.Module], list[Any]]
REFUSED = r"expected a model whose masks are in place, got one within dense_weights\(\)"


def masked() -> nn.Sequential:
    model = mlp()
    torch_rsst.apply_mask(model, {"0.weight": torch.arange(32).reshape(8, 4) % 3 > 0})
    return model


GROUPS = torch_rsst.find_groups(mlp())
EYE = torch.eye(8, 4)
OTHER, AVERAGE = mlp(seed=3), masked()
CALLS: dict[str, Callable[[nn.Module], object]] = {
    "remove_all": torch_rsst.remove_all,
    "remove_all of a part": lambda m: torch_rsst.remove_all(m[0]),
    "remove": lambda m: torch_rsst.remove(m[0], "weight"),
    "apply_mask": lambda m: torch_rsst.apply_mask(m, {"0.weight": EYE}),
    "apply_mask of what was dense": lambda m: torch_rsst.apply_mask(m, {"0.bias": torch.ones(8)}),
    "prepare_from_state_dict": lambda m: torch_rsst.prepare_from_state_dict(
        m, AVERAGE.state_dict()
    ),
    "load_dense_state_dict": lambda m: torch_rsst.load_dense_state_dict(
        m, OTHER.state_dict(), mask="remove"
    ),
    "custom_from_mask": lambda m: torch_rsst.custom_from_mask(m[0], "weight", EYE),
    "l1_unstructured": lambda m: torch_rsst.l1_unstructured(m[0], "weight", 0.5),
    "global_unstructured": lambda m: torch_rsst.global_unstructured(
        [(m[0], "weight")], torch_rsst.GlobalL1, amount=1
    ),
    "head_structured": lambda m: torch_rsst.head_structured(m[0], "weight", 1, 2, projections=1),
    "fillback": lambda m: torch_rsst.fillback(m[0], "weight", 1),
    "follow": lambda m: torch_rsst.follow(m, [AVERAGE]),
    "compact": lambda m: torch_rsst.compact(m, GROUPS),
    "reconstruct": lambda m: torch_rsst.reconstruct(
        m, GROUPS, torch_rsst.regroup(m, GROUPS), batches=[torch.ones(5, 4)]
    ),
    "RegularizedPruner": lambda m: torch_rsst.RegularizedPruner(
        m, {"0.weight": EYE}, total_steps=1
    ),
    "RSST": lambda m: torch_rsst.RSST(m, GROUPS, steps_per_round=1),
    "Refill": lambda m: torch_rsst.Refill(m, GROUPS, steps_per_round=1),
}


@pytest.mark.filterwarnings("ignore::torch_rsst.RSSTWarning")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_calls_that_change_masks_are_refused_within_a_block_and_change_nothing(
    call: Callable[[nn.Module], object], fingerprint: Fingerprint
) -> None:
    model = masked()
    outside = fingerprint(model)
    with torch_rsst.dense_weights(model):
        inside = fingerprint(model)
        with pytest.raises(RuntimeError, match=REFUSED):
            call(model)
        assert fingerprint(model) == inside
    assert fingerprint(model) == outside
    call(model)  # outside it works


@pytest.mark.filterwarnings("ignore::torch_rsst.RSSTWarning")
@pytest.mark.parametrize("method", ["next", "finalize", "state_dict", "load_state_dict"])
def test_rounds_neither_go_on_nor_are_saved_within_a_block(
    method: str, fingerprint: Fingerprint
) -> None:
    model = masked()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    refill = torch_rsst.Refill(model, GROUPS, optimizer=optimizer, steps_per_round=1, rounds=2)
    opened = next(refill)
    gradient_step(model, optimizer, 0)
    state, before = refill.state_dict(), fingerprint(model)
    calls: dict[str, Callable[[], object]] = {
        "next": lambda: next(refill),
        "finalize": refill.finalize,
        "state_dict": refill.state_dict,
        "load_state_dict": lambda: refill.load_state_dict(state),
    }
    with (
        torch_rsst.dense_weights(model),
        pytest.raises(RuntimeError, match=f"^Refill: {REFUSED}"),
    ):
        calls[method]()
    assert fingerprint(model) == before
    assert refill.round is opened
    assert opened.pruner.attached
    calls[method]()


def test_who_shares_a_masked_weight_with_a_block_keeps_its_mask_too(
    fingerprint: Fingerprint,
) -> None:
    head, outside = nn.Linear(4, 3, bias=False), nn.Embedding(3, 4)
    outside.weight = head.weight
    torch_rsst.apply_mask(head, {"weight": torch.eye(3, 4)})
    before = fingerprint(outside)
    with torch_rsst.dense_weights(head), pytest.raises(RuntimeError, match=REFUSED):
        torch_rsst.remove_all(outside)
    assert fingerprint(outside) == before
    assert outside.weight_mask is head.weight_mask
    assert_mask_invariants(nn.Sequential(head, outside))


def test_copies_made_within_a_block_and_other_models_are_free() -> None:
    model, other = masked(), masked()
    with torch_rsst.dense_weights(model):
        for each in (copy.deepcopy(model), other):
            torch_rsst.apply_mask(each, {"0.weight": EYE})
            torch_rsst.remove_all(each, freeze_zeros=False)
            assert torch_rsst.extract_mask(each) == {}
    assert torch_rsst.extract_mask(model).keys() == {"0.weight"}


def test_a_module_that_two_blocks_have_taken_the_masks_of_stays_so_until_both_end() -> None:
    first, second, shared = nn.Linear(2, 3), nn.Linear(3, 2), nn.GRUCell(2, 3)
    shared.weight_ih, shared.weight_hh = first.weight, second.weight
    for part in (first, second):
        torch_rsst.apply_mask(part, {"weight": torch.eye(*part.weight.shape)})
    with torch_rsst.dense_weights(first):
        with torch_rsst.dense_weights(second):
            pass
        with pytest.raises(RuntimeError, match=REFUSED):
            torch_rsst.remove_all(shared, freeze_zeros=False)
    torch_rsst.remove_all(shared, freeze_zeros=False)

"""Rounds that refit the consumers of what goes, and the importance they use by default."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import gradient_step, mlp, tokens
from torch import Tensor, nn

from torch_rsst import RSST, Refill, apply_mask, extract_mask, find_groups, reconstruct, regroup
from torch_rsst.importance.batches import DataSource
from torch_rsst.masking.names import named_weights
from torch_rsst.reconstruction.reconstruction import Reconstruction, reconstruct_towards

BATCHES = [tokens(50 + i, 20, 4) for i in range(2)]


def rounds_of(method: Any, **kwargs: Any) -> tuple[Any, nn.Module, Any]:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    arguments = {"steps_per_round": 3, "rounds": 2, "regroup_amount": 0.5, **kwargs}
    return method(model, find_groups(model), optimizer=optimizer, **arguments), model, optimizer


def train(rnd: Any, model: nn.Module, optimizer: Any) -> None:
    for step in range(rnd.start_step, 3):
        gradient_step(model, optimizer, 10 * rnd.index + step)


def equal(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("how", ["least_squares", "mean"])
def test_refill_refits_whenever_a_round_opens(how):
    refill, model, optimizer = rounds_of(Refill, reconstruct=how, batches=BATCHES)
    for _ in range(2):
        before = copy.deepcopy(model)
        rnd = next(refill)
        reconstruct(before, find_groups(mlp()), rnd.refill_mask, batches=BATCHES, method=how)
        assert equal(model, before)
        train(rnd, model, optimizer)
    trained = copy.deepcopy(model)
    refill.finalize()  # nothing more goes
    assert equal(model, trained)


@pytest.mark.parametrize("how", ["least_squares", "mean"])
def test_rsst_refits_at_the_end_towards_the_model_as_the_last_round_opened(how):
    rsst, model, optimizer = rounds_of(RSST, reconstruct=how, batches=BATCHES)
    for rnd in rsst:
        opened = copy.deepcopy(model)
        train(rnd, model, optimizer)
    trained = copy.deepcopy(model)
    rsst.finalize()
    data = DataSource(BATCHES)
    masks = extract_mask(model)
    reconstruct_towards(
        trained, find_groups(mlp()), masks, Reconstruction(how), data,
        reference=opened, replicas=None,
    )  # fmt: skip
    assert equal(model, trained)
    plain = copy.deepcopy(trained)
    apply_mask(plain, masks)
    assert not equal(model, opened)


def test_finalize_alone_refits_towards_the_model_before_the_cut():
    rsst, model, optimizer = rounds_of(RSST)
    for rnd in rsst:
        train(rnd, model, optimizer)
    trained = copy.deepcopy(model)
    rsst.finalize(reconstruct="least_squares", batches=BATCHES)
    reconstruct(trained, find_groups(mlp()), extract_mask(model), batches=BATCHES)
    assert equal(model, trained)


def test_finalize_can_take_other_batches_and_another_method():
    rsst, model, optimizer = rounds_of(RSST, reconstruct="least_squares", batches=BATCHES, rounds=1)
    other, second, second_optimizer = rounds_of(
        RSST, reconstruct="least_squares", batches=BATCHES, rounds=1
    )
    for rounds, m, o in ((rsst, model, optimizer), (other, second, second_optimizer)):
        for rnd in rounds:
            train(rnd, m, o)
    weight = named_weights(second)["2.weight"].clone()
    rsst.finalize()
    other.finalize(reconstruct="mean", batches=[tokens(7, 30, 4)])
    assert torch.equal(second[2].weight_orig, weight)
    assert not torch.equal(model[2].weight_orig, weight)


@pytest.mark.parametrize("method", [RSST, Refill])
@pytest.mark.parametrize("stop", [0, 1])
def test_a_resumed_run_ends_as_an_uninterrupted_one(method, stop):
    arguments = {"reconstruct": "least_squares", "batches": BATCHES}
    whole, model, optimizer = rounds_of(method, **arguments)
    for rnd in whole:
        train(rnd, model, optimizer)
    whole.finalize()
    first, broken, optimizer = rounds_of(method, **arguments)
    for rnd in first:
        if rnd.index == stop:
            gradient_step(broken, optimizer, 10 * rnd.index)
            break
        train(rnd, broken, optimizer)
    state = copy.deepcopy(first.state_dict())
    assert (state["reference"] is not None) == (method is RSST)
    second, resumed, fresh = rounds_of(method, **arguments)
    second.load_state_dict(state)
    resumed.load_state_dict(broken.state_dict())
    fresh.load_state_dict(optimizer.state_dict())
    for rnd in second:
        train(rnd, resumed, fresh)
    second.finalize()
    assert equal(model, resumed)
    assert second.state_dict()["reference"] is None  # it is not needed any more
    other, *_ = rounds_of(method, batches=BATCHES)
    with pytest.raises(ValueError, match="state of rounds"):
        other.load_state_dict(state)


@pytest.mark.parametrize("method", [RSST, Refill])
def test_the_default_importance_looks_at_data_where_there_is_some(method):
    for arguments, importance in (
        ({}, "magnitude"),
        ({"batches": BATCHES}, "obs"),
        ({"batches": BATCHES, "reconstruct": "mean"}, "obs"),
    ):
        rounds, model, _ = rounds_of(method, **arguments)
        assert rounds.state_dict()["settings"]["importance"] == importance
        before = copy.deepcopy(model)
        expected = regroup(
            before,
            find_groups(model),
            amount=0.5,
            fillback_rate=0.1 if method is Refill else 0.0,
            importance=rounds.regrouping.importance,
            current_mask=getattr(
                next(rounds), "ranked_mask" if arguments == {} else "current_mask"
            ),
            batches=arguments.get("batches"),
        )
        assert all(torch.equal(rounds.round.refill_mask[k], m) for k, m in expected.items())


@pytest.mark.parametrize("method", [RSST, Refill])
def test_weights_alone_can_score_where_batches_are_for_the_refit(method):
    rounds, *_ = rounds_of(method, importance="magnitude", reconstruct="mean", batches=BATCHES)
    assert next(rounds).index == 0


def test_what_is_refused_when_rounds_are_made():
    for method in (RSST, Refill):
        text = r"reconstruct: expected rewind=None, got both\. Rewinding would undo the refit"
        with pytest.raises(ValueError, match=text):
            rounds_of(method, reconstruct="mean", rewind="init", batches=BATCHES)
        with pytest.raises(
            ValueError, match="batches: expected batches to run on, for reconstruct"
        ):
            rounds_of(method, reconstruct="mean")
        with pytest.raises(
            ValueError, match="reconstruct: expected one of 'least_squares', 'mean'"
        ):
            rounds_of(method, reconstruct="both", batches=BATCHES)
        with pytest.raises(TypeError, match="expected batches that can be drawn in each round"):
            rounds_of(method, reconstruct="mean", batches=iter(BATCHES))


def test_what_is_refused_at_the_end():
    rsst, model, optimizer = rounds_of(RSST, rounds=1)
    for rnd in rsst:
        train(rnd, model, optimizer)
    trained = copy.deepcopy(model)
    with pytest.raises(ValueError, match="batches: expected batches to run on, for reconstruct"):
        rsst.finalize(reconstruct="mean")
    with pytest.raises(ValueError, match="expected none where nothing is reconstructed, got some"):
        rsst.finalize(batches=BATCHES)

    def bad() -> list[Tensor]:
        return [tokens(0, 5, 3)]

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        rsst.finalize(reconstruct="mean", batches=bad)
    assert equal(model, trained)
    rsst.finalize(reconstruct="mean", batches=BATCHES)
    assert not equal(model, trained)

"""Layers that are replaced between rounds: refused by name, and the rounds go on once they are back."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from tiny_models import gradient_step, mlp
from torch import nn
from torch.optim.swa_utils import AveragedModel

from torch_rsst import RSST, Refill, RegularizedPruner, RoundWarning, extract_mask, find_groups

STEPS = 2


def headed(rows: int = 1) -> nn.Module:
    """Units, and a head that is in no group."""
    model = mlp()
    model.append(nn.LayerNorm(2))
    model.append(nn.Linear(2, rows))
    return model


def rounds_of(model: nn.Module, method: Any = Refill, **kwargs: Any) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    groups = find_groups(model, on_unsupported="ignore")
    settings = {"steps_per_round": STEPS, "rounds": 3, "regroup_amount": 0.25, **kwargs}
    return method(model, groups, optimizer=optimizer, **settings), optimizer


def train(model: nn.Module, optimizer: Any) -> None:
    for number in range(STEPS):
        gradient_step(model, optimizer, number)


@pytest.mark.parametrize("method", [RSST, Refill])
@pytest.mark.parametrize("rows", [3, 1])
def test_a_rewind_does_not_spread_a_value_over_a_layer_of_another_shape(method, rows, fingerprint):
    model = headed(rows)
    average = AveragedModel(model)
    rounds, optimizer = rounds_of(model, method, rewind="init", follow=[average])
    next(rounds)
    train(model, optimizer)
    former, model[4] = model[4], nn.Linear(2, 4 - rows)
    before = fingerprint(model), fingerprint(average), dict(optimizer.state)
    shapes = rf"rewinding '4\.weight': expected shape \({rows}, 2\), got shape \({4 - rows}, 2\)"
    with pytest.raises(ValueError, match=rf"{shapes} \(and others for '4\.bias'\)\. A layer was"):
        next(rounds)
    assert (fingerprint(model), fingerprint(average), dict(optimizer.state)) == before
    model[4] = former
    assert next(rounds).index == 1
    rounds.round.pruner.detach()


def test_an_average_of_another_shape_is_refused_before_the_model_is_rewound(fingerprint):
    model = headed()
    average = AveragedModel(model)
    rounds, optimizer = rounds_of(model, rewind="init", follow=[average])
    next(rounds)
    train(model, optimizer)
    average.module[4] = nn.Linear(2, 3)
    before = fingerprint(model), fingerprint(average)
    with pytest.raises(ValueError, match=r"rewinding '4\.weight': expected shape \(1, 2\)"):
        next(rounds)
    assert (fingerprint(model), fingerprint(average)) == before


def test_saved_weights_of_another_shape_are_refused_when_they_are_loaded(fingerprint):
    rounds, _ = rounds_of(headed(), rewind="init")
    next(rounds)
    state = copy.deepcopy(rounds.state_dict())
    rounds.round.pruner.detach()
    model = headed(3)
    again, _ = rounds_of(model, rewind="init")
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"rewinding '4\.weight': expected shape \(1, 2\), got"):
        again.load_state_dict(state)
    assert fingerprint(model) == before
    assert again.round is None


# Rounds that cannot close or rank


def test_a_round_that_cannot_close_stays_open_with_its_penalty_and_closes_later():
    model = mlp()
    rounds, optimizer = rounds_of(model, RSST)
    rnd = next(rounds)
    train(model, optimizer)
    former, model[2] = model[2], nn.Linear(8, 3)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"'2\.weight': expected the parameter's shape \(3, 8\)"
        ):
            next(rounds)
        assert rounds.round is rnd
        assert rounds.state_dict()["round"]["open"]
        assert RegularizedPruner.attached_to(model) is rnd.pruner
    model[2] = former
    second = next(rounds)
    assert second.index == 1
    assert RegularizedPruner.attached_to(model) is second.pruner
    assert not rnd.pruner.attached
    second.pruner.detach()


@pytest.mark.parametrize("optimizer", [True, False])
@pytest.mark.parametrize("method", [RSST, Refill])
def test_a_warning_that_is_an_error_leaves_the_round_that_finalize_would_close_open(
    method, optimizer, fingerprint
):
    model = mlp()
    rounds, made = rounds_of(model, method)
    if not optimizer:
        rounds = method(model, find_groups(model), steps_per_round=STEPS, regroup_amount=0.25)
    rnd = next(rounds)
    if optimizer:
        gradient_step(model, made, 0)
    before, decided = fingerprint(model), rounds.report().explain("", 0).history
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RoundWarning, match="Round 0 closed after"):
            rounds.finalize(force=True)
    assert fingerprint(model) == before
    assert rounds.round is rnd
    assert rounds.state_dict()["round"]["open"]
    assert rounds.report().explain("", 0).history == decided
    assert RegularizedPruner.attached_to(model) is rnd.pruner
    if optimizer:
        gradient_step(model, made, 1)
        rounds.finalize(force=True)
        assert set(extract_mask(model)) == {"0.weight", "0.bias", "2.weight"}
    rnd.pruner.detach()


@pytest.mark.parametrize("method", [RSST, Refill])
def test_layers_whose_units_are_others_by_now_are_named(method):
    model = mlp()
    rounds, _ = rounds_of(model, method, train_first=True)
    next(rounds)
    model[0], model[2] = nn.Linear(4, 10), nn.Linear(10, 2)
    text = r"'0\.weight': expected size 8 along dim 0, got shape \(10, 4\)\. Find the groups"
    with (
        pytest.raises(ValueError, match=text),
        pytest.warns(RoundWarning, match="Round -1 closed after 0"),
    ):
        next(rounds)
    assert not extract_mask(model)


def test_layers_that_were_replaced_under_their_masks_are_named():
    model = mlp()
    rounds, optimizer = rounds_of(model)
    next(rounds)
    train(model, optimizer)
    model[0], model[2] = nn.Linear(4, 10), nn.Linear(10, 2)
    text = r"'0\.weight': expected size 8 along dim 0, got shape \(10, 4\)\. Find the groups"
    with pytest.raises(ValueError, match=text):
        next(rounds)
    assert not extract_mask(model)

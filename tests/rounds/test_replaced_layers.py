"""Layers that are replaced between rounds: refused by name, and the rounds go on once they are back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import gradient_step, mlp
from torch import nn
from torch.optim.swa_utils import AveragedModel

from torch_rsst import RSST, Refill, find_groups

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

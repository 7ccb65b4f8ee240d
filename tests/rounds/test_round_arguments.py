"""The arguments of rounds: one name, one default, one check for each."""

from __future__ import annotations

import inspect
import itertools
import warnings
from dataclasses import MISSING, fields, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import mlp

import torch_rsst
from torch_rsst import RSST, Refill, RegularizedPruner, RoundWarning, find_groups
from torch_rsst.importance.batches import DataSource
from torch_rsst.penalty.penalty_arguments import Penalty
from torch_rsst.rounds.round_arguments import Course, Ranking, Regrouping

CONCERNS = (Course, Ranking, Regrouping, Penalty, DataSource)
# Keywords that are no setting, settings that a method does not have, and defaults that differ.
OTHER = {"self", "model", "groups", "optimizer", "kept_units", "dense_training", "follow"}
OTHER |= {"process_group"}
MISSING_IN = {
    RSST: {"fillback_rate", "reset_moments"},
    Refill: {each.name for each in fields(Penalty)},
}
DIFFER = {RSST: {}, Refill: {"regroup_amount": None, "fillback_rate": 0.1}}


def defaults_of(call: Any) -> dict[str, Any]:
    return {
        name: MISSING if parameter.default is parameter.empty else parameter.default
        for name, parameter in inspect.signature(call).parameters.items()
    }


@pytest.mark.parametrize("method", [RSST, Refill])
def test_signatures_and_dataclasses_name_the_same_settings_with_the_same_defaults(method):
    known = {each.name: each.default for concern in CONCERNS for each in fields(concern)}
    expected = {name: d for name, d in known.items() if name not in MISSING_IN[method]}
    found = {name: d for name, d in defaults_of(method.__init__).items() if name not in OTHER}
    assert found == {**expected, **DIFFER[method]}


def test_every_setting_of_a_penalty_is_one_of_the_regularizer():
    found = defaults_of(RegularizedPruner.__init__)
    for each in fields(Penalty):
        if each.name not in ("strength", "shrink_to"):
            assert found[each.name] == each.default
    assert (found["strength"], found["shrink_to"]) == (0.5, None)


def test_each_keyword_reaches_its_setting():
    """Positions in the constructors are easily confused."""
    given: dict[str, Any] = {
        "steps_per_round": 7, "rounds": 5, "rewind": "init", "rewind_optimizer": "keep",
        "train_first": True, "freeze_masked": True, "amount": 0.25, "parameters": ["0.weight"],
        "importance": "remain", "scope": "type", "min_keep": 2, "round_to": 4, "ungrouped": "keep",
        "regroup_amount": 0.75, "schedule": "linear", "shrink_to": 0.2, "shrink_by": 0.5,
        "mode": "decoupled", "block_loss_grad": True, "accumulation_steps": 3, "grad_scale": 8.0,
    }  # fmt: skip
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    refill_only = {"fillback_rate": 0.5, "reset_moments": True}
    penalty = {each.name for each in fields(Penalty)}
    for method, more in ((RSST, {}), (Refill, refill_only)):
        chosen = {k: v for k, v in {**given, **more}.items() if method is RSST or k not in penalty}
        rounds = method(model, find_groups(model), optimizer=optimizer, **chosen)
        settings = (rounds.course, rounds.ranking, rounds.regrouping, rounds.penalty, rounds.data)
        found = {name: value for each in settings for name, value in vars(each).items()}
        assert {name: found[name] for name in chosen} == chosen
        assert (rounds.rounds, rounds.steps_per_round) == (5, 7)


# What is no list, no flag, or a number of another kind


NO_LISTS = {
    "follow": "follow: expected a list of modules, got",
    "groups": "groups: expected groups, got",
    "parameters": r"parameters: expected \(module, name\) pairs, got",
    "batches": "batches: expected an iterable of batches, got",
}
SCALARS = [5, np.array(0.5), torch.tensor(2), np.float32(0.5)]


@pytest.mark.parametrize(
    ("name", "value"),
    [("follow", None), ("groups", None), *itertools.product(NO_LISTS, SCALARS)],
    ids=str,
)
def test_what_cannot_be_iterated_over_is_named_at_once(name, value, fingerprint):
    model = mlp()
    before = fingerprint(model)
    given = {"groups": find_groups(model), "importance": "obs", "batches": [torch.ones(2, 4)]}
    with pytest.raises(TypeError, match=NO_LISTS[name]):
        RSST(model, steps_per_round=1, **{**given, name: value})
    assert fingerprint(model) == before


@pytest.mark.parametrize("value", [1, "no", [], torch.tensor(True)], ids=str)
@pytest.mark.parametrize(
    "name", ["train_first", "freeze_masked", "reset_moments", "block_loss_grad", "dense_training"]
)
def test_what_is_no_flag_is_refused_at_construction(name, value):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = Refill if name == "reset_moments" else RSST
    with pytest.raises(
        TypeError, match=f"{name}: expected True or False, got .* Pass one of the two"
    ):
        method(model, find_groups(model), optimizer=optimizer, steps_per_round=1, **{name: value})


def test_flags_of_numpy_are_flags():
    model = mlp()
    rounds = RSST(
        model,
        find_groups(model),
        steps_per_round=1,
        train_first=np.True_,
        block_loss_grad=np.False_,
    )
    assert next(rounds).index == -1
    assert rounds.state_dict()["settings"]["block_loss_grad"] is False
    rounds.round.pruner.detach()


def test_a_regularizer_refuses_what_is_no_flag():
    with pytest.raises(TypeError, match="block_loss_grad: expected True or False, got 'yes'"):
        RegularizedPruner(mlp(), {}, total_steps=1, block_loss_grad="yes")


@pytest.mark.parametrize("value", [True, 3.0, "rest", b"1", [0.5], {}, None], ids=str)
def test_no_choice_of_what_optimizers_are_rewound_to_is_refused_though_nothing_is_rewound(value):
    model = mlp()
    with pytest.raises((TypeError, ValueError), match="rewind_optimizer: expected"):
        RSST(model, find_groups(model), steps_per_round=1, rewind_optimizer=value)


def test_a_function_that_returns_no_batches_is_named():
    model = mlp()
    rounds = RSST(model, find_groups(model), steps_per_round=1, batches=lambda: np.array(0.5))
    with pytest.raises(
        TypeError, match="batches: expected a function that returns batches, got one nd"
    ):
        next(rounds)


def test_a_strength_may_be_any_number():
    model = mlp()
    half = Fraction(1, 2)
    rounds = RSST(model, find_groups(model), steps_per_round=1, strength=half)
    assert rounds.penalty.strength == 0.5
    with pytest.raises(ValueError, match=r"shrink_to: expected one argument .* got strength=0\.5"):
        RSST(model, find_groups(model), steps_per_round=1, strength=half, shrink_to=0.1)


# What a whole number means


@pytest.mark.parametrize("amount", [1.0, 8])
@pytest.mark.parametrize("method", [RSST, Refill])
def test_letting_all_units_go_warns_of_those_that_stay(method, amount):
    more = {} if method is RSST else {"fillback_rate": 0.0}
    text = (
        rf"regroup_amount={amount} means all 8 neurons of 0: min_keep=1 stays in each layer\. "
        r"Pass a smaller share, or min_keep=0 to let all go\."
    )
    model = mlp()
    groups = torch_rsst.Groups(tuple(replace(each, name="0") for each in find_groups(model).layers))
    options = {"steps_per_round": 1, "regroup_amount": amount, **more}
    with pytest.warns(RoundWarning, match=text) as caught:
        method(model, groups, **options)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method(model, groups, **options, min_keep=0)
        method(model, groups, **options, min_keep=2)  # all but two
        method(model, groups, **{**options, "regroup_amount": 7})
        Refill(model, groups, **{**options, "fillback_rate": 0.2})  # 2 of them are given back


def test_a_count_that_the_last_rounds_cannot_take_is_refused_at_construction():
    model = mlp()
    text = r"amount: expected at most 12 in each of 4 rounds, for 48 weights, got 13\. Lower"
    with pytest.raises(ValueError, match=text):
        RSST(model, find_groups(model), steps_per_round=1, rounds=4, amount=13)
    RSST(model, find_groups(model), steps_per_round=1, rounds=4, amount=12)
    Refill(
        model, find_groups(model), steps_per_round=1, rounds=4, amount=13
    )  # units become dense again


@pytest.mark.parametrize("method", [RSST, Refill])
@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        (
            {"regroup_amount": 50},
            "regroup_amount: expected at most 8, as many as there are neurons of the model: an int is a "
            "count in each scope, got 50. Pass a float for a share, such as 0.5 for half.",
        ),
        (
            {"amount": 50},
            "amount: expected at most 48, as many as there are weights alive: an int is a count in each "
            "round, got 50. Pass a float for a share, such as 0.5 for half.",
        ),
    ],
)
def test_a_count_of_more_than_there_is_is_refused_at_construction(method, kwargs, text):
    model = mlp()
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - all of the text is compared
        method(model, find_groups(model), steps_per_round=1, **kwargs)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"amount": 50}, r"amount=50 is a count: 50 of 12,000 weights .* For 50 %, pass 0\.5\."),
        (
            {"regroup_amount": 10},
            r"regroup_amount=10 is a count: 10 of 2,000 neurons .*pass 0\.1\.",
        ),
    ],
)
def test_a_count_that_looks_like_a_percentage_warns(kwargs, text):
    model = mlp(hidden=2000)
    with pytest.warns(RoundWarning, match=text) as caught:
        RSST(model, find_groups(model), steps_per_round=1, **kwargs)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "kwargs", [{"amount": 1}, {"amount": 500}, {"regroup_amount": 50}, {"amount": 0.5}]
)
def test_other_counts_do_not_warn(kwargs):
    model = mlp(hidden=2000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RSST(model, find_groups(model), steps_per_round=1, **kwargs)

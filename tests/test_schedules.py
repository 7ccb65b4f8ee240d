"""Schedules: their values, the formulas that the documentation shows, names and aliases."""

import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from registry_tables import formula

import torch_rsst
from torch_rsst.schedules import (
    ALIASES,
    SCHEDULES,
    Exponential,
    Polynomial,
    name_of,
    resolve_schedule,
)

# λ at t = 1/4, 1/2, 3/4 for strength 1, written down.
VALUES = {
    "linear": (0.25, 0.5, 0.75),
    "quadratic": (0.0625, 0.25, 0.5625),
    "cubic": (0.015625, 0.125, 0.421875),
    "exponential": (0.4723665527, 0.6065306597, 0.7788007831),
    "normalized_exponential": (0.1652961767, 0.3775406688, 0.6500679912),
    "late_exponential": (0.0022777924, 0.0375342728, 0.2166045101),
}


@pytest.mark.parametrize("name", VALUES)
def test_schedules_have_the_values_that_were_written_down(name: str) -> None:
    schedule = resolve_schedule(name, 1.0)
    found = tuple(schedule(t) for t in (0.25, 0.5, 0.75))
    assert found == pytest.approx(VALUES[name], abs=1e-9)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@given(t=st.floats(0.001, 1.0), strength=st.floats(0.0, 10.0))
def test_schedules_follow_the_formulas_that_the_documentation_shows(
    name: str, t: float, strength: float
) -> None:
    schedule = resolve_schedule(name, strength)
    shown = formula(schedule)
    for written, meant in (("·", "*"), ("−", "-"), ("^", "**")):  # noqa: RUF001 - as printed
        shown = shown.replace(written, meant)
    expected = eval(shown, {"t": t, "strength": strength, "e": math.e})
    assert schedule(t) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_schedules_grow_to_their_strength(name: str) -> None:
    schedule = resolve_schedule(name, 0.5)
    values = [schedule(k / 20) for k in range(1, 21)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(0.5, rel=1e-15)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_schedules_are_values(name: str) -> None:
    schedule = resolve_schedule(name, 0.3)
    copy = pickle.loads(pickle.dumps(schedule))
    assert copy == schedule
    assert hash(copy) == hash(schedule)
    assert schedule != resolve_schedule(name, 0.4)


# Names


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_a_schedule_knows_the_name_under_which_it_is_registered(name: str) -> None:
    assert name_of(name) == name
    assert name_of(resolve_schedule(name, 0.3)) == name


@pytest.mark.parametrize("alias", ["x", "x^2", "x^3", "exp", "exp_custom", "exp_custom_exponents"])
def test_names_of_the_research_code_are_aliases(alias: str) -> None:
    assert name_of(alias) == ALIASES[alias] in SCHEDULES
    assert alias not in SCHEDULES
    assert resolve_schedule(alias, 0.3) == resolve_schedule(name_of(alias), 0.3)


@pytest.mark.parametrize("alias", [*ALIASES])
def test_rounds_that_were_saved_with_an_alias_continue_with_the_name(alias: str) -> None:
    def rounds(schedule: str) -> torch_rsst.RSST:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
        groups = torch_rsst.find_groups(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return torch_rsst.RSST(
            model, groups, optimizer=optimizer, steps_per_round=2, rounds=2, schedule=schedule
        )

    saved = rounds(alias)
    first = next(iter(saved))
    resumed = rounds(ALIASES[alias])
    resumed.load_state_dict(saved.state_dict())
    again = next(iter(resumed))
    assert (again.index, again.pruner.strength) == (first.index, first.pruner.strength)


def test_what_is_not_registered_is_shown_by_its_repr_or_its_own_name() -> None:
    def constant(t: float) -> float:
        return 0.1

    assert name_of(Polynomial(5.0, 0.1)) == "Polynomial(power=5.0, strength=0.1)"
    assert name_of(constant).endswith("constant")


def test_a_callable_is_its_own_schedule() -> None:
    def constant(t: float) -> float:
        return 0.1

    assert resolve_schedule(constant, strength=7.0) is constant


@pytest.mark.parametrize("wrong", ["quadratik", "quadratic "])
def test_a_misspelled_name_gets_the_nearest(wrong: str) -> None:
    with pytest.raises(ValueError, match="Did you mean 'quadratic'"):
        resolve_schedule(wrong)


def test_messages_list_names_and_no_aliases() -> None:
    with pytest.raises(ValueError, match="schedule: expected one of 'linear', ") as caught:
        resolve_schedule("unknown")
    assert all(repr(name) in str(caught.value) for name in SCHEDULES)
    assert not any(repr(alias) in str(caught.value) for alias in ALIASES)


@pytest.mark.parametrize("schedule", [None, 3, ["linear"]])
def test_what_is_neither_name_nor_callable(schedule: object) -> None:
    with pytest.raises(TypeError, match="a name or a callable"):
        resolve_schedule(schedule)


@pytest.mark.parametrize("strength", [-0.1, math.nan, math.inf, 1e39])
def test_strengths_out_of_range(strength: float) -> None:
    with pytest.raises(ValueError, match="strength: expected a number >= 0, got"):
        resolve_schedule("linear", strength)


@pytest.mark.parametrize("strength", [True, "1", None])
def test_strengths_are_numbers(strength: object) -> None:
    with pytest.raises(TypeError, match="strength: expected a number"):
        resolve_schedule("linear", strength)


def test_schedules_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Polynomial(1, 0.5).strength = 0.6
    with pytest.raises(AttributeError):
        Exponential(0.5).strength = 0.6

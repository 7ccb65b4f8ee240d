import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_rsst.schedules import SCHEDULES, Exponential, Polynomial, resolve_schedule

FORMULAS = {
    "linear": lambda t: t,
    "x": lambda t: t,
    "quadratic": lambda t: t**2,
    "x^2": lambda t: t**2,
    "cubic": lambda t: t**3,
    "x^3": lambda t: t**3,
    "exponential": lambda t: math.exp(t - 1),
    "exp": lambda t: math.exp(t - 1),
    "normalized_exponential": lambda t: (math.exp(t**4) - 1) / (math.e - 1),
    "exp_custom_exponents": lambda t: (math.exp(t**4) - 1) / (math.e - 1),
    "exp_custom": lambda t: (math.exp(t) - 1) / (math.e - 1),
}


def test_every_schedule_has_a_formula_here() -> None:
    assert SCHEDULES.keys() == FORMULAS.keys()


@pytest.mark.parametrize("name", sorted(FORMULAS))
@given(t=st.floats(0.001, 1.0), strength=st.floats(0.0, 10.0))
def test_schedules_follow_their_formulas(name: str, t: float, strength: float) -> None:
    schedule = resolve_schedule(name, strength)
    assert schedule(t) == pytest.approx(strength * FORMULAS[name](t), rel=1e-9, abs=1e-12)


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


def test_a_callable_is_its_own_schedule() -> None:
    def constant(t: float) -> float:
        return 0.1

    assert resolve_schedule(constant, strength=7.0) is constant


def test_a_misspelled_name_gets_the_nearest() -> None:
    with pytest.raises(ValueError, match="Did you mean 'quadratic'"):
        resolve_schedule("quadratik")


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

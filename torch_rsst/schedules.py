"""Schedules of the penalty: t in (0, 1] → strength λ. Pure, frozen, picklable.

The research code behind RSST accumulates an unnormalized granularity, so that its λ depends on
how long a run is. Here t = step / total_steps, and λ depends on progress alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from functools import partial
from typing import TypeAlias

from torch_rsst.utils.amounts import check_number
from torch_rsst.utils.errors import refuse, unknown_choice

Schedule: TypeAlias = Callable[[float], float]


@dataclass(frozen=True)
class Polynomial:
    """λ(t) = strength · t^power.

    >>> Polynomial(power=2, strength=0.5)(0.5)
    0.125
    """

    power: float
    strength: float = 0.5

    def __call__(self, t: float) -> float:
        return self.strength * float(t**self.power)


@dataclass(frozen=True)
class Exponential:
    """λ(t) = strength · e^(t − 1): starts at 37 % of its end.

    >>> Exponential(strength=0.5)(1.0)
    0.5
    """

    strength: float = 0.5

    def __call__(self, t: float) -> float:
        return self.strength * math.exp(t - 1.0)


@dataclass(frozen=True)
class NormalizedExponential:
    """λ(t) = strength · (e^(t^power) − 1) / (e − 1): from 0 to ``strength``, late for large powers.

    >>> NormalizedExponential(power=4, strength=0.5)(1.0)
    0.5
    """

    power: float = 4.0
    strength: float = 0.5

    def __call__(self, t: float) -> float:
        return self.strength * math.expm1(t**self.power) / (math.e - 1.0)


def strength_at(schedule: Schedule, t: float) -> float:
    """λ(t), checked: a NaN or a negative strength would destroy weights.

    Raises:
        TypeError, ValueError: for anything but a finite number >= 0.
    """
    remedy = "Return a finite number >= 0 for every t in (0, 1]."
    subject = f"schedule at t={t:.3g}"
    return check_number(schedule(t), subject, above=0, or_equal=True, remedy=remedy)


SCHEDULES: dict[str, Callable[[float], Schedule]] = {
    "linear": partial(Polynomial, 1),
    "quadratic": partial(Polynomial, 2),
    "cubic": partial(Polynomial, 3),
    "exponential": Exponential,
    "normalized_exponential": partial(NormalizedExponential, 1),
    "late_exponential": partial(NormalizedExponential, 4),
}
"""Name → constructor that takes the strength. Add a schedule with one line."""

ALIASES = {
    "x": "linear",
    "x^2": "quadratic",
    "x^3": "cubic",
    "exp": "exponential",
    "exp_custom": "normalized_exponential",
    "exp_custom_exponents": "late_exponential",
}
"""Name in the research code → name."""


def resolve_schedule(schedule: str | Schedule, strength: float = 0.5) -> Schedule:
    """The schedule of a name or alias, at the given strength; a callable is returned as it is.

    >>> resolve_schedule("linear", strength=0.4) == resolve_schedule("x", strength=0.4)
    True

    Raises:
        ValueError: for an unknown name or a strength that is negative or not finite.
        TypeError: for a schedule that is neither a name nor callable.
    """
    strength = check_number(strength, "strength", above=0, or_equal=True, remedy="Try 0.5.")
    if isinstance(schedule, str):
        name = ALIASES.get(schedule, schedule)
        if name not in SCHEDULES:
            raise ValueError(unknown_choice("schedule", schedule, SCHEDULES))
        return SCHEDULES[name](strength)
    if not callable(schedule):
        remedy = "A callable takes t in (0, 1] and returns λ."
        refuse(TypeError, "schedule", "a name or a callable", repr(schedule), remedy)
    return schedule


def name_of(schedule: str | Schedule) -> str:
    """The name under which messages and figures show a schedule.

    >>> name_of("exp_custom_exponents"), name_of(NormalizedExponential(power=4, strength=0.1))
    ('late_exponential', 'late_exponential')

    Args:
        schedule: a name, an alias or a callable. One that is not registered is shown by its repr where
            it is a dataclass, else by the name of its function or class.
    """
    if isinstance(schedule, str):
        return ALIASES.get(schedule, schedule)
    strength = getattr(schedule, "strength", 0.5)
    for name, constructor in SCHEDULES.items():
        if constructor(strength) == schedule:
            return name
    if is_dataclass(schedule):
        return repr(schedule)
    return str(getattr(schedule, "__qualname__", type(schedule).__qualname__))

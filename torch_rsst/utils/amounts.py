"""Amounts and budgets: how many entries or units go. Pure arithmetic, no tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from numbers import Integral, Real

from torch_rsst.utils.errors import refuse, shown

Amount = int | float

_HIGHEST = 3.4028234663852886e38  # of float32, in which optimizers calculate


def check_amount(amount: object, subject: str = "amount") -> None:
    """Raise unless ``amount`` is an int >= 0 or a float in [0, 1].

    Raises:
        TypeError: for bools, strings and anything else that is not a number.
        ValueError: for NaN and for values out of range.
    """
    expected = "an int >= 0 (a count) or a float in [0, 1] (a fraction)"
    if isinstance(amount, bool) or not isinstance(amount, Real):
        remedy = "Pass 0.2 for a fifth or 10 for ten."
        refuse(TypeError, subject, expected, f"{type(amount).__name__} {amount!r}", remedy)
    in_range = int(amount) >= 0 if isinstance(amount, Integral) else 0.0 <= float(amount) <= 1.0
    if not in_range:
        remedy = "Counts are ints and cannot be negative; fractions are floats from 0.0 to 1.0."
        refuse(ValueError, subject, expected, repr(amount), remedy)


def plain_amount(amount: Amount) -> Amount:
    """The amount as Python's own int or float: NumPy's round, overflow and pickle differently."""
    check_amount(amount)
    return int(amount) if isinstance(amount, Integral) else float(amount)


def check_fraction(value: object, subject: str) -> float:
    """The number as Python's own float; raise unless it is in [0, 1]. Ints 0 and 1 are taken as fractions."""
    expected = "a fraction in [0, 1]"
    if isinstance(value, bool) or not isinstance(value, Real):
        got = f"{type(value).__name__} {value!r}"
        refuse(TypeError, subject, expected, got, "Pass 0.1 for a tenth.")
    # Ints are not compared as floats: a huge one has none.
    in_range = int(value) in (0, 1) if isinstance(value, Integral) else 0.0 <= float(value) <= 1.0
    if not in_range:
        refuse(ValueError, subject, expected, repr(value), "Pass 0.1 for a tenth.")
    return float(value)


def check_count(value: object, subject: str, *, at_least: int) -> int:
    """The number as Python's own int; raise unless it is one of at least ``at_least``."""
    expected = f"an int >= {at_least}"
    remedy = f"Pass {at_least} or more."
    if isinstance(value, bool) or not isinstance(value, Integral):
        refuse(TypeError, subject, expected, f"{type(value).__name__} {value!r}", remedy)
    if value < at_least:
        refuse(ValueError, subject, expected, repr(value), remedy)
    return int(value)


def check_flag(value: object, subject: str) -> bool:
    """The bool as Python's own; raise a TypeError for anything else: most of it would count as True."""
    kind = type(value)
    if kind is not bool and (kind.__module__, kind.__name__.rstrip("_")) != ("numpy", "bool"):
        refuse(TypeError, subject, "True or False", shown(value), "Pass one of the two.")
    return bool(value)


def check_number(
    value: object,
    subject: str,
    *,
    above: float,
    or_equal: bool = False,
    remedy: str | None = None,
) -> float:
    """The number as a float; raise unless it is > ``above``, or >= where ``or_equal``, and finite in float32."""
    expected = f"a number {'>=' if or_equal else '>'} {above:g}"
    remedy = remedy or f"Pass a finite number {'of at least' if or_equal else 'above'} {above:g}."
    if isinstance(value, bool) or not isinstance(value, Real):
        refuse(TypeError, subject, expected, f"{type(value).__name__} {value!r}", remedy)
    try:
        number = float(value)
    except OverflowError:  # an int
        number = math.inf
    if not (above < number <= _HIGHEST or (or_equal and number == above)):
        refuse(ValueError, subject, expected, repr(value), remedy)
    return number


def to_count(amount: Amount, n: int, *, subject: str = "amount", of: str = "entries") -> int:
    """How many of ``n`` an amount means: ints count, floats are fractions, rounded by Python's round.

    >>> to_count(0.3, 7), to_count(2, 7), to_count(0.5, 5)
    (2, 2, 2)
    """
    check_amount(amount, subject)
    count = int(amount) if isinstance(amount, Integral) else round(float(amount) * n)
    if count > n:
        remedy = "Lower it, or pass a fraction."
        refuse(ValueError, subject, f"at most {n}, as many {of} as there are", amount, remedy)
    return count


def decimal(rate: float) -> Fraction:
    """The decimal that was written, exactly: 0.1 is one tenth, not its nearest binary float.

    >>> decimal(0.1)
    Fraction(1, 10)
    """
    return Fraction(repr(float(rate)))


def units_to_keep(
    amount: Amount | None,
    units: int,
    alive_of_size: Mapping[int, int],
    fillback_rate: float,
    *,
    of: str = "units",
) -> int:
    """The budget of one scope: how many of its ``units`` the refill mask keeps.

    With an ``amount``, ``n − drop + round(fillback_rate · drop)``, where ``drop`` counts from all
    units, the dead included. Without, the density decides: ``round(d + fillback_rate · (n − d))``
    with d = Σ over units of alive ranked entries / ranked size, in exact rational arithmetic.

    Args:
        amount: fraction or number of units to drop, or None for the density budget.
        units: how many units the scope has.
        alive_of_size: ranked size → alive ranked entries of all the scope's units of that size.
        fillback_rate: the share of what would go that is given back.
        of: what the units are called in an error.

    >>> units_to_keep(None, 3, {64: 140}, fillback_rate=0.0)  # round(140 / 64)
    2
    >>> units_to_keep(0.5, 8, {}, fillback_rate=0.25)  # 8 − 4 + 1
    5
    """
    if amount is None:
        density = sum((Fraction(alive, size) for size, alive in alive_of_size.items()), Fraction())
        return round(density + decimal(fillback_rate) * (units - density))
    drop = to_count(amount, units, of=of)
    return units - drop + round(decimal(fillback_rate) * drop)


def refill_limit(amount: float, fillback_rate: float) -> float:
    """The share of units at which Refill's density budget settles.

    Each round maps a density d to f + (1 − f)(1 − a)·d; this is its fixed point.

    >>> round(refill_limit(0.2, 0.1), 2)
    0.36
    """
    kept = (1.0 - amount) * (1.0 - fillback_rate)
    return 1.0 if math.isclose(kept, 1.0) else fillback_rate / (1.0 - kept)

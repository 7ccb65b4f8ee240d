import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_rsst.utils.amounts import (
    check_amount,
    check_count,
    check_fraction,
    decimal,
    refill_limit,
    to_count,
    units_to_keep,
)

rates = st.floats(0.0, 1.0, allow_nan=False)


@pytest.mark.parametrize(
    ("amount", "n", "count"),
    [
        (0, 7, 0),
        (7, 7, 7),
        (0.0, 7, 0),
        (1.0, 7, 7),
        (0.3, 7, 2),
        (0.3, 3, 1),
        (0.5, 5, 2),  # Python rounds halves to even
        (0.5, 7, 4),
        (0.5, 1, 0),
        (0.2, 0, 0),
        (1, 1, 1),  # one entry, not everything
    ],
)
def test_amounts_count_as_pytorch_counts(amount: float, n: int, count: int) -> None:
    assert to_count(amount, n) == count


@given(rates, st.integers(0, 10**6))
def test_a_fraction_never_exceeds_what_there_is(rate: float, n: int) -> None:
    assert 0 <= to_count(rate, n) <= n
    assert to_count(rate, n) == round(rate * n)


@pytest.mark.parametrize("amount", [True, False, "0.5", None, [0.5], 1j])
def test_what_is_no_number_is_a_type_error(amount: object) -> None:
    with pytest.raises(TypeError, match=r"amount: expected an int >= 0 .* or a float in \[0, 1\]"):
        check_amount(amount)


@pytest.mark.parametrize("amount", [-1, -0.1, 1.5, math.nan, math.inf, -math.inf])
def test_numbers_out_of_range_are_value_errors(amount: float) -> None:
    with pytest.raises(ValueError, match="Counts are ints"):
        check_amount(amount, "rate")


def test_more_than_there_is_names_what_and_how_many() -> None:
    with pytest.raises(ValueError, match="expected at most 7, as many heads as there are, got 8"):
        to_count(8, 7, of="heads")


@pytest.mark.parametrize("value", [0, 1, 0.0, 0.5, 1.0])
def test_zero_and_one_are_fractions_too(value: float) -> None:
    check_fraction(value, "rate")


@pytest.mark.parametrize("value", [2, -1, 1.01, math.nan, math.inf, 10**400])
def test_fractions_out_of_range(value: float) -> None:
    with pytest.raises(ValueError, match=r"rate: expected a fraction in \[0, 1\]"):
        check_fraction(value, "rate")


@pytest.mark.parametrize("value", [True, "1", None])
def test_fractions_are_numbers(value: object) -> None:
    with pytest.raises(TypeError, match="rate: expected a fraction"):
        check_fraction(value, "rate")


@pytest.mark.parametrize("value", [True, 1.0, "1", None])
def test_counts_are_ints(value: object) -> None:
    with pytest.raises(TypeError, match="rounds: expected an int >= 1"):
        check_count(value, "rounds", at_least=1)


def test_counts_have_a_lower_bound() -> None:
    check_count(0, "min_keep", at_least=0)
    with pytest.raises(ValueError, match="rounds: expected an int >= 1, got 0"):
        check_count(0, "rounds", at_least=1)


def test_a_rate_is_the_decimal_that_was_written() -> None:
    assert decimal(0.1) == Fraction(1, 10)
    assert Fraction(0.1) != Fraction(1, 10)


@pytest.mark.parametrize(
    ("amount", "units", "alive_of_size", "fillback", "kept"),
    [
        (0.3, 3, {}, 0.0, 2),
        (1, 3, {}, 0.0, 2),
        (3, 3, {}, 0.0, 0),
        (0.5, 8, {}, 0.25, 5),
        (1.0, 10, {}, 0.25, 2),  # round(2.5) is 2
        (None, 3, {64: 140}, 0.0, 2),
        (None, 4, {2: 5}, 0.0, 2),  # 2.5 units: to even
        (None, 4, {2: 7}, 0.0, 4),  # 3.5
        (None, 10, {10: 50}, 0.1, 6),  # 5 + 0.5: 5.5 exactly, though not in floats
        (None, 2, {}, 0.0, 0),
        (None, 4, {3: 3, 5: 10}, 0.0, 3),
    ],
)
def test_budgets_digit_for_digit(
    amount: float | None, units: int, alive_of_size: dict[int, int], fillback: float, kept: int
) -> None:
    assert units_to_keep(amount, units, alive_of_size, fillback) == kept


def test_the_density_is_summed_exactly() -> None:
    # Ten units at one tenth are one unit; ten times 0.1 in floats are not.
    tenths = {10 * k: k for k in range(1, 11)}
    assert sum(alive / size for size, alive in tenths.items()) != 1.0
    assert units_to_keep(None, 3, tenths, fillback_rate=0.25) == round(Fraction(3, 2)) == 2


@given(st.one_of(st.none(), rates), st.integers(1, 50), rates, st.data())
def test_a_budget_lies_between_none_and_all(
    amount: float | None, units: int, fillback: float, data: st.DataObject
) -> None:
    alive = data.draw(st.integers(0, 8 * units))
    without = units_to_keep(amount, units, {8: alive}, 0.0)
    kept = units_to_keep(amount, units, {8: alive}, fillback)
    assert 0 <= without <= kept <= units
    assert units_to_keep(amount, units, {8: alive}, 1.0) == units


@given(st.floats(0.01, 0.9), st.floats(0.0, 0.9))
def test_refills_limit_is_the_fixed_point_of_its_rounds(amount: float, fillback: float) -> None:
    density = 1.0
    for _ in range(3000):
        density = fillback + (1 - fillback) * (1 - amount) * density
    assert refill_limit(amount, fillback) == pytest.approx(density, abs=1e-6)


def test_published_setting_and_limit() -> None:
    assert round((1 - 0.2) ** 20, 4) == 0.0115
    assert round(refill_limit(0.2, 0.1), 2) == 0.36
    assert refill_limit(0.0, 0.0) == 1.0

"""What can be iterated over."""

from __future__ import annotations

from typing import Any


def iterates(value: object) -> bool:
    """Whether there are items in a value; no iteration begins.

    Arrays and tensors without dimensions, and scalars of NumPy, only look so.

    >>> iterates([]), iterates(range(3)), iterates(3), iterates(torch.tensor(3))
    (True, True, False, False)
    """
    looks_so = hasattr(value, "__iter__") or hasattr(value, "__getitem__")
    return looks_so and getattr(value, "ndim", 1) != 0


def items(values: object) -> list[Any] | None:
    """What an iterable holds; None for text and for what holds nothing, such as numbers and tensors without dimensions.

    >>> items(range(2)), items("ab"), items(torch.tensor(1.0)), items(None)
    ([0, 1], None, None, None)
    """
    if isinstance(values, (str, bytes)):
        return None
    try:
        iterator = iter(values)  # type: ignore[call-overload] # the question is whether it can
    except TypeError:
        return None
    return list(iterator)

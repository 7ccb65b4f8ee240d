"""What can be iterated over."""

from __future__ import annotations


def iterates(value: object) -> bool:
    """Whether there are items in a value; no iteration begins.

    Arrays and tensors without dimensions, and scalars of NumPy, only look so.

    >>> iterates([]), iterates(range(3)), iterates(3), iterates(torch.tensor(3))
    (True, True, False, False)
    """
    looks_so = hasattr(value, "__iter__") or hasattr(value, "__getitem__")
    return looks_so and getattr(value, "ndim", 1) != 0

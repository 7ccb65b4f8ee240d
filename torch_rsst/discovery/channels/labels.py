"""Labels of a tensor's entries: whose channel each is. Arrays that broadcast to the tensor's shape."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Labels:
    """What is known of a tensor.

    Attributes:
        fields: int64 tensors of its number of dimensions, of size 1 along those where they are
            constant. An activation has at most one; a weight has one for each of its dimensions.
        weight: whether it is made of parameters alone.
        wild: whether it was made from sizes alone: filled, random, counted.
        attribute: the name of the plain attribute of a module that it is, or moved from.
    """

    fields: tuple[Tensor, ...] = ()
    weight: bool = False
    wild: bool = False
    attribute: str = ""


def varying(field: Tensor) -> tuple[int, ...]:
    """The dimensions along which labels differ."""
    return tuple(dim for dim, size in enumerate(field.shape) if size > 1)


def compressed(field: Tensor) -> Tensor:
    """The same labels, of size 1 along every dimension along which they are constant."""
    for dim in range(field.ndim):
        if field.shape[dim] > 1:
            first = field.narrow(dim, 0, 1)
            if field.stride(dim) == 0 or bool((field == first).all()):
                field = first
    return field


def vector(field: Tensor, ndim: int, dim: int) -> Tensor:
    """One-dimensional labels, laid along a dimension of a tensor of ``ndim`` dimensions."""
    return field.reshape([-1 if d == dim else 1 for d in range(ndim)])

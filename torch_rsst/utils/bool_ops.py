"""Bool tensors: comparisons into them, how many are True, which, and a bit for each.

On the CPU this is NumPy's work, over the same memory: PyTorch takes three to ten times as long there.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

Comparison = Literal["<=", ">", ">=", "==", "!="]

_PYTORCH = {"<=": torch.le, ">": torch.gt, ">=": torch.ge, "==": torch.eq, "!=": torch.ne}
_NUMPY = {
    "<=": np.less_equal,
    ">": np.greater,
    ">=": np.greater_equal,
    "==": np.equal,
    "!=": np.not_equal,
}


def numpy_reads(values: Tensor) -> bool:
    """Whether this is NumPy's work: on the CPU, and no wrapper around other tensors."""
    own_dispatch = type(values).__torch_dispatch__ is Tensor.__torch_dispatch__
    return own_dispatch and values.device.type == "cpu"


def compare(values: Tensor, how: Comparison, bound: float | Tensor, *, out: Tensor) -> Tensor:
    """Where ``values`` are on that side of a bound, or of their own bound each.

    Example:
        >>> compare(torch.tensor([1.0, 2.0]), ">", 1, out=torch.empty(2, dtype=torch.bool))
        tensor([False,  True])

    Args:
        values: a tensor.
        how: the comparison.
        bound: of all of them, or a tensor of the same shape.
        out: a bool tensor of the same shape, which is changed in place and returned.
    """
    if not numpy_reads(values):
        return _PYTORCH[how](values, bound, out=out)
    limit = bound.numpy() if isinstance(bound, Tensor) else bound
    _NUMPY[how](_array(values), limit, out=out.numpy())
    return out


def _array(values: Tensor) -> np.ndarray:
    # NumPy knows no bfloat16, and takes long over float16.
    short = values.is_floating_point() and values.element_size() < 4
    return (values.float() if short else values).numpy(force=True)


def count(flags: Tensor) -> int | Tensor:
    """How many are True; elsewhere than on the CPU without waiting for it."""
    return int(np.count_nonzero(flags.numpy())) if numpy_reads(flags) else flags.sum()


def positions(flags: Tensor) -> Tensor:
    """Which are True, on the CPU."""
    return torch.from_numpy(np.flatnonzero(flags.numpy()))


def packed(flags: Tensor) -> Tensor:
    """A bit for each, on the CPU, eight to a byte."""
    return torch.from_numpy(np.packbits(flags.numpy()))


def unpacked(bits: Tensor, size: int) -> Tensor:
    """The ``size`` flags that bits were made from."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=size)).view(torch.bool)

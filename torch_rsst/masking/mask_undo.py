"""Masks that are about to be written, saved in little memory, and put back where writing fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from torch_rsst.distributed.dtensor import local
from torch_rsst.utils.bool_ops import compare, count, packed, unpacked
from torch_rsst.utils.threads import Workers

_PACKED = 1 << 20  # entries of a mask that are packed to bits together, a multiple of 8


def has_own_memory(tensor: Tensor) -> bool:
    """Whether no two entries share memory, as those of an expanded tensor do."""
    return not any(
        n > 1 and step == 0 for n, step in zip(tensor.shape, tensor.stride(), strict=True)
    )


def is_writable(tensor: Tensor) -> bool:
    """Whether entries can be changed in place: not those of a tensor made in inference mode, either."""
    return has_own_memory(tensor) and not tensor.is_inference()


def restore_callbacks(masks: Sequence[Tensor]) -> list[Callable[[], object]]:
    """What gives masks their present values again; those that are not writable keep them."""
    parts = [local(mask) for mask in masks if is_writable(mask)]

    def save(worker: int, workers: int) -> list[Callable[[], object]]:
        return [_saved(part) for part in parts[worker::workers]]

    on_cpu = sum(part.numel() for part in parts if part.device.type == "cpu")
    return list(chain(*Workers(on_cpu).run(save)))


def _saved(mask: Tensor) -> Callable[[], object]:
    """What puts a mask back: from a bit an entry, where zeros and ones on the CPU let us."""
    bits = _packed(mask) if mask.device.type == "cpu" and mask.is_floating_point() else None
    if bits is None:  # a device has no time for operations on a part of a mask each
        return partial(mask.copy_, mask.detach().clone())
    return lambda: mask.copy_(_unpacked(bits, mask.shape))


def _packed(mask: Tensor) -> list[Tensor] | None:
    """Which entries are one, a bit each; None where some are neither zero nor one."""
    bits = []
    flags = torch.empty(min(mask.numel(), _PACKED), dtype=torch.bool, device="cpu")
    for part in torch.split(mask.reshape(-1), _PACKED):
        own = flags[: part.numel()]
        alive = count(compare(part, "!=", 0, out=own))
        bits.append(packed(own))
        if count(compare(part, "==", 1, out=own)) != alive:
            return None
    return bits


def _unpacked(bits: Sequence[Tensor], shape: torch.Size) -> Tensor:
    parts = [unpacked(part, 8 * part.numel()) for part in bits]
    return torch.cat(parts)[: shape.numel()].view(shape)

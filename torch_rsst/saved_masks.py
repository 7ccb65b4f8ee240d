"""Masks that are about to be written, saved in little memory, and put back where writing fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from torch_rsst.shards import local
from torch_rsst.workers import Workers

_PACKED = 1 << 20  # entries of a mask that are packed to bits together


@contextmanager
def put_back_on_failure(masks: Sequence[Tensor]) -> Iterator[None]:
    """Give masks their values again if the block raises, interrupts included."""
    parts = [local(mask) for mask in masks]

    def save(turn: int, turns: int) -> list[Callable[[], object]]:
        return [_saved(part) for part in parts[turn::turns]]

    on_cpu = sum(part.numel() for part in parts if part.device.type == "cpu")
    put_back = list(chain(*Workers(on_cpu // _PACKED).run(save)))
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for each in put_back:
                each()
        raise


def _saved(mask: Tensor) -> Callable[[], object]:
    """What puts a mask back: from a bit an entry, where zeros and ones on the CPU let us."""
    bits = _packed(mask) if mask.device.type == "cpu" and mask.is_floating_point() else None
    if bits is None:  # a device has no time for operations on a part of a mask each
        return partial(mask.copy_, mask.detach().clone())
    return lambda: mask.copy_(_unpacked(bits, mask.shape))


def _packed(mask: Tensor) -> Tensor | None:
    """Which entries are one, a bit each; None where some are neither zero nor one."""
    flat = mask.reshape(-1)
    size = min(flat.numel(), _PACKED)
    rest = flat.new_empty(size)
    spare = flat.new_empty(2, -(-size // 8))
    packed = []
    for part in torch.split(flat, _PACKED):
        # m − m², which is 0 for these two alone
        torch.addcmul(part, part, part, value=-1, out=rest[: part.numel()])
        if part.numel() and any(float(most) != 0 for most in rest[: part.numel()].aminmax()):
            return None
        packed.append(_bits(part, *spare))
    return torch.cat(packed)


def _bits(part: Tensor, bits: Tensor, alive: Tensor) -> Tensor:
    if part.numel() % 8:
        part = nn.functional.pad(part, (0, -part.numel() % 8))
    planes = part.view(8, -1)
    bits, alive = (spare[: planes.shape[1]] for spare in (bits, alive))
    bits.zero_()
    # In the mask's dtype, which holds 0 to 255: into bools and bytes takes several times as long.
    for place, plane in enumerate(planes):
        bits.add_(torch.ne(plane, 0, out=alive), alpha=1 << place)
    return bits.to(torch.uint8)


def _unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    parts = [
        torch.stack([part >> place & 1 for place in range(8)]).view(-1)
        for part in torch.split(bits, _PACKED // 8)
    ]
    return torch.cat(parts)[: shape.numel()].view(shape)

"""Masks that are about to be written, saved in little memory, and put back where writing fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from torch_rsst.shards import local
from torch_rsst.workers import Workers

_PACKED = 1 << 20  # entries of a mask that are packed to bits together


@contextmanager
def put_back_on_failure(masks: Sequence[Tensor]) -> Iterator[None]:
    """Give masks of zeros and ones their values again if the block raises, interrupts included."""
    put_back = _saved([local(mask) for mask in masks])
    try:
        yield
    except BaseException:
        put_back()
        raise


def _saved(masks: Sequence[Tensor]) -> Callable[[], None]:
    """What puts the values of masks back: a bit an entry, elsewhere than on the CPU a byte.

    Devices have no time for operations on a part of a mask each, but they copy many masks in one.
    """
    here = [mask for mask in masks if mask.device.type == "cpu"]
    elsewhere = [mask for mask in masks if mask.device.type != "cpu"]

    def pack(turn: int, turns: int) -> list[tuple[Tensor, Tensor]]:
        return [(mask, _packed(mask)) for mask in here[turn::turns]]

    packed = Workers(sum(mask.numel() for mask in here) // _PACKED).run(pack)
    flags = [torch.empty_like(mask, dtype=torch.bool) for mask in elsewhere]
    if elsewhere:
        torch._foreach_copy_(flags, elsewhere)

    def put_back() -> None:
        with torch.no_grad():
            for mask, bits in chain(*packed):
                mask.copy_(_unpacked(bits, mask.shape))
            if elsewhere:
                torch._foreach_copy_(elsewhere, flags)

    return put_back


def _packed(mask: Tensor) -> Tensor:
    """Which entries are not zero, one bit each."""
    flat = mask.reshape(-1)
    spare = torch.empty(
        2, -(-min(flat.numel(), _PACKED) // 8), dtype=mask.dtype, device=mask.device
    )
    return torch.cat([_bits(part, *spare) for part in torch.split(flat, _PACKED)])


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

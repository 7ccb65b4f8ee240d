"""Put modules back exactly as they were where a call fails: all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from torch_rsst.fsdp import tell_of_new_name
from torch_rsst.live_weight import ORIG
from torch_rsst.shards import local
from torch_rsst.site import Site
from torch_rsst.workers import Workers

_PACKED = 1 << 20  # entries of a mask that are packed to bits together


@contextmanager
def place_kept(site: Site) -> Iterator[None]:
    """Put the parameter back to its place in the module, whatever name the block gives it."""
    registry = site.module._parameters

    def key() -> str | None:
        return next((k for k in (site.name + ORIG, site.name) if k in registry), None)

    old = key()
    order = list(registry)
    yield
    new = key()
    if old is None or new is None or list(registry)[order.index(old)] == new:
        return
    # In place: hooks, optimizers and parametrizations may hold the registry itself.
    for other in [new, *order[order.index(old) + 1 :]]:
        registry[other] = registry.pop(other)


@contextmanager
def rolled_back_on_failure(sites: Sequence[Site]) -> Iterator[None]:
    """Put modules back exactly as they were if the block raises, interrupts included."""
    modules = {id(site.module): site.module for site in sites}.values()
    saved = [(module, type(module), _shallow(module)) for module in modules]
    present = {id(mask): local(mask) for mask in (site.mask for site in sites) if mask is not None}
    put_masks_back = _kept(list(present.values()))
    try:
        yield
    except BaseException:
        for module, cls, state in saved:
            module.__class__ = cls
            _put_back(module, state)
        for site in sites:
            now, other = site.name, site.name + ORIG
            if other in site.module._parameters:
                now, other = other, now
            tell_of_new_name(site.module, other, now)
        put_masks_back()
        raise


def _kept(masks: Sequence[Tensor]) -> Callable[[], None]:
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


def _shallow(module: nn.Module) -> dict[str, Any]:
    """A module's attributes, registries (and a recurrent layer's list of weights) copied."""
    return {
        key: value.copy() if isinstance(value, (dict, list)) else value
        for key, value in module.__dict__.items()
    }


def _put_back(module: nn.Module, state: dict[str, Any]) -> None:
    for key in module.__dict__.keys() - state.keys():
        del module.__dict__[key]
    for key, value in state.items():
        present = module.__dict__.get(key)
        if isinstance(present, dict) and isinstance(value, dict):
            # In place: hook handles hold weak references to these registries.
            present.clear()
            present.update(value)
        else:
            module.__dict__[key] = value

"""Put modules back exactly as they were where a call fails: all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from torch_rsst.fsdp import tell_of_new_name
from torch_rsst.live_weight import ORIG
from torch_rsst.saved_masks import put_back_on_failure
from torch_rsst.site import Site


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
def rolled_back_on_failure(
    sites: Sequence[Site], *, written: Sequence[Site] | None = None
) -> Iterator[list[Callable[[], object]]]:
    """Put modules back exactly as they were if the block raises, interrupts included.

    Yields a list for what else must be called then, the last one first, once the modules are back.

    Args:
        sites: whose modules may change.
        written: those with masks whose values may change; by default the same.
    """
    present = [site.mask for site in (sites if written is None else written)]
    masks = {id(mask): mask for mask in present if mask is not None}
    with put_back_on_failure(list(masks.values())), _modules_put_back_on_failure(sites) as undo:
        yield undo


@contextmanager
def _modules_put_back_on_failure(
    sites: Sequence[Site],
) -> Iterator[list[Callable[[], object]]]:
    modules = {id(site.module): site.module for site in sites}.values()
    saved = [(module, type(module), _shallow(module)) for module in modules]
    undo: list[Callable[[], object]] = []
    try:
        yield undo
    except BaseException:
        for module, cls, state in saved:
            module.__class__ = cls
            _put_back(module, state)
        for site in sites:
            now, other = site.name, site.name + ORIG
            if other in site.module._parameters:
                now, other = other, now
            tell_of_new_name(site.module, other, now)
        with torch.no_grad():
            for each in reversed(undo):
                each()
        raise


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
        elif isinstance(present, list) and isinstance(value, list):
            present[:] = value
        else:
            module.__dict__[key] = value

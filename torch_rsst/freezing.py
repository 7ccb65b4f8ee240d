"""Entries that no optimizer may move: masked latents, and the zeros that removed masks leave.

A gradient of 0 does not hold a weight: momentum, Adam's averages and weight decay go on moving it. So
frozen entries are put back after each optimizer step, by hooks that PyTorch calls for every optimizer.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from torch_rsst.errors import message
from torch_rsst.masks import unwrap
from torch_rsst.site import Site, masked_sites


def freeze_masked(model: nn.Module) -> RemovableHandle:
    """Keep what lies under the masks of a model exactly as it is, whatever optimizer trains it.

    Example:
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> torch_rsst.apply_mask(layer, {"weight": torch.tensor([[True, False]])})
        >>> handle, latent = torch_rsst.freeze_masked(layer), layer.weight_orig[0, 1].item()
        >>> optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> layer.weight_orig[0, 1].item() == latent
        True

    Otherwise masked latents drift under momentum and weight decay, and a later fillback returns what
    they have become. Parameters that are masked now are covered, with whatever is masked in them at
    the time of a step. Costs a copy of each of these parameters during a step. Belongs to this model
    object: a copy of the model starts unfrozen.

    Returns:
        a handle; ``handle.remove()`` lifts the freeze, as does removing the masks.

    Raises:
        TypeError: unless given a module.
        ValueError: where nothing is masked.
    """
    sites = masked_sites(unwrap(model).modules())
    if not sites:
        remedy = "Mask it first: a freeze holds what is under masks that are there."
        raise ValueError(message("model", expected="masked parameters", got="none", remedy=remedy))
    return freeze_latents(sites)


def freeze_latents(sites: Iterable[Site]) -> RemovableHandle:
    """Hold what is masked in these parameters."""
    return _freeze([_Latents(site) for site in sites])


def freeze_zeros(zeros: Iterable[tuple[Site, Tensor]]) -> RemovableHandle:
    """Hold entries of dense parameters at 0: pairs of a site and the bool tensor of its zeros."""
    return _freeze([_Zeros(site, entries) for site, entries in zeros])


class _Frozen:
    """Entries of one parameter that are put back after a step."""

    def __init__(self, site: Site) -> None:
        self._module, self._name = weakref.ref(site.module), site.name

    @property
    def forgotten(self) -> bool:
        """Whether the model is gone."""
        return self._module() is None

    def _site_among(self, updated: set[int]) -> Site | None:
        """The parameter's place, if a step updates it and the freeze still concerns it."""
        module = self._module()
        site = None if module is None else Site(module, self._name)
        concerned = site is not None and self._concerns(site) and id(site.original) in updated
        return site if concerned else None

    def _concerns(self, site: Site) -> bool:
        raise NotImplementedError

    def before_step(self, updated: set[int]) -> None:
        """Remember what a step may change."""

    def after_step(self, updated: set[int]) -> None:
        """Put it back."""
        raise NotImplementedError


class _Latents(_Frozen):
    """What is masked at the time of the step keeps its value."""

    _before: Tensor | None = None

    def _concerns(self, site: Site) -> bool:
        return site.is_masked

    def before_step(self, updated: set[int]) -> None:
        site = self._site_among(updated)
        self._before = None if site is None else site.original.detach().clone()

    def after_step(self, updated: set[int]) -> None:
        site, before, self._before = self._site_among(updated), self._before, None
        if site is not None and before is not None and (alive := site.alive) is not None:
            with torch.no_grad():
                site.original.copy_(torch.where(alive, site.original, before))


class _Zeros(_Frozen):
    """A fixed set of entries is 0, as long as no mask decides about the parameter again."""

    def __init__(self, site: Site, entries: Tensor) -> None:
        super().__init__(site)
        self._entries = entries

    def _concerns(self, site: Site) -> bool:
        return not site.is_masked and site.module._parameters.get(site.name) is not None

    def after_step(self, updated: set[int]) -> None:
        if (site := self._site_among(updated)) is not None:
            self._entries = self._entries.to(site.original.device)
            with torch.no_grad():
                site.original.masked_fill_(self._entries, 0.0)


# Keyed by handle, so that each freeze can be lifted by itself.
_FROZEN: OrderedDict[int, Sequence[_Frozen]] = OrderedDict()
_step_hooks: list[RemovableHandle] = []


def _freeze(entries: Sequence[_Frozen]) -> RemovableHandle:
    if not _step_hooks:
        _step_hooks.append(register_optimizer_step_pre_hook(_before_step))
        _step_hooks.append(register_optimizer_step_post_hook(_after_step))
    handle = RemovableHandle(_FROZEN)
    _FROZEN[handle.id] = entries
    return handle


def _updated_by(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for key in [key for key, all_of in _FROZEN.items() if all(f.forgotten for f in all_of)]:
        del _FROZEN[key]
    updated = _updated_by(optimizer)
    for frozen in _all_frozen():
        frozen.before_step(updated)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    updated = _updated_by(optimizer)
    for frozen in _all_frozen():
        frozen.after_step(updated)


def _all_frozen() -> list[_Frozen]:
    return [frozen for entries in _FROZEN.values() for frozen in entries]

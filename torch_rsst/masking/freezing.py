"""Entries that no optimizer may move: masked latents, and the zeros that removed masks leave.

A gradient of 0 does not hold a weight: momentum, Adam's averages and weight decay go on moving it. So
frozen entries are put back after each optimizer step, by hooks that PyTorch calls for every optimizer.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from torch_rsst.distributed.dtensor import placed_like
from torch_rsst.masking.parameter_ref import ParameterRef, masked_refs
from torch_rsst.utils.errors import refuse
from torch_rsst.utils.optimizer_hooks import is_nested


def freeze_masked(model: nn.Module) -> FreezeHandle:
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
    if not isinstance(model, nn.Module):
        got, remedy = type(model).__name__, "Pass the torch.nn.Module that is masked."
        refuse(TypeError, "model", "a module", got, remedy)
    refs = masked_refs(model.modules())
    if not refs:
        remedy = "Mask it first: a freeze holds what is under masks that are there."
        refuse(ValueError, "model", "masked parameters", "none", remedy)
    return freeze_latents(refs)


def freeze_latents(refs: Sequence[ParameterRef]) -> FreezeHandle:
    """Hold what is masked in these parameters."""
    return _freeze([(ref, _Latents()) for ref in refs])


def freeze_zeros(zeros: Iterable[tuple[ParameterRef, Tensor]]) -> FreezeHandle:
    """Hold entries of dense parameters at 0: pairs of a parameter and the bool tensor of its zeros.

    Until the parameter is masked, replaced by another one, or :func:`torch_rsst.masking.freezing.end_freeze` is called.
    """
    return _freeze([(ref, _Zeros(ref.original, entries)) for ref, entries in zeros])


def end_freeze(ref: ParameterRef) -> None:
    """Hold nothing of a parameter any more: it is masked anew, or no longer."""
    if frozen := _FROZEN.get(ref.module):
        frozen.pop(ref.name, None)


def frozen_now(refs: Iterable[ParameterRef]) -> Callable[[], None]:
    """What freezes of these parameters again what is frozen of them now, and no more."""
    before = [(ref, _FROZEN.get(ref.module, {}).get(ref.name)) for ref in refs]

    def put_back() -> None:
        for ref, frozen in before:
            if frozen is None:
                end_freeze(ref)
            else:
                _FROZEN.setdefault(ref.module, {})[ref.name] = frozen

    return put_back


class _Latents:
    """What is masked at the time of a step keeps its value."""

    _before: Tensor | None = None

    def holds(self, ref: ParameterRef) -> bool:
        return ref.is_masked

    def before_step(self, ref: ParameterRef) -> None:
        self._before = ref.original.detach().clone()

    def after_step(self, ref: ParameterRef, *, nested: bool) -> None:
        if self._before is not None and (alive := ref.alive) is not None:
            with torch.no_grad():
                ref.original.copy_(torch.where(alive, ref.original, self._before))
        if not nested:
            self._before = None


class _Zeros:
    """A fixed set of entries of one very parameter is 0."""

    def __init__(self, original: nn.Parameter, entries: Tensor) -> None:
        self._shape, self._entries = original.shape, entries

    def holds(self, ref: ParameterRef) -> bool:
        return not ref.is_masked and ref.original.shape == self._shape

    def before_step(self, ref: ParameterRef) -> None:
        """Nothing to remember: the value is 0."""

    def after_step(self, ref: ParameterRef, *, nested: bool) -> None:
        self._entries = placed_like(self._entries, ref.original)
        with torch.no_grad():
            ref.original.masked_fill_(self._entries, 0.0)


_Frozen: TypeAlias = _Latents | _Zeros

# One entry a parameter, however often it is frozen; none keeps its model alive.
_FROZEN: weakref.WeakKeyDictionary[nn.Module, dict[str, _Frozen]] = weakref.WeakKeyDictionary()
_step_hooks: list[RemovableHandle] = []


class FreezeHandle:
    """What lifts a freeze: ``handle.remove()``."""

    def __init__(self, frozen: Iterable[tuple[ParameterRef, _Frozen]]) -> None:
        self._frozen = [(weakref.ref(ref.module), ref.name, each) for ref, each in frozen]

    def remove(self) -> None:
        """Let the entries go; a second call does nothing, nor what was frozen anew since."""
        for reference, name, frozen in self._frozen:
            module = reference()
            held = {} if module is None else _FROZEN.get(module, {})
            if held.get(name) is frozen:
                del held[name]


def _freeze(frozen: list[tuple[ParameterRef, Any]]) -> FreezeHandle:
    if not _step_hooks:
        _step_hooks.append(register_optimizer_step_pre_hook(_before_step))
        _step_hooks.append(register_optimizer_step_post_hook(_after_step))
    for ref, each in frozen:
        _FROZEN.setdefault(ref.module, {})[ref.name] = each
    return FreezeHandle(frozen)


def _frozen_in(optimizer: Optimizer) -> list[tuple[ParameterRef, _Frozen]]:
    """What is frozen of the parameters that an optimizer updates, where the freeze still holds."""
    updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = []
    for module, by_name in list(_FROZEN.items()):
        for name, frozen in list(by_name.items()):
            ref = ParameterRef(module, name)
            present = ref.is_masked or module._parameters.get(name) is not None
            if present and frozen.holds(ref) and id(ref.original) in updated:
                found.append((ref, frozen))
    return found


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if _FROZEN and not is_nested(optimizer, sys._getframe(1)):
        for ref, frozen in _frozen_in(optimizer):
            frozen.before_step(ref)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not _FROZEN:
        return
    nested = is_nested(optimizer, sys._getframe(1))
    for ref, frozen in _frozen_in(optimizer):
        frozen.after_step(ref, nested=nested)

"""Entries that no optimizer may move: masked latents, and the zeros that removed masks leave.

A gradient of 0 does not hold a weight: momentum, Adam's averages and weight decay go on moving it. So
frozen entries are put back after each optimizer step, by hooks that PyTorch calls for every optimizer.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Container, Iterable, Sequence
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
from torch_rsst.masking.mask_values import check_binary
from torch_rsst.masking.names import masked_places, unwrap
from torch_rsst.masking.parameter_ref import ParameterRef
from torch_rsst.masking.tied import masked_with
from torch_rsst.utils.errors import UnfrozenZerosWarning, message, refuse
from torch_rsst.utils.optimizer_hooks import held_by, steps_around


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
    the time of a step, also of an optimizer around another one. Convert the model before, where
    ``torch.__future__.set_swap_module_params_on_conversion(True)`` is set: PyTorch refuses it for what is frozen. Costs a copy of each of these
    parameters during a step. Belongs to this model object: a copy of the model starts unfrozen. What
    :func:`torch_rsst.compact` makes of it does not, where masks are kept.

    Returns:
        a handle; ``handle.remove()`` lifts the freeze, as does removing the masks.

    Raises:
        TypeError: unless given a module.
        ValueError: where nothing is masked, a tied parameter for some of its modules only, or a mask has other values
            than 0 and 1.
    """
    refs = masked_places(model)
    if not refs:
        remedy = "Mask it first: a freeze holds what is under masks that are there."
        refuse(ValueError, "model", "masked parameters", "none", remedy)
    for ref in refs:
        check_binary(ref.mask, ref)
    masked_with(refs)  # for what it refuses
    return freeze_latents(refs, within=model)


def freeze_latents(
    refs: Sequence[ParameterRef], *, within: nn.Module | None = None
) -> FreezeHandle:
    """Hold what is masked in these parameters; see :func:`freeze_zeros` for ``within``."""
    return _freeze([_Frozen(ref) for ref in refs], within)


def freeze_zeros(
    zeros: Iterable[tuple[ParameterRef, Tensor]], *, within: nn.Module | None = None
) -> FreezeHandle:
    """Hold entries of dense parameters at 0, until they are masked or :func:`end_freeze` is called.

    Args:
        zeros: pairs of a parameter and the bool tensor of its zeros.
        within: the model that has the parameters: where a module of it is replaced, it tells.
    """
    return _freeze([_Frozen(ref, entries) for ref, entries in zeros], within)


def end_freeze(ref: ParameterRef) -> None:
    """Hold nothing of a parameter any more: it is masked anew, or no longer."""
    for frozen in list(_FROZEN):
        if frozen.is_of(ref):
            _discard(frozen)


def frozen_now(refs: Iterable[ParameterRef]) -> Callable[[], None]:
    """What freezes of these parameters again what is frozen of them now, and no more."""
    before = [(ref, [each for each in _FROZEN if each.is_of(ref)]) for ref in refs]

    def put_back() -> None:
        for ref, frozen in before:
            end_freeze(ref)
            _FROZEN.extend(each for each in frozen if each not in _FROZEN)

    return put_back


def move_freeze(old: ParameterRef, new: ParameterRef) -> None:
    """Go on holding a parameter whose mask is in another module now."""
    for frozen in _FROZEN:
        if frozen.is_of(old):
            frozen.module, frozen.name = weakref.ref(new.module), new.name


def heirs_of_parameter(
    places: Sequence[ParameterRef], new: ParameterRef, cut: Callable[[Tensor], Tensor]
) -> Heirs:
    """What holds of ``new`` what is held of a parameter; it is not yet in force.

    Args:
        places: of the parameter.
        new: a place of the one that takes its place.
        cut: entries of the old parameter, as bool → those of the new one.
    """
    shape = places[0].original.shape
    held = [f for f in _FROZEN if f.shape == shape and any(map(f.is_of, places))]
    heirs = {frozen: frozen.heir(new, cut) for frozen in held}
    return {frozen: heir for frozen, heir in heirs.items() if heir is not None}


def hold(heirs: Heirs) -> None:
    """Let them hold from now on, and what they come from, too; a handle that lifts its freeze lifts theirs."""
    _freeze([*heirs.values()])
    for frozen, heir in heirs.items():
        frozen.heirs.add(heir)


class _Frozen:
    """Entries of one parameter, wherever it goes, or of one that takes its place in its module.

    What is masked at the time of a step keeps its value; with ``zeros``, a fixed set of entries is 0 instead.
    """

    def __init__(self, ref: ParameterRef, zeros: Tensor | None = None) -> None:
        original = ref.original
        self.module, self.name, self.shape = weakref.ref(ref.module), ref.name, original.shape
        self.parameter = weakref.ref(original, self._parameter_died)
        self.heirs: weakref.WeakSet[_Frozen] = weakref.WeakSet()
        self.home: tuple[weakref.ref[nn.Module], str] | None = None  # a model, and where in it
        self._zeros = zeros
        self._before: Tensor | None = None

    def _parameter_died(self, _: object) -> None:
        if self.module() is None and self.successor is None:  # else the next step tells
            _discard(self)

    @property
    def successor(self) -> ParameterRef | None:
        """The parameter where this one was in its model, if both that module and this one's are there no more."""
        if self.module() is not None or self.home is None:
            return None
        module, path = self.home[0](), self.home[1]
        for name in path.split("."):
            module = None if module is None else module._modules.get(name)
        ref = None if module is None else ParameterRef(module, self.name)
        return ref if ref is not None and ref.held is not None else None

    def is_of(self, ref: ParameterRef) -> bool:
        if self.module() is ref.module and self.name == ref.name:
            return True
        held = ref.held
        return held is not None and self.parameter() is held

    @property
    def ref(self) -> ParameterRef | None:
        """Where it was frozen, while there is a parameter of that shape."""
        module = self.module()
        if module is None:
            return None
        ref = ParameterRef(module, self.name)
        held = ref.held
        return ref if held is not None and held.shape == self.shape else None

    def held(self, updated: Container[int]) -> nn.Parameter | None:
        """The parameter to hold in a step that updates those with these ids."""
        ref = self.ref
        is_masked = ref is not None and ref.is_masked
        if is_masked != (self._zeros is None):
            return None
        for parameter in (self.parameter(), None if ref is None else ref.original):
            fits = parameter is not None and parameter.shape == self.shape
            if fits and id(parameter) in updated:
                return parameter
        return None

    def heir(self, ref: ParameterRef, cut: Callable[[Tensor], Tensor]) -> _Frozen | None:
        """What holds the same of another parameter; None where that leaves nothing to hold."""
        zeros = None if self._zeros is None else cut(self._zeros)
        holds = ref.is_masked if zeros is None else bool(zeros.any())
        return _Frozen(ref, zeros) if holds else None

    @property
    def zeros(self) -> int:
        """How many entries it holds at 0, those of latents not counted."""
        return 0 if self._zeros is None else int(self._zeros.count_nonzero())

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing left to hold, though the module lives on, or another in its place."""
        parameter = self.parameter()
        gone = parameter is None or parameter.shape != self.shape
        lives = self.module() is not None or self.successor is not None
        return gone and self.ref is None and lives

    def before_step(self, parameter: nn.Parameter) -> None:
        if self._zeros is None:
            self._before = parameter.detach().clone()

    def after_step(self, parameter: nn.Parameter, *, nested: bool) -> None:
        ref = self.ref
        alive = None if ref is None else ref.alive
        with torch.no_grad():
            if self._zeros is not None:
                self._zeros = placed_like(self._zeros, parameter)
                parameter.masked_fill_(self._zeros, 0.0)
            elif self._before is not None and alive is not None:
                parameter.copy_(torch.where(alive, parameter, self._before))
        if not nested:
            self._before = None


# One entry a parameter, however often it is frozen; none keeps its model alive.
_FROZEN: list[_Frozen] = []
_step_hooks: list[RemovableHandle] = []
Heirs: TypeAlias = dict[_Frozen, _Frozen]
"""What is held → what holds the same of the parameter that takes its place."""


class FreezeHandle:
    """What lifts a freeze: ``handle.remove()``."""

    def __init__(self, frozen: Iterable[_Frozen]) -> None:
        self._frozen = list(frozen)

    def remove(self) -> None:
        """Let the entries go; a second call does nothing, nor what was frozen anew since."""
        for frozen in self._frozen:
            _discard(frozen)
            FreezeHandle(frozen.heirs).remove()


def _discard(frozen: _Frozen) -> None:
    if frozen in _FROZEN:
        _FROZEN.remove(frozen)


def _freeze(frozen: Sequence[_Frozen], within: nn.Module | None = None) -> FreezeHandle:
    if not _step_hooks:
        _step_hooks.append(register_optimizer_step_pre_hook(_before_step))
        _step_hooks.append(register_optimizer_step_post_hook(_after_step))
    model = None if within is None else unwrap(within)
    paths = {} if model is None else {module: path for path, module in model.named_modules()}
    for each in frozen:
        if each.ref is not None:
            end_freeze(each.ref)
            if model is not None and each.ref.module in paths:
                each.home = weakref.ref(model), paths[each.ref.module]
        _FROZEN.append(each)
    return FreezeHandle(frozen)


def _frozen_in(optimizer: Optimizer) -> list[tuple[nn.Parameter, _Frozen]]:
    """What is frozen of the parameters that an optimizer updates, where the freeze still holds."""
    updated = set(map(id, held_by(optimizer)))
    found = [(frozen.held(updated), frozen) for frozen in list(_FROZEN)]
    return [(parameter, frozen) for parameter, frozen in found if parameter is not None]


def _warn_of_ended() -> None:
    for frozen in [each for each in _FROZEN if each.has_ended]:
        _discard(frozen)
        successor = frozen.successor
        if successor is not None and any(each.is_of(successor) for each in _FROZEN):
            continue
        module = frozen.module() if successor is None else successor.module
        text = message(
            f"freeze of {frozen.name!r} of {type(module).__name__}",
            expected="a parameter of the same shape" if successor is None else "the same module",
            got=f"{'none any more' if successor is None else 'another one in its place'}: "
            "nothing holds its entries from now on",
            remedy="Freeze it after the module was changed, or mask it again.",
        )
        warnings.warn(text, UnfrozenZerosWarning, stacklevel=4)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not _FROZEN:
        return
    around = set(map(id, held_by(*steps_around(sys._getframe(1)))))
    if not around:
        _warn_of_ended()
    for parameter, frozen in _frozen_in(optimizer):
        if id(parameter) not in around:
            frozen.before_step(parameter)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not _FROZEN:
        return
    # What an optimizer around this one updates as well is held once more when that one is done.
    around = set(map(id, held_by(*steps_around(sys._getframe(1)))))
    for parameter, frozen in _frozen_in(optimizer):
        frozen.after_step(parameter, nested=id(parameter) in around)

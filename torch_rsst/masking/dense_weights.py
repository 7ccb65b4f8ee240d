"""Plain parameters in place of masked ones for the length of a ``with`` block."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from torch_rsst.distributed.dtensor import is_sharded
from torch_rsst.masking.dense_scope import PLAIN_NOW, give_up, is_plain_now
from torch_rsst.masking.dense_undo import give_back, set_data, values_back
from torch_rsst.masking.freezing import move_freeze
from torch_rsst.masking.live_weight import ORIG, is_live, make_plain
from torch_rsst.masking.mask_values import check_binary
from torch_rsst.masking.masked_parameter import find_hook, reparametrize, set_hook, set_plain
from torch_rsst.masking.masked_product import masked, masked_gradient
from torch_rsst.masking.names import masked_places, unwrap
from torch_rsst.masking.parameter_ref import ParameterRef, masked_refs
from torch_rsst.masking.rollback import AllOrNothing, reorder
from torch_rsst.masking.tied import masked_with, sharing
from torch_rsst.utils.errors import check_choice, listing, refuse
from torch_rsst.utils.optimizer_hooks import held_by

MaskedWrites: TypeAlias = Literal["error", "drop", "keep"]
MASKED_WRITES = ("error", "drop", "keep")


def dense_weights(
    model: nn.Module, *, masked_writes: MaskedWrites = "error"
) -> AbstractContextManager[nn.Module]:
    """Replace every masked parameter by a plain one, zero where it is masked, within a ``with`` block.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> torch_rsst.apply_mask(layer, {"weight": torch.tensor([[True, False]])})
        >>> with torch_rsst.dense_weights(layer):
        ...     [name for name, _ in layer.named_parameters()]
        ['weight', 'bias']
        >>> [name for name, _ in layer.named_parameters()]
        ['weight_orig', 'bias']

    For inference at the speed of a dense model, and for code that needs a parameter called ``weight``:
    merging adapters, ``convert_sync_batchnorm``, ``torch.nn.init``, surgery on weights. Inside, the modules are of
    their original classes, without ``weight_orig``, ``weight_mask`` and pruning hook; copies and exported programs made
    inside are dense models. Calls that would change masks, or go by them, are refused inside: rounds go on and are
    saved outside.

    On leaving, the masks are put back: in the same modules, and in modules that have taken their place,
    which are found by the parameter or by their name. Modules that share a parameter then, whether
    they belong to the model or not, share its mask. Values that were written to entries
    that are alive go to ``weight_orig``; gradients are added to its gradient on leaving, so that
    ``zero_grad()`` and ``backward()`` belong inside or outside together. A parameter that was assigned
    inside becomes ``weight_orig`` itself. An optimizer that is made inside holds the plain parameters, which are gone
    afterwards: make it before or after. Memory formats and sharing between processes that are set inside are not kept.

    Args:
        model: the model, wrapped or not; changed in place.
        masked_writes: what becomes of values other than 0 in masked entries: ``"error"`` raises on
            leaving; ``"drop"`` forgets them, ``weight_orig`` keeps what it has there; ``"keep"`` puts them into
            ``weight_orig``, under the mask.

    Returns:
        a context manager that gives the model. Where the block or leaving it raises, parameters,
        buffers and submodules are what they were at the start of the block. It takes a copy of the
        masked weights, and one of all other parameters and buffers, for as long as it lasts.

    Raises:
        TypeError: unless given a module.
        ValueError: for another ``masked_writes``, for parameters that are distributed over several ranks, or masks with other
            values than 0 and 1.
        RuntimeError: for a block in another one for the same modules; by an optimizer that updates masked parameters and steps inside,
            or that was made inside and steps afterwards;
            on leaving, for values written to masked entries under ``"error"``, for masks that were
            set inside, or where a masked parameter is gone or has another shape.
    """
    check_choice("masked_writes", masked_writes, MASKED_WRITES)
    unwrap(model)
    return _DenseWeights(model, masked_writes)


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a masked parameter was, and what else masking had left there."""

    path: str
    ref: ParameterRef
    hook: tuple[int, BasePruningMethod] | None
    live: bool
    orders: tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...]]

    @classmethod
    def of(cls, path: str, ref: ParameterRef) -> _Place:
        registries = _registries(ref.module)
        orders: Any = tuple(tuple(registry) for registry in registries)
        return cls(path, ref, find_hook(ref), is_live(ref.module, ref.name), orders)

    @property
    def name(self) -> str:
        return f"{self.path}.{self.ref.name}" if self.path else self.ref.name


@dataclass(frozen=True, eq=False)
class _Dense:
    """A masked parameter, the plain one that stands for it, and its places."""

    original: nn.Parameter
    mask: Tensor
    plain: nn.Parameter
    places: list[_Place]


@dataclass(frozen=True, eq=False)
class _Return:
    """A plain parameter that becomes a masked one again, and the modules that hold it now."""

    dense: _Dense
    parameter: nn.Parameter
    name: str
    refs: list[ParameterRef]

    @property
    def target(self) -> nn.Parameter:
        own = self.parameter is self.dense.plain
        return self.dense.original if own else self.parameter

    @property
    def written(self) -> Tensor:
        """Masked entries that are not 0."""
        return (self.parameter.detach() != 0) & (self.dense.mask.to(self.parameter.device) == 0)


class _DenseWeights(AbstractContextManager[nn.Module]):
    """What :func:`dense_weights` returns. A class, as :class:`AllOrNothing` is one."""

    def __init__(self, model: nn.Module, masked_writes: MaskedWrites) -> None:
        self._model, self._masked_writes = model, masked_writes

    def __enter__(self) -> nn.Module:
        self._root = unwrap(self._model)
        self._modules = dict(self._root.named_modules())
        modules = self._checked()
        self._guard = AllOrNothing(
            [ParameterRef(module, "") for module in self._modules.values()], written=[]
        )
        undo = self._guard.__enter__()
        undo += values_back(self._root)
        self._undo = undo
        self._outside: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._dense = self._swapped()
            self._hooks = [
                register_optimizer_step_pre_hook(self._refuse_step),
                register_module_parameter_registration_hook(self._registered),
            ]
        except BaseException as error:
            self._guard.__exit__(type(error), error, error.__traceback__)
            raise
        self._noted = set(modules)
        PLAIN_NOW.append(self._noted)
        return self._model

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        PLAIN_NOW.remove(self._noted)
        for hook in self._hooks:
            hook.remove()
        try:
            if kind is None:
                with torch.inference_mode(False), torch.no_grad():
                    self._put_back(self._returns())
        except BaseException as refused:
            self._guard.__exit__(type(refused), refused, refused.__traceback__)
            self._give_up()
            raise
        self._guard.__exit__(kind, error, trace)
        self._give_up()

    def _give_up(self) -> None:
        """Hold no parameter any more, and refuse to train those that no module holds."""
        held = _holders([*self._root.modules(), *self._outside])
        give_up(dense.plain for dense in self._dense if id(dense.plain) not in held)
        del self._dense, self._undo, self._guard

    def _checked(self) -> list[nn.Module]:
        """The modules whose masks must stay as they are: those of the model, and others that share them."""
        if is_plain_now(self._modules.values()):
            remedy = "Use the block that is there: its parameters are plain already."
            refuse(RuntimeError, "dense_weights", "no other block for this model", "one", remedy)
        refs = masked_places(self._root)
        for ref in refs:
            if is_sharded(ref.original):
                remedy = "Gather the model first, or read weights as DTensors through `weight`."
                got = "one that is distributed over several ranks"
                refuse(ValueError, f"parameter {ref}", "a whole tensor", got, remedy)
            check_binary(ref.mask, ref)
        return [*self._modules.values(), *(ref.module for ref in masked_with(refs))]

    def _swapped(self) -> list[_Dense]:
        """Put plain parameters in place of all masked ones; those that are tied stay tied."""
        found: dict[int, _Dense] = {}
        for path, module in self._modules.items():
            for ref in masked_refs([module]):
                original, mask = ref.original, ref.mask
                assert mask is not None, "masked_refs() lists masked refs"
                if id(original) not in found:
                    plain = nn.Parameter(masked(original, mask).detach(), original.requires_grad)
                    found[id(original)] = _Dense(original, mask, plain, [])
                found[id(original)].places.append(_Place.of(path, ref))
        for dense in found.values():
            for place in dense.places:
                set_plain(place.ref, dense.plain)
                if place.hook is not None:
                    place.ref.module._forward_pre_hooks.pop(place.hook[0], None)
        return list(found.values())

    def _refuse_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        own = {id(p) for dense in self._dense for p in (dense.original, dense.plain)}
        if any(id(p) in own for p in held_by(optimizer)):
            remedy = "Leave the `with` block first: only then are masks obeyed."
            got = f"a step of {type(optimizer).__name__}"
            refuse(RuntimeError, "dense_weights", "no training inside", got, remedy)

    def _registered(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        """Note modules outside of the model that take a plain parameter, and what they had there."""
        if parameter is None or all(parameter is not dense.plain for dense in self._dense):
            return
        if any(module is own for own in self._modules.values()):
            return
        self._outside.add(module)
        former = module._parameters.get(name)
        if former is not None:
            self._undo.append(partial(give_back, weakref.ref(module), name, former, parameter))

    def _returns(self) -> list[_Return]:
        """Which parameters get their masks back, and where; nothing is touched."""
        found = [self._with_others(each) for each in self._found()]
        for each in found:
            _check_return(each)
        wrong = [each.name for each in found if bool(each.written.any())]
        if wrong and self._masked_writes == "error":
            got = f"other values in {listing(wrong)}"
            remedy = (
                "Pass masked_writes='drop' to forget them, 'keep' to hold them under the mask, or "
                "call remove_all(model) before to give the masks up."
            )
            refuse(RuntimeError, "dense_weights", "zeros in masked entries", got, remedy)
        return found

    def _with_others(self, each: _Return) -> _Return:
        """And the modules that share the parameter outside of the model."""
        own = each.parameter is each.dense.plain
        # The references of `each`; and what puts modules back after an error refers to their dicts.
        others = sharing(each.refs, references=2 if own else 1, shallow=False)
        shared = [ref for ref in others if not _is_of_a_program(ref.module)]
        return replace(each, refs=[*each.refs, *shared])

    def _found(self) -> list[_Return]:
        tree = dict(self._root.named_modules())
        places = [place for dense in self._dense for place in dense.places]
        holders = _holders([*tree.values(), *(place.ref.module for place in places)])
        owner = {id(dense.plain): dense for dense in self._dense}
        found: dict[int, _Return] = {}
        for dense in self._dense:
            for place in dense.places:
                parameter = _now(place, dense.plain, tree, holders)
                refs = holders[id(parameter)]
                of = owner.get(id(parameter), dense)
                each = found.setdefault(id(parameter), _Return(of, parameter, place.name, refs))
                if each.dense is not of:
                    got = f"one parameter for {each.name!r} and {place.name!r}"
                    remedy = "Tie weights before they are masked: tied ones share a mask."
                    refuse(RuntimeError, "dense_weights", "a mask for each", got, remedy)
        return list(found.values())

    def _put_back(self, returns: Iterable[_Return]) -> None:
        saved = {
            (id(place.ref.module), place.ref.name): place
            for dense in self._dense
            for place in dense.places
        }
        given: set[int] = set()
        own = set(self._modules.values())
        others = [ref for each in returns for ref in each.refs if ref.module not in own]
        with AllOrNothing(others, written=[]):
            for each in returns:
                self._put_one_back(each, saved, given)

    def _put_one_back(
        self, each: _Return, saved: Mapping[tuple[int, str], _Place], given: set[int]
    ) -> None:
        mask, target = each.dense.mask.to(each.parameter), each.target
        if id(mask) in given:  # by a parameter that was tied and is not any more
            mask = mask.clone()
        given.add(id(mask))
        self._undo.append(partial(target.requires_grad_, target.requires_grad))
        target.requires_grad_(each.parameter.requires_grad)
        self._undo.append(partial(set_data, target, target.detach().clone()))
        set_data(target, self._value(each, mask))
        self._undo.append(partial(setattr, target, "grad", target.grad))
        if each.parameter.grad is not None:
            grad = masked_gradient(each.parameter.grad, mask)
            before = None if target is each.parameter else target.grad
            target.grad = grad if before is None else before + grad
        for ref in each.refs:
            _mask_again(ref, target, mask, saved.get((id(ref.module), ref.name)))
        move_freeze(each.dense.places[0].ref, each.refs[0])

    def _value(self, each: _Return, mask: Tensor) -> Tensor:
        """Alive entries as they are now; masked ones as they were, but for what is to be kept."""
        taken = mask != 0
        if self._masked_writes == "keep":
            taken |= each.written
        value = each.parameter.detach()
        return torch.where(taken, value, each.dense.original.to(value))


def _registries(module: nn.Module) -> tuple[dict[Any, Any], dict[Any, Any], dict[Any, Any]]:
    return module._parameters, module._buffers, module._forward_pre_hooks


def _holders(modules: Iterable[nn.Module]) -> dict[int, list[ParameterRef]]:
    """By the id of each parameter: the modules that hold it."""
    found: dict[int, list[ParameterRef]] = {}
    for module in dict.fromkeys(modules):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append(ParameterRef(module, name))
    return found


def _is_of_a_program(module: nn.Module) -> bool:
    """Whether a module is a record of a traced or exported model, which stays dense as copies do, or a part of one."""
    return isinstance(module, GraphModule) or type(module) is nn.Module


def _now(
    place: _Place,
    plain: nn.Parameter,
    tree: Mapping[str, nn.Module],
    holders: Mapping[int, list[ParameterRef]],
) -> nn.Parameter:
    """The parameter that is at a place now: in the same module, in one of its name, or elsewhere."""
    own = place.ref.module
    module = own if any(own is each for each in tree.values()) else tree.get(place.path)
    parameter = None if module is None else module._parameters.get(place.ref.name)
    if parameter is not None:
        return parameter
    if any(ref.module is not own for ref in holders.get(id(plain), ())):
        return plain
    remedy = "Work on a copy (copy.deepcopy inside the block), or call remove_all(model) before."
    expected, got = "a parameter there on leaving", "none"
    refuse(RuntimeError, f"dense_weights: {place.name!r}", expected, got, remedy)


def _check_return(each: _Return) -> None:
    subject = f"dense_weights: {each.name!r}"
    if each.parameter.is_meta and not each.dense.mask.is_meta:
        remedy = "Work on a copy (copy.deepcopy inside the block)."
        refuse(RuntimeError, subject, "values on leaving", "a parameter on the meta device", remedy)
    if each.parameter.shape != each.dense.mask.shape:
        got = f"shape {tuple(each.parameter.shape)}"
        expected = f"shape {tuple(each.dense.mask.shape)} as before"
        remedy = "Change shapes after remove_all(model), or with compact()."
        refuse(RuntimeError, subject, expected, got, remedy)
    for ref in each.refs:
        masked = ref.is_masked or ref.name.endswith(ORIG)
        if masked or isinstance(ref.module, ParametrizationList):
            got = "one that was masked or parametrized inside"
            remedy = "Mask and parametrize outside of the `with` block."
            refuse(RuntimeError, subject, "a plain parameter on leaving", got, remedy)


def _mask_again(
    ref: ParameterRef, parameter: nn.Parameter, mask: Tensor, place: _Place | None
) -> None:
    module = ref.module
    if not ref.is_masked:  # else by a copy by copy.copy(), which has the same dicts
        # Through setattr, which is seen by those who ask for other modules that share it.
        setattr(module, ref.name, parameter)
    reparametrize(ref, mask)
    if place is None:
        set_hook(ref)
    else:
        if place.hook is not None:
            module._forward_pre_hooks[place.hook[0]] = place.hook[1]
        for registry, order in zip(_registries(module), place.orders, strict=True):
            reorder(registry, order)
        if not place.live:
            make_plain(module, ref.name)
    hook = find_hook(ref)
    if hook is not None:
        hook[1](module, ())  # renews what it has stored

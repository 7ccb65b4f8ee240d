"""Make ``module.weight`` the present product of ``weight_orig`` and ``weight_mask``, whoever reads it.

A stored product goes stale wherever code reads it without a forward pass of its module
(``nn.MultiheadAttention`` reads ``out_proj.weight``), and it is no leaf, so that modules cannot be
copied. So a masked module's class becomes a subclass of itself, of the same name, in which the masked
names are properties. :mod:`torch.nn.utils.parametrize` works in the same way.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import sys
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from torch_rsst.masking.mask_values import warn_if_averaged
from torch_rsst.masking.masked_product import masked
from torch_rsst.masking.weight_writes import (
    assigned,
    check_reader,
    check_tracer,
    deleted,
    parametrizing,
    quantization,
    refuse_write,
    registering,
)
from torch_rsst.utils.errors import refuse

ORIG, MASK = "_orig", "_mask"
# All modules that have live names, or had.
LIVE_MODULES: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# Layers whose forward branches on its input. torch.fx calls them as they are, by the module that an instance names.
_BRANCHING = (_NormBase, nn.RNNBase, nn.MultiheadAttention)
PICKLE_FORMAT = 1  # of pickled modules and hooks: what a pickle names and with what arguments


def product(module: nn.Module, name: str) -> Tensor:
    """``weight_orig`` with masked entries replaced by 0, so that no inf or NaN leaks out.

    The plain parameter where nothing is masked.

    Raises:
        AttributeError: where there is neither.
    """
    # Attributes, and operations that begin with them: so tracers record both, not their values.
    original = getattr(module, name + ORIG, None)
    mask = getattr(module, name + MASK, None)
    if original is not None and mask is not None:
        if type(original) is Proxy:
            check_tracer(module, original)
        if type(mask) is Tensor and not torch.compiler.is_compiling():
            warn_if_averaged(mask, f"'{name}' of {type(module).__name__}")
        made = masked(original, mask, sparse=getattr(module, "sparse", False) is True)
        # torch.jit names operations by local variables that it meets: by the same ones in each mode.
        if not torch.compiler.is_compiling() and not torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
            _hold(module, name, made)
        return made
    plain = module._parameters.get(name)
    if plain is None:
        raise AttributeError(f"'{type(module).__name__}' object has no attribute '{name}'")
    return plain


# The last product of each masked weight in training, which the next one replaces. Nothing reads it: were all
# products freed after a backward pass, C libraries would return the memory, and each step would ask for it again.
_held: weakref.WeakKeyDictionary[nn.Module, dict[str, Tensor]] = weakref.WeakKeyDictionary()


def _hold(module: nn.Module, name: str, made: Tensor) -> None:
    if type(made) is Tensor and made.device.type == "cpu" and made.requires_grad:
        if not torch._C._are_functorch_transforms_active():
            _held.setdefault(module, {})[name] = made.detach()
    elif module in _held:
        del _held[module]


def is_live(module: nn.Module, name: str) -> bool:
    """Whether :func:`make_live` has made ``name`` a property."""
    return name in _base_and_names(_own_class(module))[1] and name not in module.__dict__


def make_live(module: nn.Module, name: str) -> None:
    """Turn ``name`` into a property of this module; a stored tensor of that name goes."""
    base, names = _base_and_names(_own_class(module))
    _set_own_class(module, _live_class(base, names | {name}))
    module.__dict__.pop(name, None)
    if issubclass(base, _BRANCHING):
        module.__dict__["__module__"] = base.__module__
    LIVE_MODULES.add(module)


def make_plain(module: nn.Module, name: str) -> None:
    """Undo :func:`make_live`; the last name brings the original class back."""
    base, names = _base_and_names(_own_class(module))
    _held.pop(module, None)
    if name in names:
        rest = names - {name}
        if not rest:
            module.__dict__.pop("__module__", None)
        _set_own_class(module, _live_class(base, rest) if rest else base)


def _own_class(module: nn.Module) -> type[nn.Module]:
    """The class below the one that parametrize has put on top, which must stay on top."""
    cls = type(module)
    return cls.__bases__[0] if _has_parametrized_class(module) else cls


def _set_own_class(module: nn.Module, cls: type[nn.Module]) -> None:
    if not _has_parametrized_class(module):
        module.__class__ = cls
        return
    # Made anew: copies of a parametrized module share their class.
    top = type(module)
    body = {k: v for k, v in vars(top).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = _subclass(cls, top.__name__, body)


def _has_parametrized_class(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module) and "_live" not in vars(type(module))


def _base_and_names(cls: type[nn.Module]) -> tuple[type[nn.Module], frozenset[str]]:
    # Looked up in the class itself: what subclasses a live class (a sharding wrapper) is no live one.
    found: tuple[type[nn.Module], frozenset[str]] = vars(cls).get("_live", (cls, frozenset()))
    return found


def _live_class(base: type[nn.Module], names: frozenset[str]) -> type[nn.Module]:
    """The subclass of ``base`` in which ``names`` are live, made once while any module is of it."""
    for known in type.__subclasses__(base):
        if vars(known).get("_live") == (base, names):
            return known
    body = {
        # Its own module: torch.compile takes what stands in torch.nn as known and looks no further.
        "__module__": __name__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        "_live": (base, names),
        "register_parameter": registering(base, names),
        "qconfig": quantization,
        "parametrizations": parametrizing(names),
        **{method: _reset(method) for method in _RESETS if hasattr(base, method)},
        **{name: _property(name) for name in names},
    }
    if base.forward in _LOOKUPS and "weight" in names:
        body["forward"] = _renormalizing(base.forward)
    return _subclass(base, base.__name__, body)


def _subclass(base: type[nn.Module], name: str, body: dict[str, Any]) -> type[nn.Module]:
    """A subclass that a user's ``__init_subclass__`` hears nothing of: such register classes, or ask for arguments.

    Classes with a metaclass, or with slots, are subclassed as usual.
    """
    if type(base) is type and hasattr(base.__init_subclass__, "__func__"):
        made = type(name, (nn.Module,), body)
        with contextlib.suppress(TypeError):  # of another layout
            made.__bases__ = (base,)
            return made
    return type(name, (base,), body)


def _reduce(module: nn.Module, protocol: Any) -> Any:
    """Copy and pickle by the base class and the names: the class itself is made at run time."""
    base, names = _base_and_names(type(module))
    with torch.no_grad():  # recurrent layers renew their list of weights: no graph may hold a mask
        reduced: Any = base.__reduce_ex__(module, max(int(protocol), 2))
    make, args, *rest = reduced
    if make is copyreg.__newobj__:  # type: ignore[attr-defined] # typeshed leaves it out
        make, args = _rebuild_masked_module, (PICKLE_FORMAT, base, sorted(names), *args[1:])
    if rest and isinstance(module, nn.RNNBase):
        # Its list of weights holds products, which are no leaves; the next forward renews them.
        listed: list[Any] = module._flat_weights
        rest[0] = {**rest[0], "_flat_weights": [w if w.is_leaf else w.detach() for w in listed]}
    return (make, args, *rest)


def _rebuild_masked_module(
    version: int, base: type[nn.Module], names: Iterable[str], *args: Any
) -> nn.Module:
    """What a pickle calls, by the path ``torch_rsst._rebuild_masked_module``, for a masked module."""
    check_pickle(version)
    cls = _live_class(base, frozenset(names))
    made = cls.__new__(cls, *args)
    LIVE_MODULES.add(made)
    return made


def check_pickle(version: int) -> None:
    """Raise a ValueError for a pickle of a later version of the library."""
    if version > PICKLE_FORMAT:
        remedy = "Load it with the version of torch_rsst that wrote it, or a later one."
        expected, got = f"format {PICKLE_FORMAT} or earlier", f"format {version}"
        refuse(ValueError, "pickle of a masked model", expected, got, remedy)


# A pickle refers to it by this path, which stays when modules move.
_rebuild_masked_module.__module__ = "torch_rsst"


def _property(name: str) -> property:
    def read(module: nn.Module) -> Tensor:
        if not torch.compiler.is_compiling():
            check_reader(module, name, sys._getframe(1))
        return product(module, name)

    return property(read, assigned(name), deleted(name))


_LOOKUPS = (nn.Embedding.forward, nn.EmbeddingBag.forward)


def _renormalizing(lookup: Any) -> Any:
    """The lookup of a table that first shortens, by ``max_norm``, the rows that it reads: those of its weight."""

    @functools.wraps(lookup)
    def forward(module: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        mask = module._buffers.get("weight" + MASK)
        if module.max_norm is not None and mask is not None and isinstance(input, Tensor):
            with torch.no_grad():
                original = getattr(module, "weight" + ORIG)
                table = masked(original, mask)
                rows = input.contiguous()
                torch.embedding_renorm_(table, rows, module.max_norm, module.norm_type)
                original.copy_(torch.where(mask != 0, table, original))
        return lookup(module, input, *args, **kwargs)

    return forward


def loses_renormalization(module: nn.Module) -> bool:
    """Whether ``max_norm`` of a table would act on a product that is thrown away, in code of its own."""
    if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or module.max_norm is None:
        return False
    return "forward" in vars(module) or type(module).forward not in _LOOKUPS


# What draws the values of parameters anew, in place.
_RESETS = ("reset_parameters", "_reset_parameters")


def _reset(method: str) -> Any:
    """The method of the base class, which finds the originals under their dense names."""

    def reset(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        live, registry = _own_class(module), module._parameters
        base, names = _base_and_names(live)
        held = {name + ORIG: name for name in names if name + ORIG in registry}
        dense = {held.get(key, key): parameter for key, parameter in registry.items()}
        module.__dict__["_parameters"] = now = dict(dense)
        _set_own_class(module, base)
        try:
            getattr(module, method)(*args, **kwargs)
        finally:
            _set_own_class(module, live)
            module.__dict__["_parameters"] = registry
        for name in held.values():
            if now.get(name) is not dense[name]:
                refuse_write(module, name, f"another parameter from {method}()")

    return reset

"""Code that writes to a masked ``weight`` is told where to write: what it writes there would be lost.

What PyTorch's own pruning hooks store and delete is ignored: ``weight`` is computed when it is read.
Writes in place to the computed tensor cannot be seen.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from torch_rsst.utils.errors import refuse

# Where hooks store their products from.
_HOOKS = ("torch.nn.utils.prune", "torch_rsst.masking.masked_parameter")
# Functions that take the weight they read for a parameter, and where they stand: the first assigns it to
# another module, which PyTorch refuses without naming the cause; the others add to it, which is lost.
_WRITERS = {
    "convert_sync_batchnorm": "",
    "merge": "peft.",
    "unmerge": "peft.",
    "_tie_or_clone_weights": "transformers.",
}
# Functions that read a weight to put one of other size in its place.
_RESIZERS = ("_get_resized_embeddings", "_get_resized_lm_head")


def refuse_write(module: nn.Module, name: str, got: str) -> NoReturn:
    """Raise a RuntimeError that says where to write instead."""
    refuse(
        RuntimeError,
        f"{name!r} of {type(module).__name__}",
        f"no change of what is computed from '{name}_orig' and '{name}_mask'",
        got,
        f"Do it within `with torch_rsst.dense_weights(model):`, or after "
        f"torch_rsst.remove_all(model); values can be written to '{name}_orig'.",
    )


def check_reader(module: nn.Module, name: str, reader: FrameType) -> None:
    """Refuse to give the weight to a function that is known to lose what it writes there."""
    function = reader.f_code.co_name
    package = _WRITERS.get(function)
    if package is not None and _is_in(reader, package):
        refuse_write(module, name, f"{function}(), which needs a parameter")
    if function == "get_parameter" and _ties(reader):
        refuse_write(module, name, "tie_weights(), which needs a parameter")
    if function == "apply" and _is_in(reader, "torch.nn.utils.weight_norm"):
        _refuse_parametrization(module, name, name)
    if function in _RESIZERS and _is_in(reader, "transformers."):
        _check_size(module, name, reader.f_locals)


def _is_in(frame: FrameType, package: str) -> bool:
    return str(frame.f_globals.get("__name__")).startswith(package)


def _ties(reader: FrameType) -> bool:
    """Whether ``get_parameter`` is called by ``tie_weights`` of transformers, which reads by it."""
    frame = reader.f_back
    if frame is not None and frame.f_code.co_name == "get_parameter_or_buffer":
        frame = frame.f_back
    is_known = frame is not None and frame.f_code.co_name == "tie_weights"
    return is_known and frame is not None and _is_in(frame, "transformers.")


def _check_size(module: nn.Module, name: str, asked: Mapping[str, Any]) -> None:
    """Refuse to resize a masked table, or a head: the mask would be lost, or have another size."""
    before = module._parameters[name + "_orig"]
    after, dim = asked.get("new_num_tokens"), 1 if asked.get("transposed") else 0
    if before is None or after is None or after == before.shape[dim]:
        return
    refuse(
        RuntimeError,
        f"{name!r} of {type(module).__name__}",
        f"{before.shape[dim]} tokens, as its mask has",
        f"a resize to {after}",
        "Resize after torch_rsst.remove_all(model), and mask it anew: torch_rsst.extract_mask(model), called before, "
        "gives the masks, to which rows are to be added.",
    )


def assigned(name: str) -> Any:
    """The setter of a live name."""

    def write(module: nn.Module, value: object) -> None:
        if not _by_a_hook():
            kind = "a tensor" if isinstance(value, Tensor) else type(value).__name__
            refuse_write(module, name, f"an assignment of {kind}")

    return write


def deleted(name: str) -> Any:
    """The deleter of a live name."""

    def delete(module: nn.Module) -> None:
        if not _by_a_hook():
            refuse_write(module, name, "del")

    return delete


def _by_a_hook() -> bool:
    """Whether a pruning hook writes, through modules' ``__setattr__`` and ``__delattr__``."""
    if torch.compiler.is_compiling():
        return True  # forward passes of stock hooks; frames cannot be traced
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name in ("__setattr__", "__delattr__"):
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__") in _HOOKS


def registering(base: type[nn.Module], names: frozenset[str]) -> Any:
    """``register_parameter``, through which parameters are assigned, for a live class."""

    def register_parameter(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if name in names and name + "_orig" in module._parameters:
            refuse_write(module, name, "an assignment of a parameter")
        base.register_parameter(module, name, param)

    return register_parameter


def parametrizing(names: frozenset[str]) -> property:
    """``parametrizations``, by which ``register_parametrization`` asks what there is already, and ``fuse_modules`` for types."""

    def parametrizations(module: nn.Module) -> nn.Module:
        if not torch.compiler.is_compiling():
            caller = sys._getframe(1).f_back
            if caller is not None and caller.f_code.co_name == "register_parametrization":
                _check_parametrized(module, names, caller.f_locals.get("tensor_name"))
            if _fuses(caller):
                refuse_write(module, min(names), "fuse_modules(), which needs a plain module")
        found = module._modules.get("parametrizations")
        if found is None:
            kind = type(module).__name__
            raise AttributeError(f"'{kind}' object has no attribute 'parametrizations'")
        return found

    return property(parametrizations)


def _fuses(caller: FrameType | None) -> bool:
    """Whether ``fuse_modules`` of PyTorch asks for the type of a module, by which it finds how to fuse."""
    if caller is None or caller.f_code.co_name != "type_before_parametrizations":
        return False
    frame = caller.f_back
    while frame is not None and frame.f_code.co_name == "<genexpr>":
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "fuse_known_modules"


def _check_parametrized(module: nn.Module, names: frozenset[str], tensor: object) -> None:
    for name in names:
        if (
            tensor in (name, name + "_orig", name + "_mask")
            and name + "_orig" in module._parameters
        ):
            _refuse_parametrization(module, name, tensor)


def _refuse_parametrization(module: nn.Module, name: str, tensor: object) -> NoReturn:
    refuse(
        RuntimeError,
        f"{tensor!r} of {type(module).__name__}",
        "a plain parameter to parametrize",
        "a part of a masked one",
        "Parametrize it first, then mask what the parametrization computes from, such as "
        f"'parametrizations.{name}.original'; or call torch_rsst.remove_all(model) before.",
    )


def _quantized(module: nn.Module, value: object = None) -> NoReturn:
    refuse(
        RuntimeError,
        f"{type(module).__name__} with masks",
        "a plain module to quantize",
        "a masked one, which PyTorch would leave as it is",
        "Call torch_rsst.remove_all(model, freeze_zeros=True) first: then quantize, or prepare "
        "for quantization and train.",
    )


def _qconfig(module: nn.Module) -> object:
    if module.__dict__.get("qconfig") is not None:
        _quantized(module)
    raise AttributeError(f"'{type(module).__name__}' object has no attribute 'qconfig'")


def check_tracer(module: nn.Module, traced: Proxy) -> None:
    """Refuse to be traced by ``prepare_fx``: what is masked would fail to be converted, and not say why."""
    if type(traced.tracer).__module__.startswith("torch.ao.quantization"):
        _quantized(module)


# Eager quantization sets `qconfig` of every module, then goes by exact types.
quantization = property(_qconfig, _quantized)

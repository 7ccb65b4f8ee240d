"""Dense names of parameters: what they are called before masks and wrappers are put around them."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from torch_rsst.distributed.fsdp import reshard
from torch_rsst.masking.live_weight import ORIG
from torch_rsst.masking.parameter_ref import ParameterRef, dense_name, masked_refs
from torch_rsst.masking.tied import check_memory, check_shared
from torch_rsst.utils.errors import check_type

# What DataParallel and DistributedDataParallel, torch.compile and FSDP put around a module.
OUTER_PREFIX = "module."
_INNER_PREFIXES = ("_orig_mod.", "_fsdp_wrapped_module.")


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel and ``torch.compile`` wrappers.

    Raises:
        TypeError: unless given a module.
    """
    check_type(model, nn.Module, "model", "a module", "Pass the torch.nn.Module to prune.")
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:  # scripted modules have no other look-up
            model = cast(nn.Module, model._modules["_orig_mod"])
        else:
            return model


def without_wrappers(name: str) -> str:
    """A dotted name without the prefixes of wrappers inside the model.

    >>> without_wrappers("blocks.0._orig_mod.mlp"), without_wrappers("mlp._orig_mod")
    ('blocks.0.mlp', 'mlp')
    """
    for prefix in _INNER_PREFIXES:
        name = name.replace(prefix, "").removesuffix(f".{prefix[:-1]}")
    return name


def named_refs(model: nn.Module) -> dict[str, list[ParameterRef]]:
    """Dense name → every place that holds the parameter, in ``named_parameters`` order.

    Tied parameters appear once, under their first name, with all their refs.

    Raises:
        ValueError: where some modules that share a parameter have another mask for it, or none, or two parameters lie in
            one memory.
    """
    refs = places_of(model)
    check_shared(refs)
    return refs


def places_of(model: nn.Module) -> dict[str, list[ParameterRef]]:
    """As :func:`named_refs`, also where modules that share a parameter have different masks."""
    reshard(unwrap(model).modules())
    first_names: dict[int, str] = {}
    refs: dict[str, list[ParameterRef]] = {}
    for full, ref in _every_place(model):
        name = first_names.setdefault(id(ref.original), full)
        refs.setdefault(name, []).append(ref)
    check_memory(refs)
    return refs


def _every_place(
    model: nn.Module, *, under_all_names: bool = False
) -> Iterator[tuple[str, ParameterRef]]:
    for path, module in unwrap(model).named_modules(remove_duplicate=not under_all_names):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                own = dense_name(module, key)
                yield without_wrappers(f"{path}.{own}" if path else own), ParameterRef(module, own)


class BufferPlace(NamedTuple):
    """A buffer and where it is."""

    module: nn.Module
    key: str
    buffer: Tensor


def named_buffers(model: nn.Module) -> dict[str, BufferPlace]:
    """Dense name → the place of every buffer that is no mask; a shared one under each name."""
    model = unwrap(model)
    masks = {id(ref.mask) for ref in masked_refs(model.modules())}
    return {
        without_wrappers(f"{path}.{key}" if path else key): BufferPlace(module, key, buffer)
        for path, module in model.named_modules()
        for key, buffer in module._buffers.items()
        if buffer is not None and id(buffer) not in masks
    }


def first_names(model: nn.Module) -> dict[str, str]:
    """Every dense name of every parameter → its first one; tied parameters have several."""
    first: dict[int, str] = {}
    places = _every_place(model, under_all_names=True)  # modules may be registered twice
    return {full: first.setdefault(id(ref.original), full) for full, ref in places}


def all_places(*models: nn.Module) -> list[ParameterRef]:
    """Every place of a parameter; raises as :func:`named_refs` does."""
    return [ref for model in models for places in named_refs(model).values() for ref in places]


def masked_places(model: nn.Module) -> list[ParameterRef]:
    """Every place of a masked parameter; raises as :func:`named_refs` does."""
    return [ref for ref in all_places(model) if ref.is_masked]


def masked_names(model: nn.Module) -> set[str]:
    """The dense names of all masked parameters; reads no values."""
    return {name for name, places in named_refs(model).items() if places[0].is_masked}


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Dense name → trainable tensor, ``weight_orig`` where masked; detached, sharing memory."""
    return {name: places[0].original.detach() for name, places in named_refs(model).items()}


def found_among(name: str, names: Container[str]) -> str | None:
    """What a model calls a parameter that may have more or fewer prefixes of wrappers; None where it has none such."""
    inner = without_wrappers(name)
    forms = (name, inner, inner.removeprefix(OUTER_PREFIX), OUTER_PREFIX + inner)
    return next((form for form in forms if form in names), None)


def dense_keys(state: Mapping[str, Any], names: Container[str] = ()) -> dict[str, str]:
    """Each key of a state dict without the prefixes of wrappers, where all keys have them.

    Args:
        state: the state dict.
        names: of a model. With them, all keys keep their first ``module.``, lose it or get it, as most names have it:
            a model may have a child of that name.

    >>> dense_keys({"module.fc.weight": 0, "module.fc.bias": 0})["module.fc.bias"]
    'fc.bias'
    >>> dense_keys({"module.fc.weight": 0}, names=["module.fc.weight"])["module.fc.weight"]
    'module.fc.weight'
    """
    inner = {key: without_wrappers(key) for key in state}
    forms = [inner, {key: OUTER_PREFIX + name for key, name in inner.items()}]
    if all(name.startswith(OUTER_PREFIX) for name in inner.values()):
        forms.insert(0, {key: name.removeprefix(OUTER_PREFIX) for key, name in inner.items()})
    return max(forms, key=lambda form: sum(n.removesuffix(ORIG) in names for n in form.values()))

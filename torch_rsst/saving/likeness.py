"""Whether a model that was built is like another one in all but the values of its tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import Tensor, nn

from torch_rsst.masking.names import unwrap, without_wrappers
from torch_rsst.utils.errors import listing, refuse

Settings = dict[str, dict[str, float]]
"""Name of a module → its attributes and their values."""

# What does not decide what a model computes.
_INCIDENTAL = frozenset({"training", "name_or_path", "generation_config", "compact_info"})
_OF_CONFIGURATIONS = frozenset(
    {"transformers_version", "architectures", "_name_or_path", "dtype", "use_pretrained_backbone"}
)


def compare(model: nn.Module, built: nn.Module) -> tuple[Settings, str]:
    """Compare classes, attributes of modules, and shapes, dtypes and ties of tensors.

    Args:
        model: the model.
        built: of the same class, as a rule. Values of tensors, modes and what begins with an underscore
            may differ.

    Returns:
        floats that were set on ``model`` after it was built (rates of dropout, say), for :func:`set_all`;
        and the first other thing that differs, "" where nothing does.
    """
    mine, theirs = _modules(model), _modules(built)
    if odd := mine.keys() ^ theirs.keys():
        return {}, f"modules {listing(sorted(odd))}"
    settings: Settings = {}
    others: list[str] = []
    for path, module in mine.items():
        kinds = [type(each[path]).__name__ for each in (theirs, mine)]
        if type(module) is not type(theirs[path]):
            others.append(f"the class ({kinds[0]}, not {kinds[1]}) of {path or 'the model'}")
            continue
        wanted, got = dict(_facts(module)), dict(_facts(theirs[path]))
        for key in sorted(wanted.keys() | got.keys()):
            new, old = wanted.get(key, "none"), got.get(key, "none")
            if type(new) is type(old) is float and math.isfinite(new) and new != old:
                settings.setdefault(path, {})[key] = new
            elif str(new) != str(old):
                shown = f"{str(old)[:60]}, not {str(new)[:60]}"
                others.append(f"{key!r} ({shown}) of {path or 'the model'}")
    if _ties(mine) != _ties(theirs):
        others.append("which parameters are tied")
    return settings, next(iter(others), "")


def differing_counts(saved: Iterable[str], built: Iterable[str]) -> str:
    """Where one of two models has more layers of a kind, told from the names of their tensors; "" nowhere.

    >>> differing_counts(["blocks.0.weight"], ["blocks.0.weight", "blocks.1.weight", "head.weight"])
    'blocks: 1 module saved, 2 built'
    """
    counts: list[dict[str, set[str]]] = [{}, {}]
    for indices, names in zip(counts, (saved, built), strict=True):
        for parts in (name.split(".") for name in names):
            for i, part in enumerate(parts):
                if part.isdecimal():
                    indices.setdefault(".".join(parts[:i]), set()).add(part)
    own, other = counts
    for path in sorted(own.keys() & other.keys(), key=len):
        if (one := len(own[path])) != (two := len(other[path])):
            return f"{path}: {one} module{'s' if one > 1 else ''} saved, {two} built"
    return ""


def set_all(model: nn.Module, settings: Settings) -> None:
    """Set floats that modules have as attributes.

    Raises:
        ValueError: for a module or an attribute that is not there.
    """
    modules = _modules(model)
    for path, numbers in settings.items():
        held = vars(modules[path]) if path in modules else {}
        for key, value in numbers.items():
            if key.startswith("_") or type(held.get(key)) is not float:
                got, remedy = f"{path}.{key} = {value!r}", "The description is damaged."
                refuse(ValueError, "settings", "numbers that the model has", got, remedy)
            held[key] = value


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    # Of a wrapper and what is inside, which share a name, the latter counts: it comes last.
    named = unwrap(model).named_modules(remove_duplicate=False)
    return {without_wrappers(path): module for path, module in named}


def _facts(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name → value, of what can be compared: floats as they are, all else as text."""
    for key, value in vars(module).items():
        if key.startswith("_") or key in _INCIDENTAL or isinstance(value, (nn.Module, Tensor)):
            continue
        if callable(getattr(value, "to_dict", None)):  # a configuration of transformers
            yield f"{key}.attn_implementation", str(getattr(value, "_attn_implementation", None))
            yield from _entries(key, value.to_dict())
        elif (fact := _fact(value)) is not None:
            yield key, fact
    for key, tensor in chain(module._parameters.items(), module._buffers.items()):
        if tensor is not None and key not in module._non_persistent_buffers_set:
            yield key, f"shape {tuple(tensor.shape)}, {tensor.dtype}"


def _entries(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(value, Mapping):
        yield prefix, repr(value)
        return
    for key, inner in value.items():
        if key not in _OF_CONFIGURATIONS:
            yield from _entries(f"{prefix}.{key}", inner)


def _fact(value: Any) -> Any:
    if isinstance(value, (bool, int, float, str)):
        return value if type(value) is float else repr(value)
    if isinstance(value, (tuple, list)):
        parts = [_fact(part) for part in value]
        return None if None in parts else str(parts)
    if isinstance(value, (FunctionType, BuiltinFunctionType)):
        return f"{value.__module__}.{value.__qualname__}"
    return None


def _ties(modules: Mapping[str, nn.Module]) -> set[tuple[str, ...]]:
    places: dict[int, list[str]] = {}
    for path, module in modules.items():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append(f"{path}.{key}")
    return {tuple(sorted(names)) for names in places.values()}

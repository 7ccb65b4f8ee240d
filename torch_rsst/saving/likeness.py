"""Whether two models are built alike: the same but for the values of their tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import Tensor, nn

from torch_rsst.masking.mask_sets import unwrap, without_wrappers
from torch_rsst.utils.errors import listing, refuse

Settings = dict[str, dict[str, float]]
"""Name of a module → what it notes."""

_INCIDENTAL = frozenset({"training", "name_or_path"})
_OF_CONFIGURATIONS = frozenset({"transformers_version", "architectures", "_name_or_path", "dtype"})


def difference(one: nn.Module, other: nn.Module) -> str:
    """The first thing in which two models differ, "" where they are alike.

    Compared are classes, what modules note (numbers, text, functions), shapes, types and ties of
    tensors. Values of tensors and modes are not, nor is what modules hide behind an underscore.
    """
    mine, theirs = (_modules(model) for model in (one, other))
    if odd := mine.keys() ^ theirs.keys():
        return f"modules {listing(sorted(odd))}"
    for path, module in mine.items():
        if text := _between(module, theirs[path]):
            return f"{text} of {path or 'the model'}"
    if _ties(mine) != _ties(theirs):
        return "which parameters are tied"
    return ""


def settings_of(model: nn.Module, built: nn.Module) -> Settings:
    """The numbers that were set after a model was built: rates of dropout, say.

    Args:
        model: the model.
        built: built in the same way, untouched.

    Returns:
        what to :func:`set_all` on ``built``: fractional numbers only, for others decide about shapes.
    """
    found: Settings = {}
    mine, theirs = (_modules(m) for m in (model, built))
    for path in mine.keys() & theirs.keys():
        have = vars(theirs[path])
        for key, value in vars(mine[path]).items():
            both = type(value) is float and type(have.get(key)) is float
            if both and not key.startswith("_") and value != have[key] and math.isfinite(value):
                found.setdefault(path, {})[key] = value
    return found


def set_all(model: nn.Module, settings: Settings) -> None:
    """Set numbers that modules note.

    Raises:
        ValueError: for a module or a number that is not there; nothing is set.
    """
    modules = _modules(model)
    for path, numbers in settings.items():
        held = vars(modules[path]) if path in modules else {}
        for key, value in numbers.items():
            if key.startswith("_") or type(value) is not float or type(held.get(key)) is not float:
                got, remedy = f"{path}.{key} = {value!r}", "The description is damaged."
                expected = "numbers that the model has"
                refuse(ValueError, "settings", expected, got, remedy)
    for path, numbers in settings.items():
        vars(modules[path]).update(numbers)


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    # Of a wrapper and what is inside, which share a name, the latter counts: it comes last.
    named = unwrap(model).named_modules(remove_duplicate=False)
    return {without_wrappers(path): module for path, module in named}


def _between(one: nn.Module, other: nn.Module) -> str:
    if type(one) is not type(other):
        return f"the class ({type(other).__name__}, not {type(one).__name__})"
    mine, theirs = (_facts(module) for module in (one, other))
    for key in sorted(mine.keys() | theirs.keys()):
        if mine.get(key, _ABSENT) != theirs.get(key, _ABSENT):
            shown = [str(facts.get(key, _ABSENT))[:60] for facts in (mine, theirs)]
            return f"{key!r} ({shown[1]}, not {shown[0]})"
    return ""


_ABSENT = "none"


def _facts(module: nn.Module) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for key, value in vars(module).items():
        fact = _fact(value)
        if not key.startswith("_") and key not in _INCIDENTAL and fact is not None:
            facts[key] = fact
    for tensors in (module._parameters, module._buffers):
        for key, tensor in tensors.items():
            if tensor is not None and key not in module._non_persistent_buffers_set:
                facts[key] = f"shape {tuple(tensor.shape)}, {tensor.dtype}"
    return facts


def _fact(value: Any) -> Any:
    """What can be compared of a value, None where nothing can."""
    if isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        parts = tuple(map(_fact, value))
        return None if None in parts else parts
    if isinstance(value, (FunctionType, BuiltinFunctionType)):
        return f"{value.__module__}.{value.__qualname__}"
    if callable(getattr(value, "to_dict", None)) and not isinstance(value, (nn.Module, Tensor)):
        data = value.to_dict()
        if isinstance(data, Mapping):
            return {k: v for k, v in data.items() if k not in _OF_CONFIGURATIONS}
    return None


def _ties(modules: Mapping[str, nn.Module]) -> set[tuple[str, ...]]:
    places: dict[int, list[str]] = {}
    for path, module in modules.items():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append(f"{path}.{key}")
    return {tuple(sorted(names)) for names in places.values() if len(names) > 1}

"""What is written beside the weights of a compacted model, and a model made of it again."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from torch_rsst._version import __version__
from torch_rsst.compaction.compaction import replay
from torch_rsst.compaction.cut_record import Stage, remember
from torch_rsst.distributed.dtensor import is_sharded
from torch_rsst.masking.checkpoints import prepare_from_state_dict
from torch_rsst.masking.mask_sets import without_wrappers
from torch_rsst.saving.builders import Build
from torch_rsst.saving.likeness import Settings, set_all
from torch_rsst.saving.receipt import UNNAMED
from torch_rsst.utils.errors import MissingNameError, listing, message, refuse

FORMAT, VERSION = "torch_rsst.compact", 1

_BUILT = "_compaction_build"


@dataclass(frozen=True)
class Description:
    """All of a compacted model but its tensors; plain values, as in ``compact.json``.

    Attributes:
        model_class: the name of its class, for people.
        build: how to build the dense model; None where only the user knows.
        stages: what was cut, see :mod:`torch_rsst.compaction.cut_record`.
        training: its mode.
        tied: names in the state dict whose tensor stands in the file under another name, and that one.
        settings: numbers that modules note, where they were set after the model was built.
        frozen: parameters that require no gradient.
        channels_last: tensors that are stored so in memory, which decides how convolutions round.
        receipt: see :func:`torch_rsst.saving.receipt.measure`.
        files: the SHA-256 of each file.
        versions: of the packages that wrote it.
    """

    model_class: str
    build: Build | None
    stages: list[Stage]
    training: bool
    tied: dict[str, str] = field(default_factory=dict)
    settings: Settings = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    channels_last: list[str] = field(default_factory=list)
    receipt: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """As text, a line per attribute."""
        values = {"format": FORMAT, "version": VERSION}
        values |= {f.name: getattr(self, f.name) for f in fields(self)}
        lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in values.items())
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> Description:
        """Read it back.

        Raises:
            ValueError: for text that is none, or of a later version.
        """
        remedy = "Save the model again with save_compact, or pass another folder."
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            got = f"broken JSON: {error}"
            raise ValueError(
                message(source, expected="a description", got=got, remedy=remedy)
            ) from None
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            got = f"format {data.get('format')!r}" if isinstance(data, Mapping) else "another file"
            expected = f"the format {FORMAT!r}"
            refuse(ValueError, source, expected, got, remedy)
        if data.get("version") != VERSION:
            remedy = "Load it with a newer torch_rsst."
            refuse(ValueError, source, f"version {VERSION}", repr(data.get("version")), remedy)
        data = {**_LATER, **data}
        for name, (kind, inner) in _KINDS.items():
            value = data.get(name)
            items = value.values() if isinstance(value, dict) else value
            fits = isinstance(value, kind) and (
                inner is None or all(isinstance(item, inner) for item in items or ())
            )
            if not fits:
                refuse(ValueError, source, f"{name!r} in it", repr(value)[:80], remedy)
        for name, text in data["files"].items():
            if not re.fullmatch("[0-9a-f]{64}", text):
                expected = f"the SHA-256 of {name!r}, 64 hexadecimal digits"
                got = repr(text)[:80]
                refuse(ValueError, source, expected, got, remedy)
        found = cls(**{name: data[name] for name in _KINDS})
        return replace(found, receipt={"timed": UNNAMED, **found.receipt})


_KINDS: dict[str, tuple[Any, Any]] = {
    "model_class": (str, None),
    "build": ((dict, type(None)), None),
    "stages": (list, dict),
    "training": (bool, None),
    "tied": (dict, str),
    "settings": (dict, dict),
    "frozen": (list, str),
    "channels_last": (list, str),
    "receipt": (dict, None),
    "files": (dict, str),
    "versions": (dict, str),
}


# What a folder means that does not say it.
_LATER: dict[str, Any] = {
    "build": None,
    **{name: {} for name in ("tied", "settings", "receipt", "versions")},
    **{name: [] for name in ("frozen", "channels_last")},
}


@dataclass(frozen=True)
class Tensors:
    """The tensors of a model, copied to the CPU.

    Attributes:
        state: its state dict, each tied tensor once.
        buffers: those that are not in its state dict.
    """

    state: dict[str, Tensor]
    buffers: dict[str, Tensor]


def take_apart(model: nn.Module, stages: list[Stage]) -> tuple[Description, Tensors]:
    """A model as plain data and tensors, without how to build it.

    Raises:
        TypeError: where its state dict holds anything but whole tensors.
    """
    state: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    channels_last = []
    for key, tensor in model.state_dict().items():
        name = without_wrappers(key)
        if not isinstance(tensor, Tensor) or is_sharded(tensor):
            got = "a sharded tensor" if isinstance(tensor, Tensor) else type(tensor).__name__
            remedy = "Save the model with torch.save instead."
            refuse(TypeError, f"save_compact: {key!r}", "a tensor", got, remedy)
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in first:
            tied[name] = first[place]
            continue
        first[place] = name
        state[name] = _copied(tensor)
        if not tensor.is_contiguous() and _is_channels_last(tensor):
            channels_last.append(name)
    named = model.named_parameters(remove_duplicate=False)
    frozen = [without_wrappers(name) for name, p in named if not p.requires_grad]
    buffers = {name: _copied(b) for name, (m, key) in _hidden_buffers(model).items()
               for b in [m._buffers[key]] if b is not None}  # fmt: skip
    description = Description(
        _class_name(model),
        None,
        stages,
        model.training,
        tied,
        frozen=frozen,
        channels_last=channels_last,
        versions=installed(),
    )
    return description, Tensors(state, buffers)


def put_together(model: nn.Module, description: Description, tensors: Tensors) -> nn.Module:
    """Make a dense model the compacted one that was taken apart, in place; returns it.

    Raises:
        KeyError, ValueError: for another model.
    """
    model = replay(model, description.stages)
    state = dict(tensors.state)
    for name, first in description.tied.items():
        if name in tensors.state or first not in tensors.state:
            got, remedy = f"{name!r} = {first!r}", "The description is damaged."
            expected = "names of tied tensors"
            refuse(ValueError, "tied", expected, got, remedy)
        state[name] = tensors.state[first]
    prepare_from_state_dict(model, state)
    own = {without_wrappers(key): key for key in model.state_dict()}
    _check_fits(model, own, state)
    _take_types(model, state, frozenset(description.channels_last))
    model.load_state_dict({own[name]: tensor for name, tensor in state.items()}, strict=True)
    for name, (module, key) in _hidden_buffers(model).items():
        buffer, saved = module._buffers[key], tensors.buffers.get(name)
        # Others are made anew when they are needed, as tables that grow with their input.
        if buffer is not None and saved is not None and saved.shape == buffer.shape:
            module._buffers[key] = saved.to(buffer.device, copy=True)
    set_all(model, description.settings)
    frozen = frozenset(description.frozen)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(without_wrappers(name) not in frozen)
    remember(model, description.stages)
    if description.build is not None:
        vars(model)[_BUILT] = description.build
    model.train(description.training)
    return model  # not what train() returns: some classes forget to


def built_as(model: nn.Module) -> Build | None:
    """How the dense model was built that a loaded model comes from, if its folder said so."""
    build: Build | None = vars(model).get(_BUILT)
    return build


def installed() -> dict[str, str]:
    """The versions of the packages that models come from."""
    names = ("torch", "timm", "torchvision", "transformers")
    loaded = {name: sys.modules[name] for name in names if name in sys.modules}
    versions = {name: str(getattr(module, "__version__", "")) for name, module in loaded.items()}
    return {"torch_rsst": __version__, **versions}


def _check_fits(model: nn.Module, own: Mapping[str, str], state: Mapping[str, Tensor]) -> None:
    remedy = "Build the model with the arguments that the compacted one was built with."
    subject = "tensors"
    if odd := own.keys() ^ state.keys():
        got = f"{listing(sorted(odd))} in one of them only"
        expected = "those of the model"
        refuse(MissingNameError, subject, expected, got, remedy)
    shapes = {name: getattr(model.state_dict()[key], "shape", None) for name, key in own.items()}
    if wrong := next((name for name, shape in shapes.items() if state[name].shape != shape), None):
        expected = f"shape {tuple(shapes[wrong] or ())} for {wrong!r}"
        got = f"{tuple(state[wrong].shape)}"
        refuse(ValueError, subject, expected, got, remedy)


def _take_types(
    model: nn.Module, state: Mapping[str, Tensor], channels_last: frozenset[str]
) -> None:
    """Give parameters and buffers the types and memory formats of the tensors that come."""
    for path, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                name = without_wrappers(f"{path}.{key}" if path else key)
                if tensor is None or name not in state:
                    continue
                new = tensor.detach().to(state[name].dtype)
                if name in channels_last:
                    new = new.contiguous(memory_format=torch.channels_last)
                tensor.data = new  # the object stays, and with it what is tied to it


def _class_name(model: nn.Module) -> str:
    """The class of a model as its own package calls it, not what this library has made of it."""
    own = (cls for cls in type(model).__mro__ if not cls.__module__.startswith("torch_rsst."))
    return next(f"{cls.__module__}.{cls.__qualname__}" for cls in own)


def _hidden_buffers(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    return {
        without_wrappers(f"{path}.{key}" if path else key): (module, key)
        for path, module in model.named_modules()
        for key in sorted(module._non_persistent_buffers_set)
        if module._buffers.get(key) is not None
    }


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone(memory_format=torch.contiguous_format)


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)

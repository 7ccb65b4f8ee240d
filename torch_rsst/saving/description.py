"""What is written beside the weights of a compacted model, and a model made of it again."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from torch_rsst._version import __version__
from torch_rsst.compaction.compaction import replay
from torch_rsst.compaction.cut_record import Stage, remember
from torch_rsst.distributed.dtensor import is_sharded
from torch_rsst.masking.checkpoints import prepare_from_state_dict
from torch_rsst.masking.names import BufferPlace, named_buffers, without_wrappers
from torch_rsst.saving.builders import BUILT, Build
from torch_rsst.saving.likeness import Settings, set_all
from torch_rsst.saving.receipt import UNNAMED
from torch_rsst.utils.errors import refuse
from torch_rsst.utils.files import check_links

FORMAT, VERSION = "torch_rsst.compact", 1
INDEX = "compact.json"
"""The file of a description."""


@dataclass(frozen=True)
class Description:
    """All of a compacted model but its tensors; plain values, as in ``compact.json``.

    A default is what a folder means that was saved before there was such a setting.

    Attributes:
        model_class: the name of its class, for people.
        stages: what was cut, see :mod:`torch_rsst.compaction.cut_record`.
        training: its mode.
        build: how to build the dense model; None where only the user knows.
        not_built: why there is no build, "" where none was expected.
        tied: names in the state dict whose tensor stands in the file under another name, and that one.
        settings: floats that modules have as attributes, where they were set after the model was built.
        frozen: parameters that require no gradient.
        channels_last: tensors in this memory format, on which the rounding of convolutions depends.
        info: its classes, images and metrics, see :class:`torch_rsst.CompactInfo`.
        receipt: see :func:`torch_rsst.saving.receipt.measure`.
        files: the SHA-256 of each file.
        versions: of the packages that wrote it.
    """

    model_class: str
    stages: list[Stage]
    training: bool
    build: Build | None = None
    not_built: str = ""
    tied: dict[str, str] = field(default_factory=dict)
    settings: Settings = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    channels_last: list[str] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
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
            refuse(ValueError, source, "a description", f"broken JSON: {error}", remedy)
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            got = f"format {data.get('format')!r}" if isinstance(data, Mapping) else "another file"
            refuse(ValueError, source, f"the format {FORMAT!r}", got, remedy)
        if data.get("version") != VERSION:
            newer = "Load it with a newer torch_rsst."
            refuse(ValueError, source, f"version {VERSION}", repr(data.get("version")), newer)
        known = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        for name, hint in get_type_hints(cls).items():
            if (name in known or name in _REQUIRED) and not _is_a(known.get(name), hint):
                refuse(ValueError, source, f"{name!r} in it", repr(data.get(name))[:80], remedy)
        for name, text in known.get("files", {}).items():
            if not re.fullmatch("[0-9a-f]{64}", text):
                expected = f"the SHA-256 of {name!r}, 64 hexadecimal digits"
                refuse(ValueError, source, expected, repr(text)[:80], remedy)
        return cls(**{**known, "receipt": {"timed": UNNAMED, **known.get("receipt", {})}})


_REQUIRED = ("model_class", "stages", "training")


def _is_a(value: object, hint: Any) -> bool:
    """Whether a value from JSON is of an annotated type."""
    inner = get_args(hint)
    if get_origin(hint) is UnionType:
        return any(_is_a(value, each) for each in inner)
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(_is_a(each, inner[1]) for each in value.values())
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_is_a(each, inner[0]) for each in value)
    return hint is Any or isinstance(value, hint)


def _where_else(folder: Path) -> str:
    """What helps where a folder holds no compacted model."""
    inside = sorted(folder.glob(f"*/{INDEX}"))
    if inside:
        return f"Pass {inside[0].parent}."
    for run in (folder, folder.parent):
        if (run / "config.yaml").is_file():
            return (
                f"{run} is the folder of a run: torch-rsst compact {run} makes the smaller model."
            )
    return "Save a compacted model there: save_compact(small, folder)."


def read_description(folder: Path) -> Description:
    """What a folder says of its model.

    Raises:
        FileNotFoundError, ValueError: where it says nothing that can be read.
    """
    if not (folder / INDEX).is_file():
        got = f"no {INDEX}" if folder.exists() else "no such folder"
        refuse(FileNotFoundError, str(folder), "a saved model", got, _where_else(folder))
    check_links(folder)
    text = (folder / INDEX).read_text(encoding="utf-8", errors="replace")
    return Description.from_json(text, str(folder / INDEX))


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
        state[name] = _for_file(tensor)
        if not tensor.is_contiguous() and _is_channels_last(tensor):
            channels_last.append(name)
    named = model.named_parameters(remove_duplicate=False)
    frozen = [without_wrappers(name) for name, p in named if not p.requires_grad]
    buffers = {name: _for_file(place.buffer) for name, place in _hidden(model).items()}
    description = Description(
        model_class=_class_name(model),
        stages=stages,
        training=model.training,
        tied=tied,
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
    _take_types(model, state, frozenset(description.channels_last))
    model.load_state_dict({own.get(name, name): tensor for name, tensor in state.items()})
    for name, (module, key, buffer) in _hidden(model).items():
        saved = tensors.buffers.get(name)
        # Others are made anew when they are needed, as tables that grow with their input.
        if saved is not None and saved.shape == buffer.shape:
            module._buffers[key] = saved.to(buffer.device, copy=True)
    set_all(model, description.settings)
    frozen = frozenset(description.frozen)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(without_wrappers(name) not in frozen)
    remember(model, description.stages)
    if description.build is not None:
        vars(model)[BUILT] = description.build
    model.train(description.training)
    return model  # not what train() returns: some classes forget to


def installed() -> dict[str, str]:
    """The versions of the packages that models come from."""
    names = ("torch", "timm", "torchvision", "transformers")
    loaded = {name: sys.modules[name] for name in names if name in sys.modules}
    versions = {name: str(getattr(module, "__version__", "")) for name, module in loaded.items()}
    return {"torch_rsst": __version__, **versions}


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


def _hidden(model: nn.Module) -> dict[str, BufferPlace]:
    """Name → the place of each buffer that is not in the state dict."""
    return {
        name: place
        for name, place in named_buffers(model).items()
        if place.key in place.module._non_persistent_buffers_set
    }


def _for_file(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, and with memory of its own that nothing else is in."""
    plain = tensor.detach().cpu().contiguous()
    return plain if plain.untyped_storage().nbytes() == plain.nbytes else plain.clone()


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)

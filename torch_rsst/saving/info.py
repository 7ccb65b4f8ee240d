"""What a compacted model takes and puts out: how images become inputs, and what the outputs mean."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torch_rsst.masking.names import unwrap
from torch_rsst.saving.builders import timm_options
from torch_rsst.saving.description import INDEX, Description, read_description
from torch_rsst.utils.amounts import check_number
from torch_rsst.utils.errors import (
    check_choice,
    check_type,
    missing_package,
    one_line,
    refuse,
    shown,
)
from torch_rsst.utils.files import as_folder

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")
WHEN = ("dense", "compacted")
"""The models that a metric is of."""

_OF_PRESETS = ("crop_size", "resize_size", "mean", "std", "interpolation")  # of torchvision
_ABSTRACT: dict[type, type] = {int: Integral, float: Real}
_HUGE = 1e30
_MODES = {1: "L", 3: "RGB"}  # of PIL, by channels


@dataclass(frozen=True)
class CompactInfo:
    """What belongs to a model that is to be served: its classes, its images, its metrics.

    Example:
        >>> info = torch_rsst.CompactInfo(
        ...     classes=("cat", "dog"), input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3,
        ...     metrics={"accuracy": {"dense": 97.5, "compacted": 97.0}},
        ... )
        >>> info.classes[1], info.crop_pct
        ('dog', None)

    Attributes:
        classes: the names of the classes, in the order of the outputs; () where they have none.
        input_size: channels, height and width of an input; None: unknown, like the next four.
        mean: what is subtracted from each channel of an image in [0, 1].
        std: what each channel is then divided by.
        interpolation: how images are resized, by its name in timm; None: ``"bicubic"``.
        crop_pct: the share of the resized image's height and width that is kept; None: 1.0.
        crop_mode: which part that is, by its name in timm; None: ``"center"``.
        metrics: name → ``{"dense": …, "compacted": …}``, one or both; a number alone is of the compacted model.
        training: how the model was trained, for the model card.

    Raises:
        TypeError, ValueError: for values of another kind, or that do not fit each other.
    """

    classes: tuple[str, ...] = ()
    input_size: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    training: str = ""

    def __post_init__(self) -> None:
        own = vars(self)
        own["classes"] = _tuple("classes", self.classes, str, "names")
        if self.input_size is not None:
            own["input_size"] = size = _tuple("input_size", self.input_size, int, "sizes")
            if len(size) != 3 or min(size) < 1:
                expected, remedy = "channels, height and width", "Try (3, 224, 224)."
                refuse(ValueError, "input_size", expected, size, remedy)
        for name in ("mean", "std"):
            if own[name] is not None:
                own[name] = values = _tuple(name, own[name], float, "numbers")
                if self.input_size is not None and len(values) != self.input_size[0]:
                    expected = f"one number for each of {self.input_size[0]} channels"
                    refuse(ValueError, name, expected, values, "Correct it, or input_size.")
        if self.std is not None and min(self.std, default=1.0) <= 0.0:
            refuse(ValueError, "std", "numbers above 0", self.std, "Pass (1.0, …) to divide by 1.")
        for name, choices in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
            if own[name] is not None:
                check_choice(name, own[name], choices)
        if self.crop_pct is not None:
            check_number(self.crop_pct, "crop_pct", above=0.0)
        check_type(self.training, str, "training", "text", "Say how the model was trained.")
        own["metrics"] = _metrics(self.metrics)

    @classmethod
    def of(cls, source: Any, **known: Any) -> CompactInfo:
        """What a model, weights or a data configuration say.

        Example:
            >>> torch_rsst.CompactInfo.of({"input_size": (1, 8, 8), "mean": (0.3,)}, std=(0.4,)).mean
            (0.3,)

        Args:
            source: a model of timm (its data configuration), transformers (the names of its classes) or
                :func:`torch_rsst.load_compact` (all but metrics and training); weights of torchvision such as ``ResNet18_Weights.DEFAULT``, or their ``transforms()``; or a data
                configuration, as ``timm.data.resolve_model_data_config`` returns it. Of any other model
                nothing is known.
            known: attributes that override what is found.

        Raises:
            TypeError: for anything else.
        """
        preset = source.transforms() if callable(getattr(source, "transforms", None)) else source
        if isinstance(source, Mapping):
            found = {f.name: source[f.name] for f in fields(cls) if f.name in source}
        elif all(hasattr(preset, name) for name in _OF_PRESETS):
            found = _of_torchvision(preset, getattr(source, "meta", {}))
        elif isinstance(source, nn.Module):
            found = _of_model(unwrap(source))
        else:
            expected = "a model, weights of torchvision or a data configuration"
            remedy = "Call CompactInfo(…) with what you know."
            refuse(TypeError, "CompactInfo.of", expected, f"a {type(source).__name__}", remedy)
        return cls(**{**found, **known})

    def completed(self, model: nn.Module, example_inputs: Any = None) -> CompactInfo:
        """With what is not given as the model and, if it is one batch of images, the example say."""
        found = CompactInfo.of(model)
        tensors = [leaf for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor)]
        if len(tensors) == 1 and tensors[0].ndim == 4:
            size: Any = tuple(tensors[0].shape[1:])
            fits = found.mean is None or len(found.mean) == size[0]
            found = replace(found if fits else replace(found, mean=None, std=None), input_size=size)
        return replace(found, **{name: value for name, value in vars(self).items() if value})

    def transform(self) -> Callable[[Any], Tensor]:
        """The transform of images for evaluation, made by timm: a PIL image → a tensor of ``input_size``.

        Raises:
            ValueError: where size, mean or std is unknown, or the inputs are no images.
            ModuleNotFoundError: without timm.
        """
        missing = [name for name in ("input_size", "mean", "std") if getattr(self, name) is None]
        remedy = "Pass info=CompactInfo(input_size=…, mean=…, std=…) to save_compact."
        if self.input_size is None or missing:
            got = f"no {' and no '.join(missing)}"
            refuse(ValueError, "transform", "what the model was trained on", got, remedy)
        if self.input_size[0] not in _MODES:
            got = f"{self.input_size[0]} channels"
            refuse(ValueError, "transform", "images, gray or in color", got, "Write your own.")
        try:
            timm, torchvision = map(
                importlib.import_module, ("timm.data", "torchvision.transforms")
            )
        except ModuleNotFoundError as error:
            remedy = "pip install 'torch-rsst[vision]'"
            raise missing_package(error, "transform", remedy) from error
        made = timm.create_transform(
            input_size=self.input_size,
            interpolation=self.interpolation or "bicubic",
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct or 1.0,
            crop_mode=self.crop_mode or "center",
        )
        steps = [_Converted(_MODES[self.input_size[0]]), *made.transforms]
        composed: Callable[[Any], Tensor] = torchvision.Compose(steps)
        return composed

    def to_dict(self) -> dict[str, Any]:
        """As plain data, fit for JSON."""
        return asdict(self)


def as_info(info: object) -> CompactInfo:
    """What ``info=`` says, nothing for None.

    Raises:
        TypeError: for anything else.
    """
    if info is not None and not isinstance(info, CompactInfo):
        remedy = "Pass info=CompactInfo(classes=…), or CompactInfo.of(…)."
        refuse(TypeError, "info", "a CompactInfo", shown(info), remedy)
    return info or CompactInfo()


def compact_info(folder: str | Path) -> CompactInfo:
    """What belongs to the model that :func:`torch_rsst.save_compact` saved; the model is not loaded.

    A model of :func:`torch_rsst.load_compact` has the same as its attribute ``compact_info``.

    Example:
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))
        >>> groups = torch_rsst.find_groups(mlp)
        >>> torch_rsst.apply_mask(mlp, torch_rsst.regroup(mlp, groups, amount=0.5))
        >>> small, info = torch_rsst.compact(mlp, groups), torch_rsst.CompactInfo(classes=("cat", "dog"))
        >>> receipt = torch_rsst.save_compact(small, folder, info=info)
        >>> torch_rsst.compact_info(folder).classes
        ('cat', 'dog')

    Raises:
        FileNotFoundError: where the folder was not saved to.
        ValueError: where its description is damaged.
        TypeError: for anything else than a path.
    """
    path = as_folder(folder, "Pass a folder of save_compact.")
    return info_in(read_description(path), path)


def info_in(description: Description, folder: Path) -> CompactInfo:
    """What a description says of inputs and outputs.

    Raises:
        ValueError: where that is damaged.
    """
    try:
        return CompactInfo.of(description.info)
    except (TypeError, ValueError) as error:
        remedy = "Save the model again with save_compact."
        refuse(ValueError, str(folder / INDEX), "'info' in it", f"({one_line(error)})", remedy)


@dataclass(frozen=True)
class _Converted:
    """PIL images in one mode; anything else as it is."""

    mode: str

    def __call__(self, image: Any) -> Any:
        return image.convert(self.mode) if hasattr(image, "convert") else image


def _of_model(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    labels = getattr(getattr(model, "config", None), "id2label", None)
    if isinstance(labels, Mapping) and any(v != f"LABEL_{k}" for k, v in labels.items()):
        found["classes"] = [str(labels[key]) for key in sorted(labels)]
    origin = getattr(model, "pretrained_cfg", None)
    of_timm = any(cls.__module__.startswith("timm.") for cls in type(model).__mro__)
    if of_timm and isinstance(origin, Mapping) and origin.get("input_size"):
        found |= importlib.import_module("timm.data").resolve_model_data_config(model)
        options = timm_options(model, origin)
        size = options.get("img_size", found["input_size"][1:])
        found["input_size"] = (options.get("in_chans", 3), *size)
        if len(found["mean"]) != found["input_size"][0]:  # those of images in color
            del found["mean"], found["std"]
    saved = vars(model).get("compact_info")
    if isinstance(saved, CompactInfo):
        found |= {k: v for k, v in vars(saved).items() if v and k not in ("metrics", "training")}
    return found


def _of_torchvision(preset: Any, meta: Mapping[str, Any]) -> dict[str, Any]:
    crop, resized = preset.crop_size[0], preset.resize_size[0]
    share = crop / resized
    return {
        "classes": meta.get("categories", ()),
        "input_size": (len(preset.mean), crop, crop),
        "mean": preset.mean,
        "std": preset.std,
        "interpolation": preset.interpolation.value,
        # timm rounds down what it resizes to.
        "crop_pct": share if int(crop / share) == resized else math.nextafter(share, 0.0),
    }


def _metrics(metrics: object) -> dict[str, dict[str, float]]:
    checked: dict[str, dict[str, float]] = {}
    expected = 'a name and {"dense": …, "compacted": …} for each, finite numbers'
    for name, values in metrics.items() if isinstance(metrics, Mapping) else [(metrics, None)]:
        each = values if isinstance(values, Mapping) else {"compacted": values}
        numbers = [_plain(value, float) for value in each.values()]
        if not isinstance(name, str) or not set(each) <= set(WHEN) or None in numbers:
            got = f"{name!r}: {values!r}"[:200]
            refuse(TypeError, "metrics", expected, got, 'Try {"accuracy": {"compacted": 97.0}}.')
        checked[name] = dict(zip(each, numbers, strict=True))
    return checked


def _tuple(name: str, values: Any, kind: type, what: str) -> tuple[Any, ...]:
    listed = isinstance(values, Iterable) and not isinstance(values, (str, Mapping))
    plain = tuple(_plain(value, kind) for value in (values if listed else [values]))
    if not listed or None in plain:
        refuse(TypeError, name, f"a tuple of {what}", repr(values)[:80], "Correct it.")
    return plain


def _plain(value: Any, kind: type) -> Any:
    """A value as Python's own of a kind; None where it is of another."""
    fits = isinstance(value, _ABSTRACT.get(kind, kind)) and not isinstance(value, bool)
    if not fits or (kind is not str and not abs(value) < _HUGE):
        return None
    return kind(value)

"""The functions that a file may ask for, to build a dense model: these and no others.

A description that comes with a model from a stranger must not run anything but constructors of
well-kept packages, with plain values, and must not make them download or open files.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from torch_rsst.utils.errors import message

Build = dict[str, Any]
"""``{"name": "timm.create_model", "args": [...], "kwargs": {...}}``, plain values only."""

Args: TypeAlias = Sequence[Any]
Kwargs: TypeAlias = Mapping[str, Any]

BUILT = "_compaction_build"
"""The attribute in which a loaded model keeps how the dense one was built."""
_ELSEWHERE = re.compile(r"(hf[-_]hub|local[-_]dir|https?|file):", re.IGNORECASE)
_ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


@dataclass(frozen=True)
class Builder:
    """A function that a description may name.

    Attributes:
        name: a regular expression for its name.
        expected: what it takes, for messages.
        refused: keyword arguments, or keys of a configuration, that load or download something;
            only None and False are let through.
        call: makes the model of (name, args, kwargs); None where the arguments are of another kind.
    """

    name: str
    expected: str
    refused: tuple[str, ...]
    call: Callable[[str, Args, Kwargs], Any]


def _create_timm(name: str, args: Args, kwargs: Kwargs) -> Any:
    timm: Any = importlib.import_module("timm")
    if len(args) != 1 or not _is_plain_name(args[0]):
        return None
    return timm.create_model(args[0], **{**kwargs, "pretrained": False})


def _timm_vit(name: str, args: Args, kwargs: Kwargs) -> Any:
    models = importlib.import_module("timm.models")
    return None if args else models.VisionTransformer(**kwargs)


def _get_torchvision(name: str, args: Args, kwargs: Kwargs) -> Any:
    models = importlib.import_module("torchvision.models")
    if len(args) != 1 or args[0] not in models.list_models():
        return None
    takes = inspect.signature(models.get_model_builder(args[0])).parameters
    off = dict.fromkeys({"weights", *takes} & {"weights", "weights_backbone"})
    return models.get_model(args[0], **{**kwargs, **off})


def _from_transformers(name: str, args: Args, kwargs: Kwargs) -> Any:
    transformers = importlib.import_module("transformers")
    class_name, _, method = name.removeprefix("transformers.").partition(".")
    cls: Any = getattr(transformers, class_name, None)
    auto = class_name.startswith("AutoModel")
    fits = isinstance(cls, type) and (auto or issubclass(cls, transformers.PreTrainedModel))
    if auto != bool(method) or not fits:
        expected = "a model class of transformers, or AutoModel….from_config"
        raise _refuse(name, expected, "another name")
    if len(args) != 1 or not isinstance(args[0], Mapping):
        return None
    parts = list(_walk(args[0]))
    if {key for key, _ in parts} & {"attn_implementation", "experts_implementation"}:
        # Which may name code in a repository.
        raise _refuse(name, "a configuration without attn_implementation", "one with it")
    for _, part in parts:
        if isinstance(part, Mapping) and part.get("backbone") and not _is_of_timm(part):
            expected = "it left out, or the name of an architecture of timm"
            raise _refuse(f"{name}: 'backbone'", expected, part["backbone"])
    data, implementation = dict(args[0]), kwargs.get("attn_implementation")
    if set(kwargs) - {"attn_implementation"} or implementation not in _ATTENTION:
        raise _refuse(name, "attn_implementation alone, a built-in one", dict(kwargs))
    config_class = type(transformers.AutoConfig.for_model(str(data.get("model_type"))))
    config = config_class.from_dict(data)
    if implementation is not None:
        config._attn_implementation = implementation
    # Not from_config of a class: it may look for code beside the configuration.
    return cls.from_config(config, trust_remote_code=False) if auto else cls(config)


def _is_of_timm(config: Mapping[str, Any]) -> bool:
    timm = config.get("model_type") == "timm_backbone" or config.get("use_timm_backbone") is True
    return timm and _is_plain_name(config["backbone"])


def _is_plain_name(name: object) -> bool:
    """Whether this can be the name of an architecture: not of a repository or a folder."""
    return isinstance(name, str) and not set(name) & set(":/\\")


_FILES = ("pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
_OF_TIMM = ("pretrained", "pretrained_strict", *_FILES)
_OF_TRANSFORMERS = (
    *("auto_map", "trust_remote_code", "quantization_config", "use_pretrained_backbone"),
    *("use_kernels", "kernel_config", "_attn_implementation", "_attn_implementation_internal"),
    *_FILES,
)
_NAME = "the name of %s and keywords"
BUILDERS = (
    Builder(r"timm\.create_model", _NAME % "an architecture", _OF_TIMM, _create_timm),
    Builder(r"timm\.models\.VisionTransformer", "keywords alone", _OF_TIMM, _timm_vit),
    Builder(
        r"torchvision\.models\.get_model",
        _NAME % "a model",
        ("weights", "weights_backbone"),
        _get_torchvision,
    ),
    Builder(
        r"transformers\.[A-Za-z0-9_]+(\.from_config)?",
        "one configuration, as a dict",
        _OF_TRANSFORMERS,
        _from_transformers,
    ),
)
LISTED = (
    "timm.create_model, timm.models.VisionTransformer, torchvision.models.get_model, "
    "transformers.AutoModel….from_config or a model class of transformers"
)


def as_build(build: object) -> Build:
    """A build as plain values; configurations of transformers become dicts.

    >>> as_build({"name": "timm.create_model", "args": ("resnet18",)})
    {'name': 'timm.create_model', 'args': ['resnet18'], 'kwargs': {}}

    Raises:
        TypeError, ValueError: for anything that cannot be written as JSON, or a name that is not allowed.
    """
    if not isinstance(build, Mapping) or set(build) - {"name", "args", "kwargs"}:
        raise _refuse("build", "a dict of 'name', 'args' and 'kwargs'", build)
    name, args, kwargs = build.get("name"), build.get("args", ()), build.get("kwargs", {})
    if not (isinstance(args, (list, tuple)) and isinstance(kwargs, Mapping)):
        raise _refuse("build", "a list of 'args' and a dict of 'kwargs'", build)
    _builder(name)
    try:
        text = json.dumps([args, kwargs], default=_configuration, allow_nan=False)
    except (TypeError, ValueError) as error:
        remedy = "Pass plain values only, or leave build out and pass model= to load_compact."
        expected, got = "numbers, text, lists and dicts", str(error)
        raise TypeError(message("build", expected=expected, got=got, remedy=remedy)) from None
    plain_args, plain_kwargs = json.loads(text)
    return {"name": name, "args": plain_args, "kwargs": plain_kwargs}


def _configuration(value: Any) -> Any:
    if not callable(getattr(value, "to_json_string", None)):
        raise TypeError(f"a {type(value).__name__}")
    # The weights of a backbone come from the folder.
    return json.loads(
        value.to_json_string(use_diff=False),
        object_hook=lambda d: d | dict.fromkeys({"use_pretrained_backbone"} & d.keys(), False),
    )


def build_model(build: object) -> nn.Module:
    """Build a dense model as a description says; the random state is put back.

    Raises:
        TypeError, ValueError: for a builder or arguments that are not allowed.
        Exception: what the builder raises.
    """
    plain = as_build(build)
    name, args, kwargs = plain["name"], plain["args"], plain["kwargs"]
    builder = _builder(name)
    for key, value in _walk([args, kwargs]):
        if key in builder.refused and value not in (None, False):
            raise _refuse(f"{name}: {key!r}", "it left out", value)
        if isinstance(value, str) and _ELSEWHERE.match(value):
            raise _refuse(name, "nothing from elsewhere", repr(value))
    with torch.random.fork_rng(devices=[]):
        model: nn.Module | None = builder.call(name, args, kwargs)
    if model is None:
        raise _refuse(name, builder.expected, args)
    return model


def _builder(name: object) -> Builder:
    for builder in BUILDERS if isinstance(name, str) else ():
        if re.fullmatch(builder.name, str(name)):
            return builder
    raise _refuse("build", f"one of {LISTED}", repr(name))


def _walk(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All that stands in plain values, with the key that it stands under."""
    yield key, value
    if isinstance(value, Mapping):
        for inner_key, inner in value.items():
            yield from _walk(inner, str(inner_key))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _walk(inner, key)


def _refuse(subject: str, expected: str, got: object) -> ValueError:
    remedy = (
        "A file may name nothing else: build the model yourself, load_compact(folder, model=…)."
    )
    return ValueError(message(subject, expected=expected, got=str(got)[:200], remedy=remedy))


def guess_builds(model: nn.Module) -> Iterator[Build]:
    """How a model may have been built, the likeliest first; to be checked, since models do not say."""
    cls, config = type(model), getattr(model, "config", None)
    if BUILT in vars(model):
        yield vars(model)[BUILT]
    if cls.__module__.startswith("transformers.") and hasattr(config, "to_json_string"):
        # Some classes refuse to be told what they choose by themselves.
        named = {"attn_implementation": getattr(config, "_attn_implementation", None)}
        for kwargs in ({}, named):
            yield {"name": f"transformers.{cls.__name__}", "args": [config], "kwargs": kwargs}
    origin = getattr(model, "pretrained_cfg", None)
    if isinstance(origin, Mapping) and isinstance(origin.get("architecture"), str):
        name, options = origin["architecture"], timm_options(model, origin)
        for more in ({}, {"global_pool": _pool_of(model)}, {"depth": _depth_of(model)}):
            if None not in more.values():
                kwargs = {**options, **more}
                yield {"name": "timm.create_model", "args": [name], "kwargs": kwargs}


def timm_options(model: nn.Module, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``timm.create_model`` that a model seems to have been made with.

    Args:
        model: of timm.
        origin: its ``pretrained_cfg``.

    Returns:
        ``num_classes``, ``in_chans`` and ``img_size``, where it is not that of ``origin``.
    """
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    sizes = (vars(module).get("img_size") for module in model.modules())
    image = next((list(size) for size in sizes if isinstance(size, (list, tuple))), None)
    found = {
        "num_classes": getattr(model, "num_classes", None),
        "in_chans": first.in_channels if first is not None and first.groups == 1 else None,
        "img_size": None if image == [*origin.get("input_size", ())][1:] else image,
    }
    return {key: value for key, value in found.items() if value is not None}


def _depth_of(model: nn.Module) -> int | None:
    """The argument ``depth`` of many models of timm: how many blocks there are."""
    blocks = getattr(model, "blocks", None)
    takes = inspect.signature(type(model).__init__).parameters
    return len(blocks) if isinstance(blocks, nn.Sequential) and "depth" in takes else None


def shown_build(build: Build) -> str:
    """A build as the call that it stands for.

    >>> shown_build({"name": "timm.create_model", "args": ["resnet18"], "kwargs": {"num_classes": 2}})
    "timm.create_model('resnet18', num_classes=2)"
    """
    named = (f"{key}={value!r}" for key, value in build["kwargs"].items())
    return f"{build['name']}({', '.join([*map(repr, build['args']), *named])})"


def _pool_of(model: nn.Module) -> str | None:
    pools = (getattr(m, "global_pool", None) for m in (model, getattr(model, "head", None)))
    kinds = (getattr(pool, "pool_type", pool) for pool in pools)
    return next((kind for kind in kinds if isinstance(kind, str)), None)

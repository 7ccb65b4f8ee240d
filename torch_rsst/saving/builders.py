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
from typing import Any

import torch
from torch import nn

from torch_rsst.utils.errors import message

Build = dict[str, Any]
"""``{"name": "timm.create_model", "args": [...], "kwargs": {...}}``, plain values only."""

_ELSEWHERE = re.compile(r"(hf[-_]hub|local[-_]dir|https?|file):", re.IGNORECASE)
_ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


@dataclass(frozen=True)
class Builder:
    """A function that a description may name.

    Attributes:
        name: a regular expression for the names it answers to.
        refused: keyword arguments, or keys of a configuration, that load or download something;
            only None and False are let through.
        call: makes the model of (name, args, kwargs).
    """

    name: str
    refused: tuple[str, ...]
    call: Callable[[str, Sequence[Any], Mapping[str, Any]], nn.Module]


def _create_timm(_: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> nn.Module:
    if len(args) != 1 or not isinstance(args[0], str) or ":" in args[0] or "/" in args[0]:
        raise _refuse("timm.create_model", "the name of an architecture and keywords", args)
    timm = importlib.import_module("timm")
    model: nn.Module = timm.create_model(args[0], **{**kwargs, "pretrained": False})
    return model


def _timm_vit(_: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> nn.Module:
    if args:
        raise _refuse("timm.models.VisionTransformer", "keywords alone", args)
    models = importlib.import_module("timm.models")
    model: nn.Module = models.VisionTransformer(**kwargs)
    return model


def _get_torchvision(_: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> nn.Module:
    models = importlib.import_module("torchvision.models")
    if len(args) != 1 or args[0] not in models.list_models():
        raise _refuse("torchvision.models.get_model", "the name of a model and keywords", args)
    off = {"weights": None}
    if "weights_backbone" in inspect.signature(models.get_model_builder(args[0])).parameters:
        off["weights_backbone"] = None
    model: nn.Module = models.get_model(args[0], **{**kwargs, **off})
    return model


def _names_in(value: object) -> set[str]:
    """The keys of a mapping and of all that stand in it."""
    if isinstance(value, Mapping):
        return {str(key) for key in value}.union(*map(_names_in, value.values()))
    return set().union(*map(_names_in, value)) if isinstance(value, (list, tuple)) else set()


def _from_transformers(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> nn.Module:
    transformers = importlib.import_module("transformers")
    class_name, _, method = name.removeprefix("transformers.").partition(".")
    cls: Any = getattr(transformers, class_name, None)
    auto = class_name.startswith("AutoModel")
    fits = isinstance(cls, type) and (auto or issubclass(cls, transformers.PreTrainedModel))
    if auto != bool(method) or not fits:
        expected = "a model class of transformers, or AutoModel….from_config"
        raise _refuse(name, expected, "another name")
    if len(args) != 1 or not isinstance(args[0], Mapping):
        raise _refuse(name, "one configuration, as a dict", args)
    if _names_in(args[0]) & {"attn_implementation", "experts_implementation"}:
        # Which may name code in a repository.
        raise _refuse(name, "a configuration without attn_implementation", "one with it")
    data, implementation = dict(args[0]), kwargs.get("attn_implementation")
    if set(kwargs) - {"attn_implementation"} or implementation not in _ATTENTION:
        raise _refuse(name, "attn_implementation alone, a built-in one", dict(kwargs))
    config_class = type(transformers.AutoConfig.for_model(str(data.get("model_type"))))
    config = config_class.from_dict(data)
    if implementation is not None:
        config._attn_implementation = implementation
    # Not from_config of a class: it may look for code beside the configuration.
    model: nn.Module = cls.from_config(config, trust_remote_code=False) if auto else cls(config)
    return model


_OF_TIMM = (
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_strict",
    "checkpoint_path",
    "cache_dir",
)
_OF_TRANSFORMERS = (
    "auto_map",
    "trust_remote_code",
    "quantization_config",
    "use_pretrained_backbone",
    "backbone",
    "use_kernels",
    "kernel_config",
    "_attn_implementation",
    "_attn_implementation_internal",
)
BUILDERS = (
    Builder(r"timm\.create_model", _OF_TIMM, _create_timm),
    Builder(r"timm\.models\.VisionTransformer", _OF_TIMM, _timm_vit),
    Builder(r"torchvision\.models\.get_model", ("weights", "weights_backbone"), _get_torchvision),
    Builder(r"transformers\.[A-Za-z0-9_]+(\.from_config)?", _OF_TRANSFORMERS, _from_transformers),
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
        expected = "a dict of 'name', 'args' and 'kwargs'"
        raise _refuse("build", expected, build)
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
    if callable(getattr(value, "to_json_string", None)):
        return json.loads(value.to_json_string(use_diff=False))
    raise TypeError(f"a {type(value).__name__}")


def build_model(build: object) -> nn.Module:
    """Build a dense model as a description says; the random state is put back.

    Raises:
        TypeError, ValueError: for a builder or arguments that are not allowed.
        Exception: what the builder raises.
    """
    plain = as_build(build)
    builder = _builder(plain["name"])
    for key, value in _items([plain["args"], plain["kwargs"]]):
        if key in builder.refused and value not in (None, False):
            raise _refuse(f"{plain['name']}: {key!r}", "it left out", value)
    if remote := next(filter(_ELSEWHERE.match, _texts([plain["args"], plain["kwargs"]])), None):
        raise _refuse(plain["name"], "nothing from elsewhere", repr(remote))
    with torch.random.fork_rng(devices=[]):
        return builder.call(plain["name"], plain["args"], plain["kwargs"])


def _builder(name: object) -> Builder:
    if isinstance(name, str):
        for builder in BUILDERS:
            if re.fullmatch(builder.name, name):
                return builder
    raise _refuse("build", f"one of {LISTED}", repr(name))


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """All keys with their values, however deep."""
    if isinstance(value, Mapping):
        yield from value.items()
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _items(item)


def _texts(value: Any) -> Iterator[str]:
    """All text in plain values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _refuse(subject: str, expected: str, got: object) -> ValueError:
    remedy = (
        "A file may name nothing else: build the model yourself, load_compact(folder, model=…)."
    )
    return ValueError(message(subject, expected=expected, got=str(got)[:200], remedy=remedy))


def guess_builds(model: nn.Module) -> Iterator[Build]:
    """How a model may have been built, the likeliest first; to be checked, since models do not say."""
    cls = type(model)
    config = getattr(model, "config", None)
    if cls.__module__.startswith("transformers.") and callable(
        getattr(config, "to_json_string", None)
    ):
        kwargs = {"attn_implementation": getattr(config, "_attn_implementation", None)}
        yield {"name": f"transformers.{cls.__name__}", "args": [config], "kwargs": kwargs}
    origin = getattr(model, "pretrained_cfg", None)
    if isinstance(origin, Mapping) and isinstance(origin.get("architecture"), str):
        name, options = origin["architecture"], _timm_options(model, origin)
        pools = {**options, "global_pool": _pool_of(model)}
        for kwargs in [options, pools] if pools["global_pool"] else [options]:
            yield {"name": "timm.create_model", "args": [name], "kwargs": kwargs}


def _timm_options(model: nn.Module, origin: Mapping[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if isinstance(classes := getattr(model, "num_classes", None), int):
        options["num_classes"] = classes
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    size = origin.get("input_size")
    shape = list(size) if isinstance(size, (list, tuple)) else []
    if first is not None and first.groups == 1 and shape[:1] != [first.in_channels]:
        options["in_chans"] = first.in_channels
    sizes = (vars(m).get("img_size") for m in model.modules())
    image = next((list(size) for size in sizes if isinstance(size, (list, tuple))), None)
    if image is not None and image != shape[1:]:
        options["img_size"] = image
    return options


def _pool_of(model: nn.Module) -> str | None:
    for holder in (model, getattr(model, "head", None)):
        pool = getattr(holder, "global_pool", None)
        kind = getattr(pool, "pool_type", pool)
        if isinstance(kind, str):
            return kind
    return None

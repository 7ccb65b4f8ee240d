"""The model of a run: a timm model, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import nn

from torch_rsst.recipes import digits
from torch_rsst.recipes.config import RunConfig
from torch_rsst.recipes.images import Images
from torch_rsst.utils.errors import closest, message, refuse

DIGITS = "vit_digits"


@dataclass(frozen=True, eq=False)
class Chosen:
    """A model, how it is built, and the images that it expects.

    Attributes:
        model: the model, on the CPU.
        name: its name.
        build: for :func:`torch_rsst.save_compact`: builds it again, without pretrained weights.
        form: size and normalization of images, see :func:`form_of`.
    """

    model: nn.Module
    name: str
    build: dict[str, Any]
    form: dict[str, Any]


def choose_model(config: RunConfig, images: Images) -> Chosen:
    """Build the model of a run for its images.

    Raises:
        ValueError: for a name that timm does not know, or options that do not fit the model.
        OSError: where pretrained weights cannot be loaded.
    """
    name = _name(config)
    if name == DIGITS and config.source == "digits" and config.image_size in (None, digits.SIZE):
        return Chosen(digits.model(), name, digits.BUILD, digits.form())
    if name == DIGITS:
        remedy = "Pass --model, for example vit_small_patch16_224."
        expected = f"a model for these images: {DIGITS} takes the digits, {digits.SIZE} pixels wide"
        refuse(ValueError, "model", expected, name, remedy)
    if config.pretrained and not timm.is_model_pretrained(name):
        expected, remedy = "a model with pretrained weights", "Leave --pretrained away."
        refuse(ValueError, "model", expected, name, remedy)
    options = _options(config, name, images)
    try:
        model: nn.Module = timm.create_model(name, pretrained=config.pretrained, **options)
    except Exception as error:  # of timm, the model, the hub's client, the network: many kinds
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(".")
        if config.pretrained:
            remedy = "Check the network, or leave --pretrained away."
            expected = f"the pretrained weights of {name}"
            raise OSError(message("model", expected=expected, got=reason, remedy=remedy)) from error
        expected, remedy = f"options that {name} takes", "Check --image-size and --drop-path."
        raise ValueError(message("model", expected=expected, got=reason, remedy=remedy)) from error
    size = resolve_data_config({"img_size": config.image_size}, model=model)["input_size"]
    form = form_of(config, model, (images.channels, *size[1:]))
    _try(model, name, form["input_size"], images.classes)
    return Chosen(
        model, name, {"name": "timm.create_model", "args": [name], "kwargs": options}, form
    )


def form_of(config: RunConfig, model: nn.Module, size: tuple[int, ...]) -> dict[str, Any]:
    """Size, normalization and crop of the images that a model of a run takes.

    Args:
        config: of the run.
        model: of the run.
        size: channels, height and width of an image.
    """
    if config.source == "digits":
        return digits.form(size[-1])
    form: dict[str, Any] = resolve_data_config({"input_size": size}, model=model)
    return form


def _try(model: nn.Module, name: str, size: tuple[int, ...], classes: int) -> None:
    """Raise unless a model maps images of a size to a score for each class."""
    try:
        with torch.inference_mode():
            outputs = model.eval()(torch.zeros(2, *size))
        model.train()
        if not isinstance(outputs, torch.Tensor) or outputs.shape != (2, classes):
            raise ValueError(f"another output than {classes} scores for each image")
    except Exception as error:  # models assert, or fail at whatever they compute
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        expected = f"a size that {name} takes, not {'x'.join(map(str, size[1:]))} pixels"
        raise ValueError(
            message(
                "image_size", expected=expected, got=reason, remedy="Pass another --image-size."
            )
        ) from error


def _name(config: RunConfig) -> str:
    if config.model == "auto":
        return DIGITS
    if config.model != DIGITS and not timm.is_model(config.model):
        near = closest(config.model, timm.list_models())
        remedy = f"Did you mean {near!r}?" if near else "timm.list_models() lists them."
        refuse(ValueError, "model", "a model of timm", repr(config.model), remedy)
    return config.model


def _options(config: RunConfig, name: str, images: Images) -> dict[str, Any]:
    options: dict[str, Any] = {"num_classes": images.classes}
    if images.channels != 3:
        options["in_chans"] = images.channels
    if config.drop_path:
        options["drop_path_rate"] = config.drop_path
    origin = timm.get_pretrained_cfg(name)
    # Other models take images of any size, and have no such argument.
    if config.image_size and origin is not None and origin.fixed_input_size:
        options["img_size"] = config.image_size
    return options

"""Guesses at what a model takes, from what it says of itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

_SIDES = (224, 64, 32)
_LARGE_SIDE = 256
_SMALL_SIDES = (64, 32, 96, 128, 299)


def guesses(model: nn.Module) -> Iterator[Any]:
    """Example inputs to try, the likeliest first; none for a model that says nothing.

    timm's models carry the size of their images, those of transformers make inputs of their own; of
    others the first convolution tells the number of channels.
    """
    draw, device = _drawing(model)

    def described(channels: int, *sides: int) -> Iterator[torch.Tensor]:
        if max(sides) > _LARGE_SIDE:  # it may run on smaller ones, which takes seconds, not minutes
            yield draw(2, channels, *(min(side, _SIDES[0]) for side in sides))
        yield draw(2, channels, *sides)

    for name in ("pretrained_cfg", "default_cfg"):
        configured = getattr(model, name, None)
        if isinstance(configured, Mapping) and configured.get("input_size"):
            yield from described(*configured["input_size"])
    config: Any = getattr(model, "config", object())
    if hasattr(config, "image_size"):
        side, channels = config.image_size, getattr(config, "num_channels", 3)
        if isinstance(side, int):
            yield from ({"pixel_values": pixels} for pixels in described(channels, side, side))
    if hasattr(config, "vocab_size"):
        tokens = torch.arange(8).view(2, 4) % int(config.vocab_size)
        no_cache = {"use_cache": False} if hasattr(config, "use_cache") else {}
        yield {"input_ids": tokens.to(device), **no_cache}
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None:
        for side in _SIDES:
            yield draw(2, first.in_channels, side, side)


def small_guesses(model: nn.Module) -> Iterator[Any]:
    """Example inputs to look at the structure of a model with; small ones first, for they run fast."""
    draw, device = _drawing(model)
    first = next((m for m in model.modules() if isinstance(m, _ConvNd)), None)
    if first is not None and not hasattr(model, "config"):
        dims = len(first.kernel_size)
        for side in _SMALL_SIDES if dims == 2 else (16 if dims == 3 else 64,):
            yield draw(2, first.in_channels, *[side] * dims)
    yield from guesses(model)
    # What a linear or recurrent layer or an embedding takes, where the model begins with one.
    kinds = (nn.Linear, nn.RNNBase, nn.Embedding, _ConvNd)
    begin = next((m for m in model.modules() if isinstance(m, kinds)), None)
    if isinstance(begin, nn.Embedding):
        yield torch.arange(8, device=device).view(2, 4) % begin.num_embeddings
    elif isinstance(begin, (nn.Linear, nn.RNNBase)):
        width = begin.in_features if isinstance(begin, nn.Linear) else begin.input_size
        yield from (draw(2, width), draw(2, 5, width))


def _drawing(model: nn.Module) -> tuple[Callable[..., torch.Tensor], torch.device]:
    """What draws random numbers of a shape, of the type of the model's weights, and the device of these."""
    like = next(model.parameters(), torch.empty(0)).detach()
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(like)

    return draw, like.device

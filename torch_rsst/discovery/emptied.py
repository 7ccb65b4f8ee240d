"""What is left of a layer without units."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from torch_rsst.masking.live_weight import MASK, ORIG, make_live
from torch_rsst.masking.parameter_ref import ParameterRef


class BiasOnly(nn.Module):
    """What a layer computes once all of its units are gone: the bias of its output layer.

    Example:
        >>> layer = BiasOnly(torch.nn.Linear(0, 2))
        >>> layer(torch.ones(3, 5)).shape
        torch.Size([3, 2])

    Args:
        output: the layer's output layer, linear or a 1×1 convolution; its bias is kept, not copied.
    """

    def __init__(self, output: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        linear = isinstance(output, nn.Linear)
        self.out_features = output.out_features if linear else output.out_channels
        self.dim = -1 if linear else -3  # of features: the last, or the channels of an image
        keep_bias(self, output)
        self.register_buffer("_like", output.weight.new_zeros(()), persistent=False)
        self.train(output.training)

    _like: Tensor
    bias: Tensor | None

    @property
    def weight(self) -> Tensor:
        """Of the type and on the device of the weights that are gone, for who asks them for it."""
        return self._like

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The bias at every position of ``x``; whatever else is passed is not needed."""
        before, after = x.shape[: self.dim], x.shape[self.dim :][1:]
        shape = (*before, self.out_features, *after)
        out = torch.zeros(shape, dtype=self._like.dtype, device=self._like.device)
        return out if self.bias is None else out + self.bias.reshape(-1, *[1] * len(after))


def keep_bias(module: nn.Module, output: nn.Module) -> None:
    """Give a module the bias of a layer, under its mask if it has one."""
    ref = ParameterRef(output, "bias")
    module.register_parameter("bias", output._parameters.get("bias"))
    if ref.is_masked:
        del module._parameters["bias"]
        module.register_parameter("bias" + ORIG, ref.original)
        module.register_buffer("bias" + MASK, ref.mask)
        make_live(module, "bias")


def returns_tuple(module: nn.Module) -> bool:
    """Whether a forward says that it returns a tuple, as of an output and the weights of attention."""
    returned = inspect.signature(type(module).forward).return_annotation
    named = returned if isinstance(returned, str) else getattr(returned, "__name__", "")
    return named.lower().startswith("tuple")


class NoFeatures(nn.Module):
    """What a layer puts out once it has no rows: nothing at every position.

    Args:
        dim: the dimension of features.
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """``x`` without its features."""
        return x.narrow(self.dim, 0, 0)

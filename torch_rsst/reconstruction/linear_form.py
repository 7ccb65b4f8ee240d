"""Layers as linear maps: input → rows of features, weight → matrix, so that output = features · matrixᵀ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

_CHUNK = 2**23  # features at a time, 64 MiB in float64


@dataclass(frozen=True)
class LinearForm:
    """A layer as one linear map for each of its groups of channels; one group unless it is a convolution.

    A linear layer is a convolution of 0 dimensions. A transposed convolution is one over its input with
    zeros between the entries, with its kernel flipped.

    Attributes:
        convolution: the layer, where it is a convolution.
        inputs_first: whether the weight is stored with inputs first, as transposed convolutions and
            ``Conv1D`` of transformers do.
    """

    convolution: _ConvNd | None
    inputs_first: bool

    @property
    def _kernel(self) -> tuple[int, ...]:
        return () if self.convolution is None else self.convolution.kernel_size

    def _by_group(self, tensor: Tensor, dim: int) -> Tensor:
        groups = 1 if self.convolution is None else self.convolution.groups
        return torch.unflatten(tensor, dim, (groups, -1))

    def _batched(self, inputs: Tensor) -> Tensor:
        """With exactly one dimension before the channels."""
        behind = 1 + len(self._kernel)
        return inputs[None] if inputs.ndim == behind else inputs.flatten(0, -1 - behind)

    def features(self, inputs: Tensor) -> Tensor:
        """What each output is a linear function of: shape (groups, positions, features)."""
        windows, ndim = self._batched(inputs), len(self._kernel)
        if self.convolution is not None:
            windows = _windows(self.convolution, windows)
        # (N, C, *positions, *kernel) → (groups, N · positions, C/groups · kernel)
        positions, kernel = range(3, 3 + ndim), range(3 + ndim, 3 + 2 * ndim)
        windows = self._by_group(windows, 1).permute(1, 0, *positions, 2, *kernel)
        return windows.flatten(2 + ndim).flatten(1, 1 + ndim)

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight, or a mask of it, as a matrix: shape (groups, outputs, features)."""
        by_group = self._by_group(weight, 0)
        if self.inputs_first:
            by_group = by_group.transpose(1, 2).flip([*range(3, by_group.ndim)])
        return by_group.flatten(2)

    def weight(self, matrix: Tensor) -> Tensor:
        """A matrix in the shape of the weight: undoes :meth:`matrix`."""
        by_group = torch.unflatten(matrix, 2, (-1, *self._kernel))
        if self.inputs_first:
            by_group = by_group.flip([*range(3, by_group.ndim)]).transpose(1, 2)
        return by_group.flatten(0, 1)

    def flat(self, outputs: Tensor) -> Tensor:
        """The layer's outputs, laid out as features are: shape (groups, positions, outputs)."""
        by_group = self._by_group(self._batched(outputs), 1)
        return by_group.permute(1, 0, *range(3, by_group.ndim), 2).flatten(1, -2)

    def chunks(self, inputs: Tensor) -> Iterator[Tensor]:
        """An input in parts whose features need little memory."""
        inputs = self._batched(inputs)
        grown = math.prod(self._kernel)
        if isinstance(self.convolution, _ConvTransposeNd):
            grown *= math.prod(self.convolution.stride)
        sample = max(1, grown * inputs[0].numel()) if len(inputs) else 1
        yield from torch.split(inputs, max(1, _CHUNK // sample))


def _windows(layer: _ConvNd, inputs: Tensor) -> Tensor:
    """What the kernel meets: shape (N, C, *positions, *kernel)."""
    transposed = isinstance(layer, _ConvTransposeNd)
    windows = _spread(layer, inputs) if transposed else _padded(layer, inputs)
    for d, size in enumerate(layer.kernel_size):
        reach = layer.dilation[d] * (size - 1) + 1
        stride = 1 if transposed else layer.stride[d]
        windows = windows.unfold(2 + d, reach, stride)[..., :: layer.dilation[d]]
    return windows


def _padded(layer: _ConvNd, inputs: Tensor) -> Tensor:
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)


def _spread(layer: _ConvNd, inputs: Tensor) -> Tensor:
    """With zeros between the entries and around them."""
    padding: list[int] = []
    for d, size in enumerate(inputs.shape[2:]):
        stride, dim = layer.stride[d], 2 + d
        wide = inputs.new_zeros([*inputs.shape[:dim], size, stride, *inputs.shape[dim + 1 :]])
        wide.select(dim + 1, 0).copy_(inputs)
        inputs = wide.flatten(dim, dim + 1).narrow(dim, 0, (size - 1) * stride + 1)
        assert not isinstance(layer.padding, str), "transposed convolutions take numbers"
        around = layer.dilation[d] * (layer.kernel_size[d] - 1) - layer.padding[d]
        padding[:0] = [around, around + layer.output_padding[d]]
    return F.pad(inputs, padding)


def linear_form(module: nn.Module, dim: int) -> LinearForm | None:
    """The linear form of a layer; None for a class that is not known and has no matrix as its weight.

    Args:
        module: the layer.
        dim: the dimension of its weight that meets the input.
    """
    if isinstance(module, _ConvNd):
        return LinearForm(module, isinstance(module, _ConvTransposeNd))
    if isinstance(module, nn.Linear):
        return LinearForm(None, False)
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 2:
        return LinearForm(None, dim == 0)
    return None


def outputs_of(form: LinearForm, features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A layer's outputs, from its features: shape (groups, positions, outputs)."""
    matrix = form.matrix(weight)
    made = features @ matrix.mT
    return made if bias is None else made + bias.view(matrix.shape[0], 1, -1)


__all__ = ["LinearForm", "linear_form", "outputs_of"]

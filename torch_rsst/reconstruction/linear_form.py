"""Layers as linear maps: input → rows of features, weight → matrix, so that output = features · matrixᵀ."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

_CHUNK = 2**23  # features at a time, 64 MiB in float64


class LinearForm(ABC):
    """A layer as one linear map for each of its groups of channels; one group unless it is a convolution."""

    @abstractmethod
    def features(self, inputs: Tensor) -> Tensor:
        """What each output is a linear function of: shape (groups, positions, features)."""

    @abstractmethod
    def matrix(self, weight: Tensor) -> Tensor:
        """The weight, or a mask of it, as a matrix: shape (groups, outputs, features)."""

    @abstractmethod
    def weight(self, matrix: Tensor) -> Tensor:
        """A matrix in the shape of the weight: undoes :meth:`matrix`."""

    @abstractmethod
    def flat(self, outputs: Tensor) -> Tensor:
        """The layer's outputs, laid out as features are: shape (groups, positions, outputs)."""

    @abstractmethod
    def chunks(self, inputs: Tensor) -> Iterator[Tensor]:
        """An input in parts whose features need little memory."""


@dataclass(frozen=True)
class LinearLayer(LinearForm):
    """``torch.nn.Linear``, and layers that store its weight transposed, as ``Conv1D`` of transformers does.

    Attributes:
        transposed: whether the weight is stored with inputs first.
    """

    transposed: bool = False

    def features(self, inputs: Tensor) -> Tensor:
        """See :class:`LinearForm`."""
        return inputs.flatten(0, -2)[None] if inputs.ndim > 1 else inputs[None, None]

    def matrix(self, weight: Tensor) -> Tensor:
        """See :class:`LinearForm`."""
        return (weight.T if self.transposed else weight)[None]

    def weight(self, matrix: Tensor) -> Tensor:
        """See :class:`LinearForm`."""
        return matrix[0].T if self.transposed else matrix[0]

    def flat(self, outputs: Tensor) -> Tensor:
        """See :class:`LinearForm`."""
        return self.features(outputs)

    def chunks(self, inputs: Tensor) -> Iterator[Tensor]:
        """See :class:`LinearForm`."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        yield from torch.split(rows, max(1, _CHUNK // max(1, rows.shape[1])))


@dataclass(frozen=True)
class Convolution(LinearForm):
    """A convolution of any number of dimensions; features are the entries of its windows.

    A transposed convolution is one too: over its input with zeros between the entries, with its kernel
    flipped.

    Attributes:
        module: the layer.
    """

    module: _ConvNd

    @property
    def _transposed(self) -> bool:
        return isinstance(self.module, _ConvTransposeNd)

    def features(self, inputs: Tensor) -> Tensor:
        """See :class:`LinearForm`."""
        layer, ndim = self.module, len(self.module.kernel_size)
        windows = self._batched(inputs)
        windows = self._spread(windows) if self._transposed else self._padded(windows)
        for d in range(ndim):
            reach = layer.dilation[d] * (layer.kernel_size[d] - 1) + 1
            stride = 1 if self._transposed else layer.stride[d]
            windows = windows.unfold(2 + d, reach, stride)[..., :: layer.dilation[d]]
        # (N, C, *positions, *kernel) → (groups, N · positions, C/groups · kernel)
        windows = torch.unflatten(windows, 1, (layer.groups, -1))
        positions, kernel = range(3, 3 + ndim), range(3 + ndim, 3 + 2 * ndim)
        windows = windows.permute(1, 0, *positions, 2, *kernel)
        return windows.flatten(2 + ndim).flatten(1, 1 + ndim)

    def _batched(self, inputs: Tensor) -> Tensor:
        return inputs if inputs.ndim == 2 + len(self.module.kernel_size) else inputs[None]

    def _padded(self, inputs: Tensor) -> Tensor:
        layer = self.module
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        return F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)

    def _spread(self, inputs: Tensor) -> Tensor:
        """With zeros between the entries and around them."""
        layer = self.module
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

    def matrix(self, weight: Tensor) -> Tensor:
        """See :class:`LinearForm`."""
        by_group = torch.unflatten(weight, 0, (self.module.groups, -1))
        if self._transposed:
            by_group = by_group.transpose(1, 2).flip(*range(3, by_group.ndim))
        return by_group.flatten(2)

    def weight(self, matrix: Tensor) -> Tensor:
        """See :class:`LinearForm`."""
        layer = self.module
        kernel = (layer.in_channels // layer.groups, *layer.kernel_size)
        by_group = torch.unflatten(matrix, 2, kernel)
        if self._transposed:
            by_group = by_group.flip(*range(3, by_group.ndim)).transpose(1, 2)
        return by_group.flatten(0, 1)

    def flat(self, outputs: Tensor) -> Tensor:
        """See :class:`LinearForm`."""
        by_group = torch.unflatten(self._batched(outputs), 1, (self.module.groups, -1))
        return by_group.permute(1, 0, *range(3, by_group.ndim), 2).flatten(1, -2)

    def chunks(self, inputs: Tensor) -> Iterator[Tensor]:
        """See :class:`LinearForm`."""
        inputs = self._batched(inputs)
        grown = math.prod(self.module.kernel_size)
        if self._transposed:
            grown *= math.prod(self.module.stride)
        sample = max(1, grown * inputs[0].numel()) if len(inputs) else 1
        yield from torch.split(inputs, max(1, _CHUNK // sample))


def linear_form(module: nn.Module, dim: int) -> LinearForm | None:
    """The linear form of a layer; None for a class that is not known and has no matrix as its weight.

    Args:
        module: the layer.
        dim: the dimension of its weight that meets the input.
    """
    if isinstance(module, _ConvNd):
        return Convolution(module)
    if isinstance(module, nn.Linear):
        return LinearLayer()
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 2:
        return LinearLayer(transposed=dim == 0)
    return None


def outputs_of(form: LinearForm, features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A layer's outputs, from its features: shape (groups, positions, outputs)."""
    matrix = form.matrix(weight)
    made = features @ matrix.mT
    return made if bias is None else made + bias.view(matrix.shape[0], 1, -1)


__all__ = ["Convolution", "LinearForm", "LinearLayer", "linear_form", "outputs_of"]

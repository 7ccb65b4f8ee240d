"""What is left of a layer without units."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class BiasOnly(nn.Module):
    """What a layer computes once all of its units are gone: the bias of its output layer.

    Example:
        >>> layer = BiasOnly(torch.nn.Linear(0, 2))
        >>> layer(torch.ones(3, 5)).shape
        torch.Size([3, 2])

    Args:
        output: the layer's output layer; its bias is kept, not copied.
    """

    def __init__(self, output: nn.Linear) -> None:
        super().__init__()
        self.out_features = output.out_features
        self.bias = output.bias
        weight = output.weight
        self.register_buffer("_like", weight.new_zeros(()), persistent=False)
        self.train(output.training)

    _like: Tensor

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The bias at every position of ``x`` (…, features); whatever else is passed is not needed."""
        shape = (*x.shape[:-1], self.out_features)
        out = torch.zeros(shape, dtype=self._like.dtype, device=self._like.device)
        return out if self.bias is None else out + self.bias

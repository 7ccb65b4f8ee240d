"""What is left of an attention without heads whose outputs are fewer than its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torch_rsst.discovery.emptied import keep_bias


class BiasOnlyToken(nn.Module):
    """What an attention of one token to all others computes once it has no heads.

    Example:
        >>> layer = BiasOnlyToken(torch.nn.Linear(4, 2))
        >>> layer(torch.ones(3, 5, 6)).shape
        torch.Size([3, 1, 2])

    Args:
        output: the attention's output layer; its bias is kept, not copied.
    """

    def __init__(self, output: nn.Module) -> None:
        super().__init__()
        assert isinstance(output, nn.Linear)
        self.out_features = output.out_features
        keep_bias(self, output)
        like = output.weight.new_zeros(())
        self.register_buffer("_like", like, persistent=False)
        self.train(output.training)

    _like: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The bias for every item of the batch; whatever else is passed is not needed."""
        shape = (x.shape[0], 1, self.out_features)
        out = torch.zeros(shape, dtype=self._like.dtype, device=self._like.device)
        return out if self.bias is None else out + self.bias

"""What is compared: a vision transformer's linear layers, pruned by different hands."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import torch_rsst
from torch_rsst.selection.topk import lowest

AMOUNT = 0.2
# Width and blocks of DeiT-Ti, ViT-S, ViT-B and ViT-L: how many weights their blocks have.
SHAPES = {"5.3M": (192, 12), "21M": (384, 12), "85M": (768, 12), "302M": (1024, 24)}


def layers_of(size: str, device: torch.device) -> nn.ModuleList:
    """The linear layers of all blocks, the same weights every time."""
    width, blocks = SHAPES[size]
    shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    torch.manual_seed(0)
    with device:
        return nn.ModuleList(
            nn.Linear(n_in, n_out, bias=False) for _ in range(blocks) for n_in, n_out in shapes
        )


def stock(layers: nn.ModuleList) -> None:
    """PyTorch's own global pruning."""
    parameters = [(layer, "weight") for layer in layers]
    prune.global_unstructured(parameters, prune.L1Unstructured, amount=AMOUNT)


def ours(layers: nn.ModuleList) -> None:
    """The same of this library."""
    parameters = [(layer, "weight") for layer in layers]
    torch_rsst.global_unstructured(parameters, torch_rsst.GlobalL1, amount=AMOUNT)


def selection(layers: nn.ModuleList) -> Callable[[], list[Tensor]]:
    """Choosing what goes, without changing anything."""
    weights = [next(layer.parameters()) for layer in layers]
    masks = [next(layer.buffers(), None) for layer in layers]
    alive = sum(
        weight.numel() if mask is None else int(mask.sum(dtype=torch.int64))
        for weight, mask in zip(weights, masks, strict=True)
    )
    return lambda: lowest(weights, round(AMOUNT * alive), among=masks, absolute=True)


def yardstick(layers: nn.ModuleList) -> Callable[[], None]:
    """Multiply weights and masks with all memory at hand: what one pass over a masked model takes."""
    return yardstick_of([next(layer.parameters()) for layer in layers])


def yardstick_of(parameters: Iterable[nn.Parameter]) -> Callable[[], None]:
    """The same of these parameters."""
    weights = [parameter.detach() for parameter in parameters]
    masks, products = ([torch.ones_like(weight) for weight in weights] for _ in range(2))

    def multiply() -> None:
        for weight, mask, product in zip(weights, masks, products, strict=True):
            torch.mul(weight, mask, out=product)

    return multiply

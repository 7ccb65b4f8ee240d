"""A batch of training data → what the model is called with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from torch_rsst.discovery.probe import run_on
from torch_rsst.utils.module_state import undisturbed


def inputs_of(batch: Any) -> Any:
    """The inputs in a batch: keyword arguments of a mapping, else the first of a sequence.

    >>> inputs_of([torch.zeros(4, 8), torch.zeros(4)]).shape
    torch.Size([4, 8])
    """
    if isinstance(batch, Mapping):
        return dict(batch)
    return inputs_of(batch[0]) if isinstance(batch, Sequence) and batch else batch


def moved(inputs: Any, model: nn.Module) -> Any:
    """The same tensors on the device of a model."""
    device = next((p.device for p in model.parameters()), None)
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, inputs)


def run(model: nn.Module, batch: Any) -> Any:
    """The output of a model for a batch of its training data."""
    return run_on(model, moved(inputs_of(batch), model))


def example_batch(loader: Any, model: nn.Module) -> Any:
    """The first samples of a loader's data set as a batch; None where it cannot be indexed.

    Neither the loader's sampler nor random numbers move on.
    """
    dataset, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
    if not (isinstance(dataset, Sized) and hasattr(dataset, "__getitem__") and callable(collate)):
        return None
    with undisturbed(model):
        return collate([dataset[i] for i in range(min(2, len(dataset)))])

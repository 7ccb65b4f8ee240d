"""The receipt of a compaction: what it was made of, what it saves, and how far its outputs are off."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torch_rsst.compaction.cost import count_parameters, measure_cost, measure_latencies
from torch_rsst.discovery.probe import output_error
from torch_rsst.masking.mask_sets import extract_mask
from torch_rsst.masking.parameter_ref import masked_refs
from torch_rsst.masking.removal import remove_all

Receipt = dict[str, Any]
"""What :func:`measure` returns: plain values, as they stand in ``compact.json``."""

PERMANENT, APPLIED = "masks made permanent", "masks applied in each forward pass"
UNNAMED = {"before": PERMANENT, "after": "the model as it was saved"}
"""What was timed for receipts that do not say so."""

_RUNS = 11  # odd: the median is one of them


def measure(small: nn.Module, masked: nn.Module | None, example_inputs: Any) -> Receipt:
    """Compare a compacted model with the masked one that it was made of.

    Args:
        small: compacted.
        masked: before that; None: only ``small`` is measured.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; None: nothing
            is run.

    Returns:
        ``max_error`` and ``largest_output`` over the outputs on the example; ``masks_sha256``, see
        :func:`hash_masks`; ``parameters``, ``multiply_adds``, ``latency_ms`` (the median of runs in
        turns) and ``timed`` (what was timed: before, a copy of ``masked`` with its masks made
        permanent; after, ``small`` as it is) as ``{"before": …, "after": …}``; and ``measured_on``.
        None where it was not measured.
    """
    before: dict[str, Any] = {
        "parameters": None,
        "multiply_adds": None,
        "latency_ms": None,
        "timed": None,
    }
    after: dict[str, Any] = {**before, "parameters": count_parameters(small)}
    error = largest = None
    if masked is not None:
        before["parameters"] = count_parameters(masked)
    if example_inputs is not None:
        models = [small] if masked is None else [small, _made_permanent(masked)]
        seconds = measure_latencies(models, example_inputs, repeats=_RUNS, warmup=2)
        for model, time, numbers in zip(models, seconds, (after, before), strict=False):
            numbers["multiply_adds"] = measure_cost(model, example_inputs).multiply_adds
            numbers["latency_ms"] = round(1e3 * time, 4)
            numbers["timed"] = APPLIED if masked_refs(model.modules()) else PERMANENT
        if masked is not None:
            error, largest = (_finite(v) for v in output_error(masked, small, example_inputs))
    return {
        "max_error": error,
        "largest_output": largest,
        "masks_sha256": None if masked is None else hash_masks(extract_mask(masked)),
        **{key: {"before": before[key], "after": after[key]} for key in after},
        "measured_on": _circumstances(small, example_inputs),
    }


def _made_permanent(masked: nn.Module) -> nn.Module:
    return remove_all(copy.deepcopy(masked), freeze_zeros=False)


def _finite(value: float) -> float | str:
    """A number that JSON knows."""
    return value if math.isfinite(value) else str(value)


def _circumstances(model: nn.Module, example_inputs: Any) -> dict[str, Any]:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    cuda = device.type == "cuda"
    tensors = [leaf for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor)]
    return {
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "inputs": [list(tensor.shape) for tensor in tensors],
    }


def hash_masks(masks: Mapping[str, Tensor]) -> str:
    """The SHA-256 of a mask set: of its names, shapes and entries, whatever their order or device.

    >>> hash_masks({"weight": torch.tensor([True, False])})[:8]
    '4ebbf3d7'
    """
    hasher = hashlib.sha256()
    for name in sorted(masks):
        mask = masks[name]
        hasher.update(f"{name} {tuple(mask.shape)}\n".encode())
        hasher.update(mask.detach().cpu().contiguous().to(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def is_rounding(error: float, scale: float, model: nn.Module) -> bool:
    """Whether outputs up to ``scale`` may differ by ``error`` because sums are rounded."""
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    precision = max((torch.finfo(dtype).eps for dtype in types), default=1e-7)
    return error <= 1e3 * precision * max(scale, 1.0)

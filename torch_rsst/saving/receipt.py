"""The receipt of a compaction: what it was made of, what it saves, and how far its outputs are off."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torch_rsst.compaction.cost import count_parameters, measure_cost, time_in_turns
from torch_rsst.discovery.probe import output_error
from torch_rsst.masking.mask_sets import extract_mask
from torch_rsst.masking.parameter_ref import masked_refs
from torch_rsst.masking.removal import remove_all
from torch_rsst.utils.errors import refuse
from torch_rsst.utils.module_state import deep_copy

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
    keys = ("parameters", "multiply_adds", "latency_ms", "timed")
    numbers: dict[str, dict[str, Any]] = {key: {"before": None, "after": None} for key in keys}
    numbers["parameters"]["after"] = count_parameters(small)
    error = largest = None
    models = {"after": small}
    if masked is not None:
        numbers["parameters"]["before"] = count_parameters(masked)
    if masked is not None and example_inputs is not None:
        models["before"] = remove_all(deep_copy(masked), freeze_zeros=False)
        differ, most = output_error(masked, small, example_inputs)
        if math.isinf(differ) and math.isnan(most):
            remedy = "Pass the one that compact() was called with."
            got = "one with outputs of other shapes"
            refuse(ValueError, "masked", "the model that this one was cut from", got, remedy)
        error, largest = _finite(differ), _finite(most)
    if example_inputs is not None:
        runs = time_in_turns([*models.values()], example_inputs, repeats=_RUNS, warmup=2)
        for (when, model), seconds in zip(models.items(), runs, strict=True):
            adds = measure_cost(model, example_inputs).multiply_adds
            numbers["multiply_adds"][when] = adds
            numbers["latency_ms"][when] = round(1e3 * statistics.median(seconds), 4)
            numbers["timed"][when] = APPLIED if masked_refs(model.modules()) else PERMANENT
    return {
        "max_error": error,
        "largest_output": largest,
        "masks_sha256": None if masked is None else hash_masks(extract_mask(masked)),
        **numbers,
        "measured_on": _circumstances(small, example_inputs),
    }


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
    for name, mask in sorted(masks.items()):
        hasher.update(f"{name} {tuple(mask.shape)}\n".encode())
        hasher.update(mask.detach().cpu().contiguous().to(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()

"""Compact the model of a finished run: what ``torch-rsst compact`` does."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import torch_rsst
from torch_rsst.recipes import digits
from torch_rsst.recipes.config import CompactConfig
from torch_rsst.recipes.page import write_page
from torch_rsst.recipes.run_folder import RunFolder


def compact_run(config: CompactConfig) -> dict[str, Any]:
    """Cut what is gone, compare on the held-out data, measure, and save.

    Returns:
        the receipt, with ``accuracy`` in percent and the number of ``images``.

    Raises:
        OSError, ValueError: for a folder that holds no finished run, an option out of its range, or an
            output folder that holds something else.
        RuntimeError: where the smaller model puts out something else than the masked one.
    """
    run = RunFolder(config.folder)
    results, own = run.read_report(), run.read_config()
    output = run.compact if config.output is None else config.output
    shown = output.resolve() == run.compact.resolve()  # on the run's own page
    records = run.read_metrics() if shown else []
    model = run.read_model()
    groups = torch_rsst.find_groups(model, ("heads", "neurons"))
    images, labels = digits.datasets()[1].tensors
    small = torch_rsst.compact(model, groups, example_inputs=images, round_to=config.round_to)
    accuracy = {
        "before": _accuracy(model, images, labels),
        "after": _accuracy(small, images, labels),
    }
    receipt = torch_rsst.save_compact(
        small,
        output,
        masked=model,
        groups=groups,
        example_inputs=images,
        build=digits.BUILD,
        export=config.export,
        notes={"accuracy": accuracy, "images": len(images)},
    )
    if shown:
        write_page(run, own, results, records, receipt)
    return receipt


def _accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.inference_mode():
        return 100.0 * float((model(images).argmax(1) == labels).double().mean())

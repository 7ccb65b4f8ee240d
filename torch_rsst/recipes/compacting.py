"""``torch-rsst compact``: compact the model of a finished run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import torch_rsst
from torch_rsst.recipes import digits
from torch_rsst.recipes.config import CompactConfig, RunConfig
from torch_rsst.recipes.images import open_images
from torch_rsst.recipes.loading import held_out_loader
from torch_rsst.recipes.models import form_of
from torch_rsst.recipes.report_page import write_page
from torch_rsst.recipes.run_folder import RunFolder
from torch_rsst.recipes.training_text import extras_text, stages_text
from torch_rsst.saving.info import CompactInfo
from torch_rsst.utils.amounts import check_count
from torch_rsst.utils.errors import listing, refuse


def compact_run(config: CompactConfig) -> dict[str, Any]:
    """Cut units that are gone, compare on the held-out data, measure, and save.

    Returns:
        the receipt, with ``accuracy`` in percent and the number of ``images``.

    Raises:
        OSError, ValueError: for a folder that holds no finished run, an option out of its range, an
            output folder that holds something else, or images that do not exist any more.
        RuntimeError: where the outputs of the smaller and of the masked model differ.
    """
    check_count(config.images, "images", at_least=1)
    run = RunFolder(config.folder)
    results, own = run.read_report(), run.read_config()
    output = run.compact if config.output is None else config.output
    shown = output.resolve() == run.compact.resolve()  # on the run's own page
    records = run.read_metrics() if shown else []
    model = run.read_model(results["build"])
    own = own if config.data_dir is None else _moved(own, config)
    form = form_of(own, model, tuple(results["input_size"]))
    loader = _held_out(own, form, results)
    images = _first(loader, config.images)
    groups = torch_rsst.find_groups(model, own.kinds, example_inputs=images[:2])
    keep_masks = config.keep_masks or None
    small = torch_rsst.compact(
        model,
        groups,
        example_inputs=images,
        round_to=config.round_to,
        keep_masks=keep_masks,
    )
    (before, after), seen = _accuracies([model, small], loader)
    measured = f"Accuracy is in percent, on {seen:,} held-out images."
    receipt = torch_rsst.save_compact(
        small,
        output,
        masked=model,
        groups=groups,
        example_inputs=images,
        build=results["build"],
        export=config.export,
        onnx=config.onnx,
        info=CompactInfo.of(
            form,
            classes=_names(own, results["classes"]),
            metrics={"accuracy": {"dense": results["dense_accuracy"], "compacted": after}},
            training=" ".join([stages_text(own), *extras_text(own, results.get("plan")), measured]),
        ),
        keep_masks=keep_masks,
        notes={"accuracy": {"before": before, "after": after}, "images": len(images)},
    )
    if shown:
        write_page(run, own, results, records, receipt)
    return receipt


def _moved(own: RunConfig, config: CompactConfig) -> RunConfig:
    # With the data set by its name: "auto" means a folder once there is data_dir.
    moved = replace(own, dataset=own.source, data_dir=config.data_dir)
    moved.check()
    return moved


def _held_out(
    config: RunConfig, form: Mapping[str, Any], results: Mapping[str, Any]
) -> DataLoader[Any]:
    images = open_images(config, processes=1)
    if images.labels != results["classes"]:
        expected = f"the classes of the model: {_classes(results['classes'])}"
        remedy = "Pass --data-dir with the images of the run."
        got = _classes(images.labels)
        refuse(ValueError, "images", expected, got, remedy)
    return held_out_loader(config, images.prepared(config, form))


def _names(config: RunConfig, labels: list[str] | int) -> Sequence[str]:
    """The names of the classes, where they are known."""
    if isinstance(labels, list):
        return labels
    return digits.NAMES if config.source == "digits" else ()


def _classes(labels: list[str] | int) -> str:
    return listing(labels) if isinstance(labels, list) else f"{labels} of them"


def _first(batches: Iterable[tuple[Tensor, Tensor]], count: int) -> Tensor:
    """The first held-out images."""
    found: list[Tensor] = []
    for images, _ in batches:
        found.append(images[: count - sum(map(len, found))])
        if sum(map(len, found)) == count:
            break
    return torch.cat(found)


def _accuracies(
    models: list[nn.Module], batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[list[float], int]:
    """The accuracy of each model in percent, on the same batches, and the number of their images."""
    right, seen = torch.zeros(len(models), dtype=torch.float64), 0
    with torch.inference_mode():
        for images, labels in batches:
            seen += len(labels)
            right += torch.tensor(
                [int((model(images).argmax(1) == labels).sum()) for model in models]
            )
    return (100.0 * right / seen).tolist(), seen

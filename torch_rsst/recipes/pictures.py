"""The pictures of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import nn

from torch_rsst import plot
from torch_rsst.groups.groups import Groups
from torch_rsst.masking.mask_sets import extract_mask
from torch_rsst.recipes.config import RunConfig
from torch_rsst.recipes.run_folder import RunFolder
from torch_rsst.report.sparsity import SparsityReport
from torch_rsst.utils.files import write_atomically


def draw_all(
    folder: RunFolder,
    config: RunConfig,
    records: Sequence[dict[str, Any]],
    report: SparsityReport,
    model: nn.Module,
    groups: Groups,
    steps_per_round: int,
) -> None:
    """Draw accuracy and sparsity, the map of one kind of units, λ, and one layer's mask."""
    folder.pictures.mkdir(exist_ok=True)
    figures = {
        "accuracy_and_sparsity": plot.history(records, final=report),
        report.kinds[0]: plot.head_map(report, kind=report.kinds[0]),
        "mask": _first_layer(model, groups),
    }
    if config.method == "rsst":
        figures["strength"] = plot.schedule(
            config.schedule,
            steps=steps_per_round,
            rounds=config.rounds,
            strength=config.strength,
            shrink_to=config.shrink_to,
        )
    for name, figure in figures.items():
        _save(figure, folder.pictures / f"{name}.png")


def _first_layer(model: nn.Module, groups: Groups) -> Figure:
    masks = extract_mask(model)
    layer, parameter = next(
        (layer, member.parameter)
        for layer in groups.layers
        for member in layer.ranked
        if member.parameter in masks
    )
    return plot.mask(masks[parameter], layer, parameter)


def _save(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))

"""The pictures of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import nn

from torch_rsst import plot
from torch_rsst.files import write_atomically
from torch_rsst.groups import Groups
from torch_rsst.masks import extract_mask
from torch_rsst.recipes.config import RunConfig
from torch_rsst.recipes.run_folder import RunFolder
from torch_rsst.report import SparsityReport


def draw_all(
    folder: RunFolder,
    config: RunConfig,
    records: Sequence[dict[str, Any]],
    report: SparsityReport,
    model: nn.Module,
    groups: Groups,
    steps_per_round: int,
) -> None:
    """Draw accuracy and sparsity, the maps of heads and neurons, λ, and one layer's mask."""
    folder.pictures.mkdir(exist_ok=True)
    figures = {
        "accuracy_and_sparsity": plot.history(records, final=report),
        "heads": plot.head_map(report),
        "mask": _first_attention(model, groups),
    }
    if config.method == "rsst":
        figures["strength"] = plot.schedule(
            config.schedule, steps=steps_per_round, rounds=config.rounds, strength=config.strength
        )
    for name, figure in figures.items():
        _save(figure, folder.pictures / f"{name}.png")


def _first_attention(model: nn.Module, groups: Groups) -> Figure:
    layer = groups.of_kind("heads").layers[0]
    parameter = layer.ranked[0].parameter
    return plot.mask(extract_mask(model)[parameter], layer, parameter)


def _save(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))

"""Draw the picture of the landing page: ``python docs/idea.py`` writes docs/_static/idea.svg."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor, nn

import torch_rsst

ROWS, COLUMNS, HEADS = 12, 10, 4
WHITE, ALIVE, PENALIZED = "#f4f4f6", "#2b6cb0", "#dd4b39"


def masks() -> tuple[Tensor, Tensor, Tensor]:
    """A weight, its mask after global magnitude pruning, and the refill mask for half of its heads."""
    torch.manual_seed(3)
    layer = nn.Linear(COLUMNS, ROWS, bias=False)
    with torch.no_grad():
        layer.weight.view(HEADS, -1)[[1, 2]] *= 0.6
    groups = torch_rsst.Groups(
        (torch_rsst.head_layer("weight", rows=ROWS, num_heads=HEADS, projections=1),)
    )
    torch_rsst.global_unstructured([(layer, "weight")], torch_rsst.GlobalL1, amount=0.5)
    current = torch_rsst.extract_mask(layer)["weight"]
    refill = torch_rsst.regroup(layer, groups, amount=0.5)["weight"]
    return layer.weight_orig.detach(), current, refill


def draw() -> Figure:
    """Five panels from left to right, with what leads from each to the next."""
    weight, current, refill = masks()
    figure = Figure(figsize=(11, 3.6))
    panels = figure.subplots(1, 5)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.92, bottom=0.16, wspace=0.08)
    shares = weight.abs() / weight.abs().max()
    titles = (
        "dense weights",
        "small weights masked",
        "regrouped to heads",
        "shrunk, or masked",
        "smaller layer",
    )
    notes = (
        "one attention layer,\n4 heads of 3 rows",
        "single weights: the model\ngets no faster",
        "heads that lost most go,\nothers come back whole",
        "RSST shrinks these while you\ntrain; Refill masks them at once",
        "half the rows: less memory,\nless work",
    )
    flat = ListedColormap([WHITE, ALIVE, PENALIZED])
    shown: tuple[Any, ...] = (shares, current, refill, refill + 2 * (~refill).int(), None)
    for panel, title, note, image in zip(panels, titles, notes, shown, strict=True):
        if image is None:
            image = torch.ones(ROWS // 2, COLUMNS)
        if image.is_floating_point() and title == titles[0]:
            panel.imshow(image, cmap="Blues", vmin=-0.1, vmax=1.1)
        else:
            panel.imshow(image, cmap=flat, vmin=0, vmax=2)
        for edge in range(0, len(image) + 1, ROWS // HEADS):
            panel.axhline(edge - 0.5, color="white", linewidth=2.5)
        panel.set_xlim(-0.5, COLUMNS - 0.5)
        panel.set_ylim(ROWS - 0.5, -0.5)
        panel.set_axis_off()
        panel.set_title(title, fontsize=12, color="#222222")
        panel.text(
            COLUMNS / 2 - 0.5, ROWS + 0.1, note, ha="center", va="top", fontsize=10, color="#555555"
        )
    return figure


if __name__ == "__main__":
    target = Path(__file__).parent / "_static" / "idea.svg"
    draw().savefig(target, facecolor="white")

"""Figures from a report, a schedule, a mask or the records of a run. matplotlib is imported only here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from torch_rsst.groups import GroupLayer
from torch_rsst.report import SparsityReport
from torch_rsst.schedules import Schedule, resolve_schedule

_ALIVE = "viridis"
_KIND_COLORS = {"heads": "tab:blue", "neurons": "tab:orange", "channels": "tab:green"}


def head_map(report: SparsityReport, *, kind: str = "heads") -> Figure:
    """Layers × units: the share of each unit's ranked entries that is alive.

    Example:
        >>> figure = torch_rsst.plot.head_map(report)  # doctest: +SKIP
        >>> figure.savefig("heads.png")  # doctest: +SKIP

    Args:
        report: from :func:`torch_rsst.sparsity_report`.
        kind: the units to show.

    Raises:
        ValueError: where the report has no unit of the kind.
    """
    layers = [layer for layer in report.layers if layer.kind == kind]
    if not layers:
        raise ValueError(f"the report has no {kind}; it has {', '.join(report.kinds) or 'nothing'}")
    width = max(layer.units for layer in layers)
    shares = np.full((len(layers), width), np.nan)
    for row, layer in enumerate(layers):
        shares[row, : layer.units] = layer.alive_share
    figure = Figure(
        figsize=(2.5 + 0.6 * min(width, 24), 1.6 + 0.45 * len(layers)), layout="constrained"
    )
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap=_ALIVE, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(layers)), [layer.name or "(model)" for layer in layers])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(kind.removesuffix("s"))
    axes.set_title(f"{report.gone(kind)} of {report.units(kind)} {kind} gone")
    if width <= 24:
        _annotate(axes, shares)
    figure.colorbar(image, ax=axes, label="alive share", format=PercentFormatter(1.0))
    return figure


def _annotate(axes: Axes, shares: np.ndarray[Any, np.dtype[np.float64]]) -> None:
    for (row, column), share in np.ndenumerate(shares):
        if not np.isnan(share):
            text = "gone" if share == 0 else f"{share:.0%}"
            color = "black" if share > 0.6 else "white"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)


def schedule(
    schedule: str | Schedule, *, steps: int, rounds: int = 1, strength: float = 0.5
) -> Figure:
    """λ over the optimizer steps of all rounds.

    Example:
        >>> torch_rsst.plot.schedule("linear", steps=100).axes[0].get_ylabel()
        'strength λ'

    Args:
        schedule: a name or a callable t → λ.
        steps: optimizer steps of a round.
        rounds: how many rounds, each starting anew.
        strength: of a named schedule.
    """
    curve = resolve_schedule(schedule, strength)
    strengths = [curve(step / steps) for step in range(1, steps + 1)] * rounds
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(range(1, len(strengths) + 1), strengths)
    for boundary in range(1, rounds):
        axes.axvline(boundary * steps, color="0.8", linewidth=0.8, zorder=0)
    axes.set_xlabel("optimizer step" + (" (lines: rounds)" if rounds > 1 else ""))
    axes.set_ylabel("strength λ")
    axes.set_ylim(bottom=0)
    axes.set_title(f"Penalty: {curve}")
    return figure


def mask(mask: Tensor, layer: GroupLayer, parameter: str, *, max_rows: int = 4096) -> Figure:
    """One mask, alive entries dark, with its units outlined; units that are gone in red.

    Example:
        >>> layer = torch_rsst.head_layer("weight", rows=8, num_heads=2, projections=1)
        >>> figure = torch_rsst.plot.mask(torch.ones(8, 4), layer, "weight")
        >>> figure.axes[0].get_title()
        'weight: 0 of 2 heads gone, 100% alive'

    Args:
        mask: a mask of two or more dimensions, bool or 0/1; further ones are flattened.
        layer: the units that share it.
        parameter: its dense name.
        max_rows: larger masks are thinned out for drawing.

    Raises:
        ValueError: where the layer has no such member, or the mask does not fit it.
    """
    member = next((m for m in layer.members if m.parameter == parameter), None)
    if member is None:
        raise ValueError(
            f"{layer} has no member {parameter!r}; it has {[m.parameter for m in layer.members]}"
        )
    if mask.ndim < 2 or mask.shape[member.dim] != member.unit_of.numel():
        raise ValueError(
            f"mask of {parameter!r}: expected {member.unit_of.numel()} entries along dim {member.dim}, "
            f"got shape {tuple(mask.shape)}"
        )
    alive = (mask != 0).cpu()
    counts = member.sum_per_unit(alive, layer.units)
    image = alive.flatten(1).numpy()
    step = max(1, max(image.shape) // max_rows)
    height, width = image.shape
    figure = Figure(figsize=_figure_size(height, width), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(
        image[::step, ::step], cmap="Greys", vmin=0, vmax=1.6, aspect="auto",
        interpolation="nearest", extent=(0, width, height, 0),
    )  # fmt: skip
    _outline(axes, member.unit_of.tolist(), member.dim, (height, width), (counts == 0).tolist())
    gone = int((counts == 0).sum())
    axes.set_title(
        f"{parameter}: {gone} of {layer.units} {layer.kind} gone, {alive.float().mean():.0%} alive"
    )
    axes.set_xlabel("input")
    axes.set_ylabel("output")
    return figure


def _figure_size(height: int, width: int) -> tuple[float, float]:
    ratio = min(max(height / width, 0.4), 2.0)
    return 5.0, 1.0 + 4.0 * ratio


def _outline(
    axes: Axes, unit_of: Sequence[int], dim: int, shape: tuple[int, int], gone: Sequence[bool]
) -> None:
    """A frame around each run of slices of one unit; thousands of units would only blacken it."""
    if len(gone) > 64:
        return
    height, width = shape
    starts = [0, *(i for i in range(1, len(unit_of)) if unit_of[i] != unit_of[i - 1]), len(unit_of)]
    frames: dict[bool, list[list[tuple[float, float]]]] = {False: [], True: []}
    for first, last in pairwise(starts):
        if (unit := unit_of[first]) < 0:
            continue
        top, bottom, left, right = (first, last, 0, width) if dim == 0 else (0, height, first, last)
        frame = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
        frames[gone[unit]].append([(float(x), float(y)) for x, y in frame])
    for is_gone, color in ((False, "tab:blue"), (True, "tab:red")):
        axes.add_collection(
            LineCollection(frames[is_gone], colors=color, linewidths=1.5, clip_on=False)
        )


def history(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy over epochs, and below it the sparsity after each round.

    Example:
        >>> figure = torch_rsst.plot.history(records)  # doctest: +SKIP

    Args:
        records: as in a run's ``metrics.jsonl``: ``"event": "epoch"`` with ``stage``, ``epoch`` and
            ``accuracy`` in percent; ``"event": "round"`` with ``element_sparsity`` as a fraction.
            After a round ``share_to_go`` maps kinds of units to the share that is meant to go.
    """
    epochs = [record for record in records if record["event"] == "epoch"]
    rounds = [record for record in records if record["event"] == "round"]
    figure = Figure(figsize=(7.0, 5.0), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.plot([r["epoch"] + 1 for r in epochs], [r["accuracy"] for r in epochs], color="tab:blue")
    top.set_ylabel("held-out accuracy (%)")
    top.set_title("Accuracy and sparsity by round")
    ends = _round_ends(epochs)
    places = [ends[r["round"]] for r in rounds]
    bottom.plot(
        places, [r["element_sparsity"] for r in rounds], "o-", color="black", label="masked or 0"
    )
    for kind in dict.fromkeys(k for r in rounds for k in r["share_gone"]):
        color = _KIND_COLORS.get(kind)
        bottom.plot(
            places, [r["share_gone"][kind] for r in rounds], "s-", color=color, label=f"{kind} gone"
        )
        bottom.plot(
            places,
            [r["share_to_go"][kind] for r in rounds],
            "x:",
            color=color,
            label=f"{kind} meant to go",
        )
    bottom.set_ylim(-0.03, 1.03)
    bottom.yaxis.set_major_formatter(PercentFormatter(1.0))
    bottom.set_xlabel("epoch (lines: ends of rounds)")
    bottom.set_ylabel("sparsity")
    bottom.legend(loc="upper left", fontsize=8)
    for axes in (top, bottom):
        for end in places:
            axes.axvline(end, color="0.85", linewidth=0.8, zorder=0)
    return figure


def _round_ends(epochs: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Round → the number of epochs made when it ended."""
    return {
        int(record["stage"].removeprefix("round ")): record["epoch"] + 1
        for record in epochs
        if record["stage"].startswith("round ")
    }

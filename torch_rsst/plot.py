"""Figures from a report, a schedule, a mask or the records of a run. matplotlib is imported only here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from torch_rsst.groups.groups import GroupLayer
from torch_rsst.penalty.penalty_arguments import SHRINK_TO, Penalty
from torch_rsst.report.sparsity import SparsityReport
from torch_rsst.schedules import Schedule, name_of

_ALIVE = "viridis"
_STAYS, _GONE = "tab:blue", "tab:red"
_MOST_FRAMES = 40  # of one picture: more lie on top of each other
_MOST_NUMBERS = 24  # of one row
_KIND_COLORS = {
    "heads": "tab:blue",
    "neurons": "tab:orange",
    "channels": "tab:green",
    "blocks": "tab:red",
}


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
    across = 2.5 + 0.6 * width if width <= _MOST_NUMBERS else 9.0
    figure = Figure(figsize=(across, 1.6 + 0.45 * len(layers)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap=_ALIVE, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(layers)), [layer.name or "(model)" for layer in layers])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(kind.removesuffix("s"))
    axes.set_title(f"{report.gone(kind)} of {report.units(kind)} {kind} gone")
    if width <= _MOST_NUMBERS:
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
    schedule: str | Schedule,
    *,
    steps: int,
    rounds: int = 1,
    strength: float | None = None,
    shrink_to: float | None = None,
) -> Figure:
    """λ over the optimizer steps of all rounds.

    Example:
        >>> torch_rsst.plot.schedule("linear", steps=100).axes[0].get_ylabel()
        'strength λ'

    Args:
        schedule: a name or a callable t → λ.
        steps: optimizer steps of a round.
        rounds: how many rounds, each starting anew.
        strength: of a named schedule, instead of ``shrink_to``.
        shrink_to: what the penalty leaves of the weights over a round, 0.01 by default; see
            :class:`torch_rsst.RegularizedPruner`.
    """
    penalty = Penalty(schedule, strength, SHRINK_TO if shrink_to is None else shrink_to)
    curve = penalty.schedule_of(steps)
    strengths = [curve(step / steps) for step in range(1, steps + 1)]
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for first in range(
        1, rounds * steps, steps
    ):  # a line for each: the fall between them is no value
        axes.plot(range(first, first + steps), strengths, color="C0")
    for boundary in range(1, rounds):
        axes.axvline(boundary * steps, color="0.8", linewidth=0.8, zorder=0)
    axes.set_xlabel("optimizer step" + (" (lines: rounds)" if rounds > 1 else ""))
    axes.set_ylabel("strength λ")
    axes.set_ylim(bottom=0)
    named = "" if penalty.strength is None else f", strength {penalty.strength:g}"
    if penalty.shrink_to is not None:
        named = f", shrinks to {penalty.shrink_to:.3g}"
    axes.set_title(f"Penalty: {name_of(schedule)}{named}")
    return figure


def mask(mask: Tensor, layer: GroupLayer, parameter: str, *, max_rows: int = 4096) -> Figure:
    r"""One mask, alive entries dark, with its units outlined; units that are gone in red.

    Example:
        >>> layer = torch_rsst.head_layer("weight", rows=8, num_heads=2, projections=1)
        >>> figure = torch_rsst.plot.mask(torch.ones(8, 4), layer, "weight")
        >>> figure.axes[0].get_title()
        'weight\n0 of 2 heads gone, 100% alive'

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
    if mask.ndim < 2 or not member.fits(mask.shape):
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
    dead = (counts == 0).tolist()
    if (
        member.unit_of.ndim == 1
    ):  # units of stacked weights have no place of their own in the picture
        _outline(axes, member.unit_of.tolist(), member.dim, (height, width), layer, dead)
    share = f"{alive.float().mean():.0%} alive"
    axes.set_title(f"{parameter}\n{sum(dead)} of {layer.units} {layer.kind} gone, {share}")
    axes.set_xlabel("input", labelpad=4 if member.dim == 0 else 40)
    axes.set_ylabel("output")
    return figure


def _figure_size(height: int, width: int) -> tuple[float, float]:
    ratio = min(max(height / width, 0.4), 2.0)
    return 5.0, 1.0 + 4.0 * ratio


def _outline(
    axes: Axes,
    unit_of: Sequence[int],
    dim: int,
    shape: tuple[int, int],
    layer: GroupLayer,
    gone: Sequence[bool],
) -> None:
    """A labeled frame around each run of slices of one unit; hundreds would only blacken it."""
    starts = [0, *(i for i in range(1, len(unit_of)) if unit_of[i] != unit_of[i - 1]), len(unit_of)]
    runs = [(a, b, unit_of[a]) for a, b in pairwise(starts) if unit_of[a] >= 0]
    if len(runs) > _MOST_FRAMES:
        return
    height, width = shape
    for first, last, unit in sorted(runs, key=lambda run: gone[run[2]]):  # the red ones on top
        left, top = (0, first) if dim == 0 else (first, 0)
        across, down = (width, last - first) if dim == 0 else (last - first, height)
        color = _GONE if gone[unit] else _STAYS
        axes.add_patch(
            Rectangle(
                (left, top), across, down, fill=False, edgecolor=color, linewidth=1.5, clip_on=False
            )
        )
        label = f"{layer.kind.removesuffix('s')} {unit}"
        place = (1.01, (first + last) / 2) if dim == 0 else ((first + last) / 2, -0.02)
        axes.annotate(
            label, place, xycoords=("axes fraction", "data") if dim == 0 else ("data", "axes fraction"),
            color=color, fontsize=8, va="center" if dim == 0 else "top", ha="left" if dim == 0 else "center",
            rotation=0 if dim == 0 else 90, annotation_clip=False,
        )  # fmt: skip


def history(records: Sequence[Mapping[str, Any]], *, final: SparsityReport | None = None) -> Figure:
    """Accuracy over epochs, and below it the sparsity after each round and after the cut.

    Example:
        >>> figure = torch_rsst.plot.history(records, final=report)  # doctest: +SKIP

    Args:
        records: as in a run's ``metrics.jsonl``: ``"event": "epoch"`` with ``stage``, ``epoch`` and
            ``accuracy`` in percent; ``"event": "round"`` with ``round``, ``element_sparsity`` and, for
            each kind of unit, ``share_gone`` and ``share_to_go`` as fractions.
        final: the report after the cut.
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
    for place, kind in enumerate(dict.fromkeys(k for r in rounds for k in r["share_gone"])):
        # Hollow and ever smaller, so that kinds at the same share are all seen.
        look = {"color": _KIND_COLORS.get(kind), "markersize": 10 - 3 * place, "mfc": "none"}
        gone = [r["share_gone"][kind] for r in rounds] + (
            [final.unit_sparsity(kind)] if final else []
        )
        to_go = [r["share_to_go"][kind] for r in rounds]
        bottom.plot(_with_cut(places, gone), gone, "s-", label=f"{kind} gone", **look)
        bottom.plot(places, to_go, "x:", label=f"{kind} meant to go", **look)
    masked = [r["element_sparsity"] for r in rounds] + ([final.element_sparsity] if final else [])
    bottom.plot(_with_cut(places, masked), masked, "o-", color="black", label="weights masked or 0")
    bottom.set_ylim(-0.03, 1.03)
    bottom.yaxis.set_major_formatter(PercentFormatter(1.0))
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.set_xlabel("epoch (lines: ends of rounds; the last with the cut)")
    bottom.set_ylabel("sparsity")
    bottom.legend(loc="upper left", fontsize=8)
    for axes in (top, bottom):
        for end in places:
            axes.axvline(end, color="0.85", linewidth=0.8, zorder=0)
    return figure


def _with_cut(places: Sequence[int], values: Sequence[float]) -> list[int]:
    """The epochs of the values: one at the end of each round, and the cut where the last one ends."""
    return [*places, *[places[-1]] * (len(values) - len(places))] if places else []


def _round_ends(epochs: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Round → the number of epochs made when it ended."""
    return {
        int(record["stage"].removeprefix("round ")): record["epoch"] + 1
        for record in epochs
        if record["stage"].startswith("round ")
    }


def comparison(points: Mapping[str, tuple[float, float, float]], *, dense: float) -> Figure:
    """Accuracy of smaller models against their size and against their time.

    Example:
        >>> figure = torch_rsst.plot.comparison({"half": (97.1, 0.55, 0.62)}, dense=97.5)
        >>> [axes.get_xlabel() for axes in figure.axes]
        ['parameters, of the dense model', 'time, of the dense model']

    Args:
        points: name → accuracy in percent, parameters and time as shares of the dense model's.
        dense: accuracy of the dense model, a dashed line.
    """
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for place, (axes, what) in enumerate(zip(panels, ("parameters", "time"), strict=True), start=1):
        axes.axhline(dense, color="0.6", linestyle="--", linewidth=1, label="dense")
        for number, (name, values) in enumerate(points.items()):
            axes.plot(values[place], values[0], "o", color=f"C{number % 10}", label=name)
        axes.set_xlabel(f"{what}, of the dense model")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlim(0, 1.05 * max(1.0, *(values[place] for values in points.values())))
        axes.grid(color="0.93")
    panels[0].set_ylabel("held-out accuracy (%)")
    panels[1].legend(fontsize=8)
    return figure

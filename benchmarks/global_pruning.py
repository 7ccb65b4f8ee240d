"""``python -m benchmarks.global_pruning``: tables of time and memory. See README.md beside this file."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.contenders import SHAPES, layers_of, ours, selection, stock, yardstick
from benchmarks.meter import Meter

Size: TypeAlias = Literal["5.3M", "21M", "85M", "302M"]

CALLS = (1, 2, 10)  # those that are reported
MEGA = 1e6


@dataclass(frozen=True)
class Options:
    """Time and peak memory of global pruning, of the first and the tenth call on a model.

    Attributes:
        sizes: how many weights.
        device: where to measure.
        repeats: models to take the median of; one more is used for memory.
        rounds: calls in a row, the memory in use being read after each.
    """

    sizes: tuple[Size, ...] = ("5.3M", "21M", "85M")
    device: str = "cpu"
    repeats: int = 3
    rounds: int = 20


@torch.no_grad()
def main(options: Options) -> None:
    """Print a table per size."""
    console, meter = Console(), Meter(torch.device(options.device))
    console.print(
        f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads; "
        f"median of {options.repeats}"
    )
    for size in options.sizes:
        seconds: dict[tuple[int, str], list[float]] = defaultdict(list)
        for _ in range(options.repeats):
            for key, value in run(meter, size, meter.seconds).items():
                seconds[key].append(value)
        peaks = run(meter, size, meter.peak)
        console.print(table(size, {k: statistics.median(v) for k, v in seconds.items()}, peaks))
        console.print(rounds(meter, size, options.rounds))


def run(
    meter: Meter, size: str, measure: Callable[[Callable[[], Any]], float]
) -> dict[tuple[int, str], float]:
    """What ``measure`` says of each contender at the first and the last call."""
    theirs, mine = layers_of(size, meter.device), layers_of(size, meter.device)
    measured = {}
    for call in range(1, CALLS[-1] + 1):
        for name, prune, layers in (("stock", stock, theirs), ("ours", ours, mine)):
            if name == "ours" and call in CALLS:
                measured[call, "selection"] = measure(selection(mine))
                measured[call, "yardstick"] = measure(yardstick(mine))
            work = partial(prune, layers)
            if call in CALLS:
                measured[call, name] = measure(work)
            else:
                work()
    return measured


def table(
    size: str, seconds: Mapping[tuple[int, str], float], peaks: Mapping[tuple[int, str], float]
) -> Table:
    """A line per call and contender."""
    width, blocks = SHAPES[size]
    weights = 12 * blocks * width**2
    made = Table(title=f"{weights / MEGA:.1f} M weights, {4 * weights / MEGA:.0f} MB")
    for heading in ("call", "what", "ms", "stock takes", "yardsticks", "peak MB", "of weights"):
        made.add_column(heading, justify="left" if heading == "what" else "right")
    for call in CALLS:
        for what in ("stock", "ours", "selection", "yardstick"):
            time, peak = seconds[call, what], peaks[call, what]
            made.add_row(
                str(call),
                what,
                f"{1e3 * time:.1f}",
                f"{seconds[call, 'stock'] / time:.1f} x",
                f"{time / seconds[call, 'yardstick']:.1f}",
                f"{peak / MEGA:.0f}",
                f"{peak / (4 * weights):.2f}",
                end_section=what == "yardstick",
            )
    return made


def rounds(meter: Meter, size: str, count: int) -> str:
    """The memory in use after each of many calls of ours, beyond that after the second."""
    layers = layers_of(size, meter.device)
    held = []
    for _ in range(count):
        ours(layers)
        held.append(meter.held())
    growth = " ".join(f"{(now - held[1]) / MEGA:+.1f}" for now in held[1:])
    return f"MB held after rounds 2 to {count}, beyond round 2: {growth}"


if __name__ == "__main__":
    main(tyro.cli(Options))

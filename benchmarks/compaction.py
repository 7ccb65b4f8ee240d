"""``python -m benchmarks.compaction``: how fast compacted models are. See README.md beside this file."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import torch_rsst
from benchmarks.variants import (
    SUBJECTS,
    Subject,
    built_anew,
    by_torch_pruning,
    equal_shapes,
    masked,
    ours,
    runs,
)
from torch_rsst.compaction.cost import measure_cost, time_in_turns

LEAST_TURNS = 3


@dataclass(frozen=True)
class Options:
    """Latency of dense, masked and compacted models, and of equal shapes by other hands.

    Attributes:
        models: what is compared.
        amounts: the share of heads, neurons or channels that each layer loses.
        batches: images at once.
        modes: as the model is, or through ``torch.compile``.
        device: where to measure.
        dtype: of weights and images.
        repeats: timed runs of each model at most, all in turns.
        seconds: no more turns after about so long, but at least three.
        clock: the time that passes, or what this process works meanwhile: steadier on a shared machine.
        surgery: how often to time finding, regrouping and compacting; 0: not at all.
    """

    models: tuple[Literal["deit-s", "vit-b", "swin-t", "resnet-50"], ...] = (
        "deit-s",
        "vit-b",
        "swin-t",
        "resnet-50",
    )
    amounts: tuple[float, ...] = (0.5, 0.75)
    batches: tuple[int, ...] = (1, 32)
    modes: tuple[Literal["eager", "compiled"], ...] = ("eager",)
    device: str = "cpu"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    repeats: int = 15
    seconds: float = 60.0
    clock: Literal["wall", "cpu"] = "wall"
    surgery: int = 3


def main(options: Options) -> None:
    """Print a table of latencies, and one of what making the small models takes."""
    warnings.filterwarnings("ignore", module="torch_pruning")
    console = Console(width=118)
    console.print(
        f"torch {torch.__version__}, {options.device}, {options.dtype}, "
        f"{torch.get_num_threads()} threads, {options.clock} time; medians, models in turns"
    )
    for name in options.models:
        table = _empty_table(name)
        notes: list[str] = []
        for amount in options.amounts:
            variants, adds, found = _variants(SUBJECTS[name], amount)
            notes.extend(f"{name}, {amount:.0%}: {note}" for note in found)
            for mode in options.modes:
                _add_rows(table, variants, adds, amount, mode, options)
        console.print(table)
        for note in notes:
            console.print(note)
    if options.surgery:
        console.print(_surgery(options))


def _variants(
    subject: Subject, amount: float
) -> tuple[dict[str, nn.Module], tuple[int, int], list[str]]:
    """The models to compare, the multiply-adds of one image before and after, and what went wrong."""
    dense, image = subject.build(), torch.randn(1, 3, 224, 224)
    groups = subject.groups(dense)
    with_masks = masked(dense, groups, amount)
    small = torch_rsst.compact(with_masks, groups)
    variants = {"dense": dense, "masked": with_masks, "compacted": small}
    adds = (measure_cost(dense, image).multiply_adds, measure_cost(small, image).multiply_adds)
    notes = []

    def add(label: str, build: Callable[[], nn.Module]) -> None:
        try:
            model = build()
            runs(model, image)
        except Exception as error:  # what a rival cannot do is a result
            notes.append(f"{label}: {type(error).__name__}: {str(error).splitlines()[0]}")
            return
        if equal_shapes(model, small):
            variants[label] = model
        else:
            notes.append(f"{label}: its shapes are not those of the compacted model")

    add("built anew", lambda: built_anew(subject, small))
    add("torch-pruning", lambda: by_torch_pruning(subject.build(), image, small))
    return variants, adds, notes


def _empty_table(name: str) -> Table:
    table = Table(title=name)
    for heading in (
        "gone",
        "batch",
        "mode",
        "turns",
        "what",
        "ms",
        "speed-up",
        "of the multiply-adds'",
        "of built anew",
    ):
        table.add_column(heading, justify="left" if heading in ("mode", "what") else "right")
    return table


def _add_rows(
    table: Table,
    variants: Mapping[str, nn.Module],
    adds: tuple[int, int],
    amount: float,
    mode: str,
    options: Options,
) -> None:
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    models = [model.to(device, dtype) for model in variants.values()]
    if mode == "compiled":
        torch._dynamo.reset()
        models = [torch.compile(model) for model in models]  # type: ignore[misc]
    for batch in options.batches:
        images = torch.randn(batch, 3, 224, 224).to(device, dtype)
        seconds = dict(zip(variants, _in_turns(models, images, options), strict=True))
        for label, times in seconds.items():
            faster = _ratio(seconds["dense"], times)
            table.add_row(
                f"{amount:.0%}",
                str(batch),
                mode,
                str(len(times)),
                label,
                f"{1e3 * statistics.median(times):.1f}",
                f"{faster:.2f} x",
                f"{faster / (adds[0] / adds[1]):.1%}" if label not in ("dense", "masked") else "",
                f"{_ratio(times, seconds['built anew']):.1%}" if "built anew" in seconds else "",
                end_section=label == list(seconds)[-1],
            )


def _in_turns(models: list[nn.Module], images: Tensor, options: Options) -> list[list[float]]:
    start = time.perf_counter()
    time_in_turns(models, images, repeats=1, warmup=1)  # compiles too
    time_in_turns(models, images, repeats=1, warmup=0)
    turn = (time.perf_counter() - start) / 3
    if turn > options.seconds:  # compiling is no measure of a turn
        start = time.perf_counter()
        time_in_turns(models, images, repeats=1, warmup=0)
        turn = time.perf_counter() - start
    turns = max(LEAST_TURNS, min(options.repeats, int(options.seconds / turn)))
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    return time_in_turns(models, images, repeats=turns, warmup=0, clock=clock)


def _ratio(one: list[float], other: list[float]) -> float:
    """How many times longer: the median over turns, so that what slows a whole turn cancels."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def _surgery(options: Options) -> Table:
    """What it takes to make a small ViT-B, by our hands and theirs, in turns."""
    subject, image, amount = SUBJECTS["vit-b"], torch.randn(1, 3, 224, 224), 0.5
    small = ours(subject.build(), subject, amount)
    steps: dict[str, list[tuple[float, float]]] = {}

    def timed(label: str, work: Callable[[], object]) -> None:
        start, used = time.perf_counter(), time.process_time()
        work()
        took = (time.perf_counter() - start, time.process_time() - used)
        steps.setdefault(label, []).append(took)

    for _ in range(options.surgery):
        model, rival = subject.build(), subject.build()
        timed("ours", lambda model=model: ours(model, subject, amount))  # type: ignore[misc]
        timed("torch-pruning", lambda rival=rival: by_torch_pruning(rival, image, small))  # type: ignore[misc]
    table = Table(title="find, regroup and compact: vit-b, 50 % of heads and neurons")
    for heading in ("what", "s", "CPU s", "torch-pruning takes"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    theirs = [wall for wall, _ in steps["torch-pruning"]]
    for label, took in steps.items():
        wall, used = ([pair[i] for pair in took] for i in (0, 1))
        table.add_row(
            label,
            f"{statistics.median(wall):.2f}",
            f"{statistics.median(used):.2f}",
            f"{_ratio(theirs, wall):.1f} x",
        )
    return table


if __name__ == "__main__":
    main(tyro.cli(Options))

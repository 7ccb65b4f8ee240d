"""``python -m benchmarks masked``: what masks cost in a pass and in a step. See README.md beside this file."""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, TypeAlias

import timm
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import prune as stock

import torch_rsst
from benchmarks.meter import Meter
from torch_rsst.groups.groups import Groups
from torch_rsst.masking.mask_sets import Masks

Work: TypeAlias = Literal["inference", "step"]

IMAGE = 64
MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit-s": lambda: timm.create_model("vit_small_patch16_224", img_size=IMAGE),
    "resnet-18": lambda: timm.create_model("resnet18"),
}


@dataclass(frozen=True)
class Options:
    """Times of dense, masked and compacted models, in one process, in turns.

    Attributes:
        models: what is compared, on images of 64 pixels.
        batches: images at once.
        work: a pass under ``torch.inference_mode``, and a forward and a backward pass.
        amount: the share of heads, neurons or channels that is masked; all linear layers and convolutions have a mask.
        compile: measure through ``torch.compile``.
        device: where to measure.
        repeats: timed runs of each model, all in turns.
    """

    models: tuple[Literal["vit-s", "resnet-18"], ...] = ("vit-s", "resnet-18")
    batches: tuple[int, ...] = (1, 8, 64)
    work: tuple[Work, ...] = ("inference", "step")
    amount: float = 0.5
    compile: bool = False
    device: str = "cpu"
    repeats: int = 20


def main(options: Options) -> None:
    """Print one table for each model."""
    console = Console(width=118)
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else options.device
    console.print(
        f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads, "
        f"{'compiled' if options.compile else 'eager'}; medians of {options.repeats} runs in turns"
    )
    for each in options.models:
        table = Table(title=f"{each}, {IMAGE} pixels")
        for heading in ("work", "batch", "what", "ms", "of dense", "of stock"):
            table.add_column(heading, justify="left" if heading in ("work", "what") else "right")
        for work in options.work:
            for batch in options.batches:
                _add_rows(table, each, work, batch, options)
        console.print(table)


def _add_rows(table: Table, name: str, work: Work, batch: int, options: Options) -> None:
    device = torch.device(options.device)
    images = torch.randn(batch, 3, IMAGE, IMAGE, device=device)
    torch._dynamo.reset()
    with ExitStack() as stack:
        runs: dict[str, Callable[[], object]] = {}
        for label, model in _variants(name, options.amount).items():
            model = model.to(device).train(work == "step")
            if label == "ours, dense_weights":
                if work == "step":
                    continue  # it is for inference
                stack.enter_context(torch_rsst.dense_weights(model))
            called = torch.compile(model) if options.compile else model
            runs[label] = _run(called, images, work)
        seconds = _in_turns(runs, Meter(device), options.repeats)
    for label, times in seconds.items():
        table.add_row(
            work,
            str(batch),
            label,
            f"{1e3 * statistics.median(times):.2f}",
            f"{_ratio(times, seconds['dense']):.3f}",
            f"{_ratio(times, seconds['stock']):.3f}",
            end_section=label == list(seconds)[-1],
        )


def _variants(name: str, amount: float) -> dict[str, nn.Module]:
    """Models with the same weights and, where masked, the same masks."""
    torch.manual_seed(0)
    dense = MODELS[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch_rsst.RSSTWarning)
        groups = torch_rsst.find_groups(dense)
    refill = torch_rsst.regroup(dense, groups, amount=amount)
    masks = {
        f"{path}.weight": refill.get(f"{path}.weight", torch.ones_like(layer.weight).bool())
        for path, layer in dense.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    }
    return {
        "dense": dense,
        "stock": _masked_by_stock(dense, masks),
        "ours": _masked(dense, masks),
        "ours, dense_weights": _masked(dense, masks),
        "ours, compacted": torch_rsst.compact(_masked(dense, refill), groups),
        "same shapes, never masked": _never_masked(dense, refill, groups),
    }


def _masked(dense: nn.Module, masks: Masks) -> nn.Module:
    model = copy.deepcopy(dense)
    torch_rsst.apply_mask(model, masks)
    return model


def _masked_by_stock(dense: nn.Module, masks: Masks) -> nn.Module:
    model = copy.deepcopy(dense)
    for name, mask in masks.items():
        path, _, own = name.rpartition(".")
        stock.custom_from_mask(model.get_submodule(path), own, mask)
    return model


def _never_masked(dense: nn.Module, refill: Masks, groups: Groups) -> nn.Module:
    """Compacted by way of zeros in plain parameters."""
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for name, alive in refill.items():
            model.get_parameter(name).mul_(alive)
    return torch_rsst.compact(model, groups)


def _run(model: Callable[[Tensor], Tensor], images: Tensor, work: Work) -> Callable[[], object]:
    def infer() -> None:
        with torch.inference_mode():
            model(images)

    def step() -> None:
        model(images).square().mean().backward()

    return infer if work == "inference" else step


def _in_turns(
    runs: Mapping[str, Callable[[], object]], meter: Meter, repeats: int, warmup: int = 3
) -> dict[str, list[float]]:
    """The seconds of every timed run; those of one turn came in a row, in alternating order.

    Each is run twice in a row and timed the second time, as in training: the first run after another
    model's asks the system for the memory that the other has returned.
    """
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    labels = list(runs)
    for turn in range(-warmup, repeats):
        for label in labels if turn % 2 else reversed(labels):
            runs[label]()
            took = meter.seconds(runs[label])
            if turn >= 0:
                seconds[label].append(took)
    return seconds


def _ratio(one: list[float], other: list[float]) -> float:
    """How many times longer: the median over turns, so that what slows a whole turn cancels."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


if __name__ == "__main__":
    main(tyro.cli(Options))

"""What is learned: data that is on every machine or made here, a model, and a measure.

A character language model of the standard library's source code, and MNIST-1D (Greydanus and Kobak,
"Scaling down deep learning with MNIST-1D", ICML 2024) with a transformer and with a residual network.
"""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 # as PyTorch calls it
from torch import Tensor, nn

from benchmarks.accuracy.models import LanguageModel, SignalResNet, SignalTransformer

Split = Literal["train", "validation", "test"]
Batch = tuple[Tensor, Tensor]

TOKENS = 64
CHARACTERS = 98  # printable ASCII, tab, newline, and one for all others


@dataclass(frozen=True)
class Task:
    """One data set and the model that learns it.

    Attributes:
        name: how tables call it.
        metric: what ``evaluate`` gives.
        lower_is_better: whether the metric is a loss.
        kinds: of units that are pruned.
        model: a new model; seeded by the caller.
        draw: random training batches without end, from a generator.
        split: all data of a split, as tensors of inputs and targets.
        dense_steps: steps of the dense training.
        learning_rate: of the dense training, at its peak.
    """

    name: str
    metric: str
    lower_is_better: bool
    kinds: tuple[str, ...]
    model: Callable[[], nn.Module]
    draw: Callable[[torch.Generator], Iterator[Batch]]
    split: Callable[[Split], Batch]
    dense_steps: int
    learning_rate: float

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The mean cross entropy of a batch, and the logits it comes from."""
        logits = model(batch[0])
        return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten()), logits

    @property
    def chance(self) -> float:
        """The metric of a guess that knows only how often each target occurs."""
        share = torch.bincount(self.split("train")[1].flatten()).double()
        share = share[share > 0] / share.sum()
        return float(-(share * share.log2()).sum() if self.lower_is_better else 100 * share.max())

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Split) -> float:
        """Bits for each character, or the percentage of right answers, in eval mode."""
        was_training = model.training
        model.eval()
        total = count = 0.0
        for inputs, targets in zip(*(data.split(256) for data in self.split(split)), strict=True):
            logits = model(inputs)
            if self.lower_is_better:
                total += float(
                    F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")
                )
            else:
                total += float((logits.argmax(-1) == targets).sum())
            count += targets.numel()
        model.train(was_training)
        return total / count / math.log(2) if self.lower_is_better else 100 * total / count


@cache
def _sources(split: Split) -> Tensor:
    """The characters of a tenth (validation, test) or of four fifths of the standard library's files.

    Files are dealt out by a hash of their name, so that each split has all parts of the library in it.
    """
    root = Path(sysconfig.get_path("stdlib"))
    place = {8: "validation", 9: "test"}
    text = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages" in name or "/test" in f"/{name}":
            continue
        digit = hashlib.sha256(name.encode()).digest()[0] % 10
        if place.get(digit, "train") == split:
            text.append(path.read_text(encoding="utf-8", errors="replace"))
    codes = torch.frombuffer(
        bytearray("".join(text).encode("ascii", "replace")), dtype=torch.uint8
    ).long()
    known = (codes >= 32) & (codes < 127)
    return torch.where(
        known, codes - 32, torch.where(codes == 10, 95, torch.where(codes == 9, 96, 97))
    )


def _windows(generator: torch.Generator) -> Iterator[Batch]:
    text = _sources("train")
    span = torch.arange(TOKENS)
    while True:
        start = torch.randint(len(text) - TOKENS, (32, 1), generator=generator)
        yield text[start + span], text[start + span + 1]


@cache
def _pages(split: Split) -> Batch:
    """Evenly spaced windows of a split: 1,024, or 2,048 of the test split."""
    text = _sources(split)
    count = 2048 if split == "test" else 1024
    start = torch.linspace(0, len(text) - TOKENS - 1, count).long()[:, None]
    span = torch.arange(TOKENS)
    return text[start + span], text[start + span + 1]


@cache
def _signals() -> dict[Split, Batch]:
    """MNIST-1D: 4,000 signals for training, as in the paper, and 4,000 and 8,000 to validate and test."""
    from mnist1d.data import get_dataset_args, make_dataset

    args = get_dataset_args()
    args.num_samples = 16_000
    made = make_dataset(args)  # shuffled by a seed of its own
    x = torch.from_numpy(made["x"]).float(), torch.from_numpy(made["x_test"]).float()
    y = torch.from_numpy(made["y"]).long(), torch.from_numpy(made["y_test"]).long()
    inputs, targets = torch.cat(x), torch.cat(y)
    ends = {"train": (0, 4_000), "validation": (4_000, 8_000), "test": (8_000, 16_000)}
    return {split: (inputs[a:b], targets[a:b]) for split, (a, b) in ends.items()}  # type: ignore[misc]


def _signal_batches(generator: torch.Generator) -> Iterator[Batch]:
    inputs, targets = _signals()["train"]
    while True:
        for some in torch.randperm(len(targets), generator=generator).split(100):
            yield inputs[some], targets[some]


def _signal_task(
    name: str, kinds: tuple[str, ...], model: Callable[[], nn.Module], lr: float
) -> Task:
    return Task(
        name,
        "accuracy, %",
        False,
        kinds,
        model,
        _signal_batches,
        lambda s: _signals()[s],
        4_000,
        lr,
    )


TASKS = {
    task.name: task
    for task in (
        Task(
            "language",
            "bits per character",
            True,
            ("heads", "neurons"),
            lambda: LanguageModel(CHARACTERS, TOKENS),
            _windows,
            lambda split: _pages(split),
            5_000,
            3e-3,
        ),
        _signal_task("signal-transformer", ("heads", "neurons"), SignalTransformer, 2e-3),
        _signal_task("signal-resnet", ("channels",), SignalResNet, 3e-3),
    )
}
"""Name → task."""

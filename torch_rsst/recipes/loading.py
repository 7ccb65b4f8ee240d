"""Batches in an order that a resumed run repeats, whatever loads them."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import skip_first_batches
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from torch_rsst.errors import message
from torch_rsst.recipes.config import RunConfig
from torch_rsst.recipes.images import Images

Batch = tuple[Tensor, Tensor]

_WORKERS = 4


def seed_everything(*numbers: int) -> None:
    """Seed PyTorch, NumPy and Python by some numbers, such as that of a step."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % (2**32 - 5)  # a prime: no two steps in step
    random.seed(mixed)
    np.random.seed(mixed)
    # torch.manual_seed notes a call for each kind of device that has not started, a millisecond each time.
    torch.default_generator.manual_seed(mixed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(mixed)


class Seeded(Dataset[Any]):
    """A data set whose augmentation depends on seed, epoch and index alone.

    So it is the same for any number of workers and processes, and after a resume.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self._dataset, self._seed, self._epoch = dataset, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Augment differently from now on."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        seed_everything(self._seed, self._epoch, index)
        return self._dataset[index]


class Loaders:
    """The batches of a run: an epoch to train on, and what is held out.

    A batch is shared out over processes, so that it is as large, and an epoch as long, on any number.
    """

    def __init__(self, config: RunConfig, images: Images, accelerator: Accelerator) -> None:
        self._config, self._images, self._accelerator = config, images, accelerator
        self._share = config.batch_size // accelerator.num_processes
        # Readers of streams draw random numbers as they go: not from those of the model.
        self._workers = max(_workers(config), 1) if images.streams else _workers(config)
        self._train: Any = None
        if images.streams:
            images.train.set_loader_cfg(num_workers=self._workers)  # type: ignore[attr-defined]
            self._train = self._loader(images.train, self._share, drop_last=True)
        else:
            loader = self._loader(
                Seeded(images.train, config.seed), config.batch_size, shuffle=True, drop_last=True
            )
            self._train = accelerator.prepare(loader)
        self._held_out = held_out_loader(
            config, images, self._own_part(images.held_out), self._share
        )

    def __len__(self) -> int:
        """Batches of an epoch."""
        if not self._images.streams:
            return len(self._train)
        return len(self._images.train) // self._config.batch_size  # type: ignore[arg-type]

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch on this process's device, from one on."""
        if not self._images.streams:
            self._train.set_epoch(number)  # hidden once batches are skipped
            yield from skip_first_batches(self._train, first) if first else self._train
            return
        self._images.train.set_epoch(number)  # type: ignore[attr-defined]
        seed_everything(self._config.seed, number)  # of which the workers make theirs
        # What comes before is read and left: only so the rest is the same.
        for images, labels in islice(self._train, first, len(self)):
            self._check_labels(labels)
            yield send_to_device((images, labels), self._accelerator.device)

    def held_out(self) -> Iterator[Batch]:
        """What is held out: the share of this process."""
        for images, labels in self._held_out:
            self._check_labels(labels)
            yield send_to_device((images, labels), self._accelerator.device)

    def samples(self, batches: int) -> Iterator[Batch]:
        """Training batches to measure importance on: the share of this process, always the same."""
        if self._images.streams:
            yield from islice(self.epoch(0), batches)
            return
        found: int = len(self._images.train)  # type: ignore[arg-type]
        count = min(batches * self._config.batch_size, found)
        drawn = random.Random(self._config.seed).sample(range(found), count)
        own = drawn[self._accelerator.process_index :: self._accelerator.num_processes]
        seeded = Seeded(self._images.train, self._config.seed)
        for batch in self._loader(Subset(seeded, own), self._share):
            yield send_to_device(batch, self._accelerator.device)

    def _loader(self, dataset: Dataset[Any], size: int, **options: Any) -> DataLoader[Any]:
        return DataLoader(dataset, size, num_workers=self._workers, **options)

    def _own_part(self, dataset: Dataset[Any]) -> Dataset[Any]:
        processes, own = self._accelerator.num_processes, self._accelerator.process_index
        if processes == 1 or isinstance(dataset, IterableDataset):  # which shares out by itself
            return dataset
        return Subset(dataset, range(own, len(dataset), processes))  # type: ignore[arg-type]

    def _check_labels(self, labels: Tensor) -> None:
        highest, classes = int(labels.max()), self._images.classes
        if highest >= classes:
            raise ValueError(
                message(
                    "--num-classes",
                    expected=f"more than {highest}, which is a label in the data",
                    got=classes,
                    remedy=f"Pass --num-classes {highest + 1} or more.",
                )
            )


def held_out_loader(
    config: RunConfig,
    images: Images,
    part: Dataset[Any] | None = None,
    batch_size: int | None = None,
) -> DataLoader[Any]:
    """Batches of what is held out, or of a part of it, on the CPU."""
    dataset, workers = images.held_out if part is None else part, _workers(config)
    if images.streams:
        workers = max(workers, 1)
        dataset.set_loader_cfg(num_workers=workers)  # type: ignore[attr-defined]
    return DataLoader(dataset, batch_size or config.batch_size, num_workers=workers)


def _workers(config: RunConfig) -> int:
    if config.workers is not None:
        return config.workers
    return 0 if config.source == "digits" else min(_WORKERS, os.cpu_count() or 1)


def check_batch_size(config: RunConfig, images: Images, processes: int) -> None:
    """Raise unless batches can be shared out and there are images enough for one step."""

    def refuse(expected: str, remedy: str) -> None:
        got = config.batch_size
        raise ValueError(message("batch_size", expected=expected, got=got, remedy=remedy))

    if config.batch_size % processes:
        remedy = "Pass another --batch-size, or start another number of processes."
        refuse(f"a multiple of the {processes} processes", remedy)
    if config.mixes and (config.batch_size // processes) % 2:
        refuse("an even number on each process, to mix images", "Pass another --batch-size.")
    found = len(images.train)  # type: ignore[arg-type]
    if config.batch_size * config.accumulation > found:
        times = f" by {config.accumulation} (--accumulation)" if config.accumulation > 1 else ""
        refuse(
            f"at most {found // config.accumulation} images{times}", "Pass a smaller --batch-size."
        )

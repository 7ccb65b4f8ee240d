"""Batches in an order that a resumed run repeats, with any number of workers."""

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

from torch_rsst.recipes.config import RunConfig
from torch_rsst.recipes.images import BadImages, Images
from torch_rsst.utils.errors import message, refuse

Batch = tuple[Tensor, Tensor]

_WORKERS = 4


def seed_everything(*numbers: int) -> None:
    """Seed PyTorch, NumPy and Python from some numbers, such as that of a step."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % (2**32 - 5)  # a prime
    random.seed(mixed)
    np.random.seed(mixed)
    # torch.manual_seed queues a call for each kind of device that is not initialized: a millisecond each time.
    torch.default_generator.manual_seed(mixed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(mixed)


class Checked(Dataset[Any]):
    """A data set that raises for an image that cannot be read or is of none of the classes."""

    def __init__(self, dataset: Dataset[Any], classes: int) -> None:
        self._dataset, self._classes = dataset, classes

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        try:
            image, label = self._dataset[index]
            label = int(label)
        except BadImages:
            raise
        except Exception as error:  # of the data set, PIL, the transforms
            got = f"{type(error).__name__}: {' '.join(str(error).split())}"
            expected, remedy = "an image and the number of its class", "Check the data set."
            raise BadImages(
                message(f"image {index}", expected=expected, got=got, remedy=remedy)
            ) from error
        check_labels(label, label, self._classes)
        return image, label


class Seeded(Checked):
    """A data set whose augmentation depends on seed, epoch and index only.

    So it is the same for any number of workers and processes, and after a resume.
    """

    def __init__(self, dataset: Dataset[Any], classes: int, seed: int) -> None:
        super().__init__(dataset, classes)
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Augment differently from now on."""
        self._epoch = epoch

    def __getitem__(self, index: int) -> Any:
        seed_everything(self._seed, self._epoch, index)
        return super().__getitem__(index)


class Loaders:
    """The batches of a run: epochs of training images, and held-out images.

    A batch is split over the processes: its size and the length of an epoch do not depend on their number.
    """

    def __init__(self, config: RunConfig, images: Images, accelerator: Accelerator) -> None:
        self._config, self._images, self._accelerator = config, images, accelerator
        self._share: int = config.batch_size // accelerator.num_processes
        self._workers = _workers(config)
        self._train: Any = None
        if images.streams:
            self._workers = _of_stream(images.train, self._workers, accelerator.num_processes)
            images.train.set_loader_cfg(num_workers=self._workers)  # type: ignore[attr-defined]
            self._train = self._loader(images.train, self._share, drop_last=True)
        else:
            self._augmented = self._seeded()
            loader = self._loader(self._augmented, config.batch_size, shuffle=True, drop_last=True)
            self._train = accelerator.prepare(loader)
        self._held_out = held_out_loader(
            config, images, self._own_part(images.held_out), self._share
        )

    def __len__(self) -> int:
        """Batches of an epoch."""
        if not self._images.streams:
            return len(self._train)
        # The length of a stream counts the share of one process.
        return len(self._images.train) // self._share  # type: ignore[arg-type]

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch on this process's device, from batch ``first`` on."""
        if not self._images.streams:
            self._train.set_epoch(number)  # lost once batches are skipped
            self._augmented.set_epoch(number)  # Accelerate may set it for the sampler only
            yield from skip_first_batches(self._train, first) if first else self._train
            return
        self._images.train.set_epoch(number)  # type: ignore[attr-defined]
        seed_everything(self._config.seed, number)  # from which the workers derive theirs
        found = 0
        # The batches before it are read and dropped: only then the rest is the same.
        for found, (images, labels) in enumerate(islice(self._train, len(self)), 1):
            if found > first:
                check_labels(int(labels.min()), int(labels.max()), self._images.classes)
                yield send_to_device((images, labels), self._accelerator.device)
        if found < len(self):
            expected = f"{len(self)} batches an epoch, by the number of images of --train-split"
            remedy = "Correct the number, or restore the shards."
            got = f"{found} that can be read"
            refuse(BadImages, self._config.source, expected, got, remedy)

    def held_out(self) -> Iterator[Batch]:
        """The share of this process of the held-out batches."""
        accelerator, streams, number = self._accelerator, self._images.streams, -1
        for number, (images, labels) in enumerate(self._held_out):
            check_labels(int(labels.min()), int(labels.max()), self._images.classes)
            if streams and number % accelerator.num_processes != accelerator.process_index:
                continue  # streams are read by every process
            yield send_to_device((images, labels), accelerator.device)
        if streams and number < 0:
            expected, remedy = "images in --val-split", "Check --data-dir and --val-split."
            refuse(BadImages, self._config.source, expected, "none readable", remedy)

    def samples(self, batches: int) -> Iterator[Batch]:
        """The share of this process of the training batches to measure importance on; always the same."""
        if self._images.streams:
            yield from islice(self.epoch(0), batches)
            return
        found: int = len(self._images.train)  # type: ignore[arg-type]
        count = min(batches * self._config.batch_size, found)
        drawn = random.Random(self._config.seed).sample(range(found), count)
        own = drawn[self._accelerator.process_index :: self._accelerator.num_processes]
        for batch in self._loader(Subset(self._seeded(), own), self._share):
            yield send_to_device(batch, self._accelerator.device)

    def _seeded(self) -> Seeded:
        return Seeded(self._images.train, self._images.classes, self._config.seed)

    def _loader(self, dataset: Dataset[Any], size: int, **options: Any) -> DataLoader[Any]:
        return DataLoader(dataset, size, num_workers=self._workers, **options)

    def _own_part(self, dataset: Dataset[Any]) -> Dataset[Any]:
        processes, own = self._accelerator.num_processes, self._accelerator.process_index
        if processes == 1 or isinstance(dataset, IterableDataset):  # which splits itself
            return dataset
        return Subset(dataset, range(own, len(dataset), processes))  # type: ignore[arg-type]


def check_labels(lowest: int, highest: int, classes: int) -> None:
    """Raise unless labels between these are numbers of classes."""
    if lowest < 0:
        refuse(BadImages, "the data", "labels from 0 on", lowest, "Correct the labels of the data.")
    if highest >= classes:
        refuse(
            BadImages,
            "num_classes",
            f"more than {highest}, which is a label in the data",
            classes,
            f"Pass --num-classes {highest + 1} or more.",
        )


def held_out_loader(
    config: RunConfig,
    images: Images,
    part: Dataset[Any] | None = None,
    batch_size: int | None = None,
) -> DataLoader[Any]:
    """Batches of the held-out images, or of a part of them, on the CPU."""
    dataset, workers = images.held_out if part is None else part, _workers(config)
    if images.streams:
        workers = _of_stream(dataset, workers, 1)
        dataset.set_loader_cfg(num_workers=workers)  # type: ignore[attr-defined]
    else:
        dataset = Checked(dataset, images.classes)
    return DataLoader(dataset, batch_size or config.batch_size, num_workers=workers)


def _workers(config: RunConfig) -> int:
    if config.workers is not None:
        return config.workers
    return 0 if config.source == "digits" else min(_WORKERS, os.cpu_count() or 1)


def _of_stream(dataset: Any, workers: int, processes: int) -> int:
    """How many processes may read a stream: each reads at least one shard, if there are shards.

    At least one: a reader draws random numbers, which must not come from the generator of the model.
    """
    known = getattr(getattr(dataset, "reader", None), "split_info", None)
    shards = getattr(known, "filenames", None)
    if not isinstance(shards, (list, tuple)):
        return max(workers, 1)
    if len(shards) < processes:
        expected = f"a shard for each of the {processes} processes"
        remedy = "Make more shards, or start fewer processes."
        refuse(ValueError, "train_split", expected, f"{len(shards)}", remedy)
    return max(min(workers, len(shards) // processes), 1)


def check_batch_size(config: RunConfig, images: Images, processes: int) -> None:
    """Raise unless batches can be split and there are enough images for one step."""

    def refuse_batch_size(expected: str, remedy: str) -> None:
        refuse(ValueError, "batch_size", expected, config.batch_size, remedy)

    if config.batch_size % processes:
        remedy = "Pass another --batch-size, or start another number of processes."
        refuse_batch_size(f"a multiple of the {processes} processes", remedy)
    if config.mixes and (config.batch_size // processes) % 2:
        refuse_batch_size(
            "an even number on each process, to mix images", "Pass another --batch-size."
        )
    found = len(images.train)  # type: ignore[arg-type]
    if images.streams:  # the length counts the share of one process
        found *= processes
    if config.batch_size * config.accumulation > found:
        times = f" by {config.accumulation} (--accumulation)" if config.accumulation > 1 else ""
        most = f"at most {found // config.accumulation} images{times}"
        refuse_batch_size(most, "Pass a smaller --batch-size.")

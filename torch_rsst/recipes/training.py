"""Train and evaluate: an ordinary loop on Accelerate and timm that can stop after any step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import AverageMeter, accuracy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from torch_rsst.errors import message
from torch_rsst.recipes import digits
from torch_rsst.recipes.config import RunConfig


class Interrupted(Exception):  # noqa: N818 - the user's wish, not a fault
    """The run was asked to stop; everything needed to continue is saved."""


class Diverged(Exception):  # noqa: N818 - an outcome of training
    """The loss is no number any more."""


@dataclass(frozen=True)
class Stage:
    """A stretch of training with one learning-rate curve.

    Attributes:
        name: ``"dense"``, ``"round 0"`` …, ``"finetune"``.
        epochs: its length.
        first_epoch: epochs of the run before it; seeds the order of data.
        peak: learning rate relative to the configured one.
        warmup: steps of linear warm-up.
    """

    name: str
    epochs: int
    first_epoch: int
    peak: float
    warmup: int = 0


@dataclass(frozen=True)
class Epoch:
    """What an epoch came to."""

    number: int
    loss: float
    accuracy: float
    learning_rate: float


class Trainer:
    """Model, optimizer and data of a run.

    Every random number that training draws comes from PyTorch's global generator, which is seeded
    once per epoch: with its state saved, a run continues exactly.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.accelerator = Accelerator(
            # Without an accelerator, Accelerate forms a group of processes only if told so.
            cpu=config.device == "cpu" or not torch.accelerator.is_available(),
            # Split, so that a batch is as large, and an epoch as long, on any number of processes.
            dataloader_config=DataLoaderConfiguration(
                use_seedable_sampler=True, split_batches=True
            ),
        )
        if config.device == "cuda" and self.accelerator.device.type != "cuda":
            remedy = "Pass --device cpu."
            got = self.accelerator.device.type
            raise ValueError(message("--device", expected="a CUDA device", got=got, remedy=remedy))
        self.processes = self.accelerator.num_processes
        if config.batch_size % self.processes:
            remedy = "Pass another --batch-size, or start another number of processes."
            expected = f"a multiple of the {self.processes} processes"
            raise ValueError(
                message("batch_size", expected=expected, got=config.batch_size, remedy=remedy)
            )
        train, test = digits.datasets()
        if config.batch_size > len(train):
            remedy = "Pass a smaller --batch-size."
            raise ValueError(
                message(
                    "batch_size",
                    expected=f"at most {len(train)} images",
                    got=config.batch_size,
                    remedy=remedy,
                )
            )
        torch.manual_seed(config.seed)
        self.model: nn.Module = digits.model()
        self.augment = digits.augmentation(train)
        # The optimizer is made once, before pruning: parameters keep their identity.
        self.optimizer: torch.optim.Optimizer = create_optimizer_v2(
            self.model, opt="adamw", lr=config.learning_rate, weight_decay=0.05
        )
        loaders = (
            DataLoader(train, config.batch_size, shuffle=True, drop_last=True),
            DataLoader(test, 512),
        )
        self.model, self.train_loader, self.test_loader = self.accelerator.prepare(
            self.model, *loaders
        )
        self.steps_per_epoch = len(self.train_loader)

    def run(
        self, stage: Stage, start_step: int, after_step: Callable[[int], None]
    ) -> Iterator[Epoch]:
        """Train a stage from ``start_step`` on, yielding after every epoch.

        Args:
            stage: what to train.
            start_step: steps of it already made.
            after_step: called with the number of steps made; may raise to stop.
        """
        schedule = self._schedule(stage)
        for number in range(start_step // self.steps_per_epoch, stage.epochs):
            first = max(start_step - number * self.steps_per_epoch, 0)
            losses = []
            for step, (images, labels) in self._batches(stage, number, first):
                schedule.step_update(step)
                losses.append(self._step(images, labels))
                after_step(step + 1)
            loss = float(self.accelerator.reduce(torch.stack(losses).mean(), "mean"))
            if not math.isfinite(loss):
                raise Diverged(
                    message(
                        f"loss in epoch {number + 1} of stage {stage.name!r}",
                        expected="a finite number",
                        got=loss,
                        remedy=f"Lower --learning-rate; it is {self.config.learning_rate}.",
                    )
                )
            yield Epoch(
                number,
                loss,
                self.evaluate(),
                float(self.optimizer.param_groups[0]["lr"]),
            )

    def any_process(self, flag: bool) -> bool:
        """Whether the flag is set on any process; the same answer on all."""
        if self.processes == 1:
            return flag
        return bool(
            self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device))
        )

    def evaluate(self) -> float:
        """Accuracy on the held-out data, in percent."""
        self.model.eval()
        top1 = AverageMeter()
        with torch.inference_mode():
            for images, labels in self.test_loader:
                # Of all processes, which makes the result the same on each.
                outputs, labels = self.accelerator.gather_for_metrics((self.model(images), labels))
                (correct,) = accuracy(outputs, labels)
                top1.update(correct.item(), len(labels))
        self.model.train()
        return float(top1.avg)

    def _batches(
        self, stage: Stage, number: int, first: int
    ) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """(step of the stage, batch), without the ``first`` batches of the epoch."""
        epoch = stage.first_epoch + number
        state = torch.get_rng_state()
        process = self.accelerator.process_index  # each augments its own share of a batch
        torch.manual_seed(self.config.seed * 100_003 + epoch + 1_000_003 * process)
        loader = self.train_loader
        if first:
            loader = self.accelerator.skip_first_batches(loader, first)
        loader.set_epoch(epoch)
        for position, batch in enumerate(loader, start=first):
            if position == first and first:
                torch.set_rng_state(state)  # resumed in mid-epoch: go on where it stopped
            yield number * self.steps_per_epoch + position, batch

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        images = torch.stack([self.augment(image) for image in images])
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(images), labels)
        self.accelerator.backward(loss)
        self.optimizer.step()
        return loss.detach()  # kept on the device: reading it would wait for the step

    def _schedule(self, stage: Stage) -> CosineLRScheduler:
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"] = self.config.learning_rate * stage.peak
        return CosineLRScheduler(
            self.optimizer,
            t_initial=max(stage.epochs * self.steps_per_epoch, 1),
            lr_min=self.config.learning_rate * 0.02,
            warmup_t=stage.warmup,
            warmup_prefix=False,
            t_in_epochs=False,
        )

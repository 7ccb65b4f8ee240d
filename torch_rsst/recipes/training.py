"""Train and evaluate: an ordinary loop on Accelerate and timm that can stop after any step."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import timm.optim
import torch
from accelerate import Accelerator
from accelerate.tracking import is_tensorboard_available
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration
from timm.data import Mixup
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import torch_rsst
from torch_rsst.recipes.config import RunConfig
from torch_rsst.recipes.images import open_images
from torch_rsst.recipes.loading import Batch, Loaders, check_batch_size, seed_everything
from torch_rsst.recipes.models import choose_model
from torch_rsst.utils.errors import closest, message, refuse


class Interrupted(Exception):  # noqa: N818 - not an error
    """The run was asked to stop; everything needed to continue is saved."""


class StoppedElsewhere(Exception):  # noqa: N818 - the other process prints the reason
    """Another process of the run cannot continue."""


class Diverged(Exception):  # noqa: N818 - an outcome of training
    """The loss is not finite."""


@dataclass(frozen=True)
class Stage:
    """A part of training with one learning-rate schedule.

    Attributes:
        name: ``"dense"``, ``"round 0"`` …, ``"finetune"``.
        epochs: the number of epochs.
        first_epoch: epochs of the run before it; seeds the order of data.
        peak: peak learning rate, as a share of the configured one.
        warmup: epochs of warmup.
    """

    name: str
    epochs: int
    first_epoch: int
    peak: float
    warmup: float = 0.0


@dataclass(frozen=True)
class Epoch:
    """The result of an epoch."""

    number: int
    loss: float
    accuracy: float
    learning_rate: float


class Trainer:
    """Model, optimizer and data of a run.

    Random generators are seeded for every batch and image from their numbers: a resumed run continues
    exactly, although no state of a generator is saved.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.accelerator = _accelerator(config)
        processes: int = self.accelerator.num_processes
        self.processes = processes
        images = open_images(config, processes=processes)
        check_batch_size(config, images, processes)
        seed_everything(config.seed)
        chosen = choose_model(config, images)
        self.name, self.build, self.form = chosen.name, chosen.build, chosen.form
        self.images = images.prepared(config, chosen.form)
        self.example = torch.zeros(2, *chosen.form["input_size"])
        # The optimizer is made once, before pruning: parameters keep their identity.
        self.optimizer = _optimizer(config, chosen.model)
        self.loaders = Loaders(config, self.images, self.accelerator)
        self.model, self._stepper = self.accelerator.prepare(chosen.model, self.optimizer)
        self.bare: nn.Module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        self.steps_per_epoch = len(self.loaders) // config.accumulation
        self.average = _average(config, self.bare)
        self.teacher: nn.Module | None = None
        self._mixup = _mixup(config, images.classes)
        self._losses: list[Tensor] = []

    @property
    def losses(self) -> list[float]:
        """The losses of the steps made in this epoch, averaged over processes. A collective call.

        A checkpoint holds them, so that the loss of a resumed epoch is the mean over all its steps.
        """
        if not self._losses:
            return []
        losses: list[float] = self.accelerator.reduce(torch.stack(self._losses), "mean").tolist()
        return losses

    @losses.setter
    def losses(self, losses: list[float]) -> None:
        self._losses = list(torch.tensor(losses, device=self.accelerator.device))

    @property
    def outcome(self) -> nn.Module:
        """The model that is evaluated and saved: the moving average, if there is one."""
        average: nn.Module | None = self.average and self.average.module
        return self.bare if average is None else average

    def optimizer_of(self, model: nn.Module) -> torch.optim.Optimizer:
        """A new optimizer like that of the run, for another model."""
        return _optimizer(self.config, model)

    def run(
        self, stage: Stage, start_step: int, after_step: Callable[[int], None]
    ) -> Iterator[Epoch]:
        """Train a stage from ``start_step`` on, yielding after every epoch.

        Args:
            stage: what to train.
            start_step: steps of the stage made before.
            after_step: called with the number of steps made; may raise to stop.
        """
        schedule = self._schedule(stage)
        for number in range(start_step // self.steps_per_epoch, stage.epochs):
            first = max(start_step - number * self.steps_per_epoch, 0)
            for step in self._steps(stage.first_epoch + number, first):
                position = number * self.steps_per_epoch + step.number
                if schedule is not None:
                    schedule.step_update(position)
                self._losses.append(self._step(step))
                after_step(position + 1)
            loss = float(torch.tensor(self.losses).mean())
            self._losses = []
            if not math.isfinite(loss):
                refuse(
                    Diverged,
                    f"loss in epoch {number + 1} of stage {stage.name!r}",
                    "a finite number",
                    loss,
                    f"Lower --learning-rate; it is {self.config.learning_rate}.",
                )
            rate = float(self.optimizer.param_groups[0]["lr"])
            yield Epoch(number, loss, self.evaluate(), rate)

    def any_process(self, flag: bool) -> bool:
        """Whether the flag is set on any process; the same answer on all."""
        if self.processes == 1:
            return flag
        return bool(
            self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device))
        )

    def evaluate(self) -> float:
        """Accuracy on the held-out images in percent, over all processes. A collective call."""
        # Without DistributedDataParallel: processes may have different numbers of batches.
        model = self.outcome.eval()
        right = torch.zeros(2, dtype=torch.float64)
        with torch.inference_mode(), self.accelerator.autocast():
            for images, labels in self.loaders.held_out():
                correct = model(images).argmax(1) == labels
                right += torch.tensor([float(correct.sum()), float(len(labels))])
        self.model.train()
        device = self.accelerator.device
        correct, seen = self.accelerator.reduce(right.float().to(device), "sum").tolist()
        return float(100.0 * correct / max(seen, 1.0))

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy with labels, or with class probabilities of mixed images."""
        smoothing = self.config.label_smoothing if labels.dim() == 1 else 0.0
        return nn.functional.cross_entropy(outputs, labels, label_smoothing=smoothing)

    def _steps(self, epoch: int, first: int) -> Iterator[_Step]:
        """The optimizer steps of an epoch, without the ``first`` ones."""
        each = self.config.accumulation
        batches = self.loaders.epoch(epoch, first * each)
        for number in range(first, self.steps_per_epoch):
            yield _Step(epoch, number, islice(batches, each))

    def _step(self, step: _Step) -> Tensor:
        losses = []
        for part, (images, labels) in enumerate(step.batches):
            rank = self.accelerator.process_index
            seed_everything(self.config.seed, step.epoch, step.number, part, rank)
            if self._mixup is not None:
                images, labels = self._mixup(images, labels)
            with self.accelerator.accumulate(self.model):
                with self.accelerator.autocast():
                    outputs = self.model(images)
                    loss = self._distilled(images, outputs, self.loss(outputs, labels))
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients and self.config.clip_grad is not None:
                    self.accelerator.clip_grad_norm_(self.bare.parameters(), self.config.clip_grad)
                self._stepper.step()
                self._stepper.zero_grad()
            losses.append(loss.detach())  # stays on the device: reading it would synchronize
        if self.average is not None:
            self.average.update_parameters(self.bare)
        return torch.stack(losses).mean()

    def _distilled(self, images: Tensor, outputs: Tensor, loss: Tensor) -> Tensor:
        if self.teacher is None:
            return loss
        with torch.no_grad():
            wanted = self.teacher(images)
        weight, temperature = self.config.distill, self.config.distill_temperature
        return torch_rsst.distillation_loss(
            outputs, wanted, loss, weight=weight, temperature=temperature
        )

    def _schedule(self, stage: Stage) -> Any:
        rate = self.config.learning_rate * stage.peak
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"] = rate
        epochs = max(stage.epochs, 1)
        schedule, _ = create_scheduler_v2(
            self.optimizer,
            self.config.lr_schedule,
            num_epochs=epochs,
            decay_epochs=max(epochs / 3, 1),
            decay_milestones=[epochs / 2, 3 * epochs / 4],
            min_lr=self.config.learning_rate * 0.02,
            warmup_lr=min(1e-5, rate),
            warmup_epochs=stage.warmup,
            step_on_epochs=False,
            updates_per_epoch=self.steps_per_epoch,
        )
        return schedule


@dataclass(frozen=True, eq=False)
class _Step:
    """One optimizer step: its epoch, its number in the epoch, and an iterator over its batches."""

    epoch: int
    number: int
    batches: Iterator[Batch]


def _accelerator(config: RunConfig) -> Accelerator:
    cuda = torch.cuda.is_available() and config.device != "cpu"
    remedy = "Pass --device cpu." if config.device == "cuda" else "Pass --precision bf16 or fp32."
    if config.device == "cuda" and not cuda:
        refuse(ValueError, "device", "a CUDA device", "none", remedy)
    if config.precision == "fp16" and not cuda:
        refuse(ValueError, "precision", "a GPU for fp16", "the CPU", remedy)
    if config.precision == "bf16" and cuda and not torch.cuda.is_bf16_supported():
        expected, remedy = "a GPU that computes in bf16", "Pass --precision fp16 or fp32."
        refuse(ValueError, "precision", expected, "another", remedy)
    if config.log and not is_tensorboard_available():  # Accelerate would train without logging
        raise ModuleNotFoundError("No module named 'tensorboard'", name="tensorboard")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    return Accelerator(
        # Without an accelerator, Accelerate makes a process group only with cpu=True.
        cpu=config.device == "cpu" or not torch.accelerator.is_available(),
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        gradient_accumulation_steps=config.accumulation,
        dynamo_backend="inductor" if config.compile else "no",
        log_with="tensorboard" if config.log else None,
        project_config=ProjectConfiguration(str(config.output), logging_dir=str(config.output)),
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True, data_seed=config.seed, split_batches=True
        ),
    )


def _optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    known = timm.optim.list_optimizers()
    if config.optimizer not in known:
        near = closest(config.optimizer, known)
        remedy = f"Did you mean {near!r}?" if near else "timm.optim.list_optimizers() lists them."
        expected, got = "an optimizer of timm", repr(config.optimizer)
        refuse(ValueError, "optimizer", expected, got, remedy)
    try:
        optimizer: torch.optim.Optimizer = timm.optim.create_optimizer_v2(
            model,
            opt=config.optimizer,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
        )
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:
        got = " ".join(str(error).split())
        expected, remedy = f"to make timm's {config.optimizer}", "Pass another one, such as adamw."
        raise ValueError(message("optimizer", expected=expected, got=got, remedy=remedy)) from error
    return optimizer


def _average(config: RunConfig, model: nn.Module) -> AveragedModel | None:
    if not config.ema:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))  # type: ignore[no-untyped-call]


def _mixup(config: RunConfig, classes: int) -> Mixup | None:
    if not config.mixes:
        return None
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        label_smoothing=config.label_smoothing,
        num_classes=classes,
    )

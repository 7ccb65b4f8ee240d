"""One training loop for everything: AdamW, warm-up and cosine decay over the whole budget."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor, nn

from benchmarks.accuracy.tasks import Batch, Task

WARM_UP = 0.05  # of the steps
Criterion = Callable[[nn.Module, Batch], Tensor]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Of step 0 … steps − 1: a linear warm-up, then a cosine to 0."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@dataclass
class Budget:
    """The steps that a method may take, and the one schedule over all of them.

    Attributes:
        task: what is learned.
        steps: in all.
        peak: the highest learning rate.
        seed: of the order of the data.
        criterion: (model, batch) → loss.
        taken: the steps so far.
    """

    task: Task
    steps: int
    peak: float
    seed: int
    criterion: Criterion
    taken: int = 0
    _batches: Iterator[Batch] = field(init=False)

    def __post_init__(self) -> None:
        self._batches = self.task.draw(torch.Generator().manual_seed(self.seed))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW over all parameters of a model."""
        return torch.optim.AdamW(model.parameters(), lr=self.peak, weight_decay=0.01)

    def train(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps: int | None = None,
        before_step: Callable[[], object] = lambda: None,
    ) -> None:
        """Take some steps, by default all that are left.

        Args:
            model: trained in place, in train mode.
            optimizer: of its parameters; its learning rate follows the schedule.
            steps: how many.
            before_step: called between the backward pass and the optimizer's step.
        """
        model.train()
        for _ in range(self.steps - self.taken if steps is None else steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.taken, self.steps, self.peak)
            optimizer.zero_grad()
            self.criterion(model, next(self._batches)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            before_step()
            optimizer.step()
            self.taken += 1


def dense_model(task: Task, seed: int, folder: Path) -> nn.Module:
    """The dense model of a seed, trained once and kept in the folder."""
    torch.manual_seed(seed)
    model = task.model()
    path = folder / f"dense-{task.name}-{seed}.pt"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            criterion: Criterion = lambda model, batch: task.loss(model, batch)[0]  # noqa: E731
            budget = Budget(task, task.dense_steps, task.learning_rate, seed, criterion)
            budget.train(model, budget.optimizer(model))
            half_written = path.with_suffix(".part")
            torch.save(model.state_dict(), half_written)
            half_written.replace(path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def task_loss(task: Task) -> Criterion:
    """The loss of the task alone."""
    return lambda model, batch: task.loss(model, batch)[0]


def with_teacher(task: Task, teacher: nn.Module) -> Criterion:
    """The loss of the task and the distance to the logits of the dense model."""
    import torch_rsst

    teacher = copy.deepcopy(teacher).eval().requires_grad_(False)

    def criterion(model: nn.Module, batch: Batch) -> Tensor:
        loss, logits = task.loss(model, batch)
        with torch.no_grad():
            target = teacher(batch[0])
        return torch_rsst.distillation_loss(logits, target, loss)

    return criterion

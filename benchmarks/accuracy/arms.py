"""The methods that are compared. Each turns a dense model into a smaller one within a budget of steps.

An arm is a function of a :class:`Case`; :data:`ARMS` holds them by name. All of an arm's steps, those of rounds
included, count against the budget and follow its one learning-rate schedule.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import torch_rsst
from benchmarks.accuracy.tasks import Batch, Task
from benchmarks.accuracy.training import Budget, task_loss, with_teacher

DATA_BATCHES = 32  # of the training set, for scores and reconstruction
CUT_AT = 0.5  # the share of the budget within which methods with several rounds remove their units
GRADUAL_ROUNDS = 8


@dataclass(frozen=True)
class Case:
    """What an arm works on.

    Attributes:
        task: what is learned.
        dense: the trained dense model; arms work on copies.
        amount: the share of all units that go.
        budget: the steps to take; knows the loss, with or without the teacher.
        seed: of data order and random choices.
        options: of the arm, from the configuration of the run.
    """

    task: Task
    dense: nn.Module
    amount: float
    budget: Budget
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def example(self) -> torch.Tensor:
        """An input of two examples."""
        return self.data()[0][0][:2]

    def data(self) -> list[Batch]:
        """Training batches for scores and reconstruction, the same for every arm of a seed."""
        generator = torch.Generator().manual_seed(10_000 + self.seed)
        return list(itertools.islice(self.task.draw(generator), DATA_BATCHES))

    def groups(self, model: nn.Module) -> torch_rsst.Groups:
        """The units of a model."""
        return torch_rsst.find_groups(model, self.task.kinds, example_inputs=self.example)

    def inputs(self) -> list[torch.Tensor]:
        """The inputs of :meth:`data`."""
        return [inputs for inputs, _ in self.data()]

    def scored(self, importance: str) -> dict[str, Any]:
        """The arguments of ``regroup`` and the rounds for an importance by name."""
        if importance in ("magnitude", "remain"):
            return {"importance": importance}
        given: dict[str, Any] = {"importance": importance, "batches": self.data()}
        given["forward"] = lambda model, batch: model(batch[0])
        if importance == "taylor":
            given["forward"] = lambda model, batch: self.task.loss(model, batch)
            given["loss_fn"] = lambda output, batch: output[0]
        return given

    def dense_again(self) -> nn.Module:
        """A copy of the dense model."""
        return copy.deepcopy(self.dense)


Arm = Callable[[Case], nn.Module]
ARMS: dict[str, Arm] = {}


def arm(name: str) -> Callable[[Arm], Arm]:
    """Add an arm under a name."""

    def add(function: Arm) -> Arm:
        ARMS[name] = function
        return function

    return add


def compacted(
    case: Case, model: nn.Module, groups: torch_rsst.Groups, optimizer: Optimizer | None = None
) -> nn.Module:
    """The smaller model, without masks; an optimizer goes on with what it knows of the weights that stay."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch_rsst.RSSTWarning)
        small = torch_rsst.compact(
            model, groups, example_inputs=case.example, optimizer=optimizer, keep_masks=False
        )
    return small


def finish(case: Case, model: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
    """Train with all that is left of the budget, by default with a new optimizer."""
    case.budget.train(model, optimizer or case.budget.optimizer(model))
    return model


@arm("dense")
def dense(case: Case) -> nn.Module:
    """Nothing goes: the dense model with the same extra steps."""
    return finish(case, case.dense_again())


@arm("random")
def random(case: Case) -> nn.Module:
    """Random units of each layer, at once."""
    generator = torch.Generator().manual_seed(case.seed)

    def scores(layer: torch_rsst.GroupLayer, *_: Any) -> torch.Tensor:
        return torch.rand(layer.units, generator=generator, dtype=torch.float64) + 0.1

    return _cut_at_once(case, {"importance": scores})


@arm("one-shot")
def one_shot(case: Case) -> nn.Module:
    """The units with the lowest scores, at once; with ``reconstruct``, consumers are refitted."""
    return _cut_at_once(case, case.scored(case.options.get("importance", "magnitude")))


def _cut_at_once(case: Case, scored: Mapping[str, Any]) -> nn.Module:
    model = case.dense_again().eval()
    groups = case.groups(model)
    scope = case.options.get("scope", "layer")
    refill = torch_rsst.regroup(model, groups, amount=case.amount, scope=scope, **scored)
    if case.options.get("reconstruct"):
        torch_rsst.reconstruct(
            model, groups, refill, batches=case.inputs(), method=case.options["reconstruct"]
        )
    else:
        torch_rsst.apply_mask(model, refill)
    return finish(case, compacted(case, model, groups))


@arm("gradual")
def gradual(case: Case) -> nn.Module:
    """Magnitude, more and more units in the first half of the budget (Zhu and Gupta, 2017: cubic)."""
    model = case.dense_again()
    groups = case.groups(model)
    optimizer = case.budget.optimizer(model)
    steps = round(CUT_AT * case.budget.steps) // GRADUAL_ROUNDS
    for turn in range(1, GRADUAL_ROUNDS + 1):
        amount = case.amount * (1 - (1 - turn / GRADUAL_ROUNDS) ** 3)
        torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=amount))
        case.budget.train(model, optimizer, steps if turn < GRADUAL_ROUNDS else 0)
    return finish(case, compacted(case, model, groups, optimizer), optimizer)


def _driven(case: Case, rounds: Any, model: nn.Module, optimizer: Any, groups: Any) -> nn.Module:
    for rnd in rounds:
        case.budget.train(model, optimizer, rounds.steps_per_round - rnd.start_step)
    rounds.finalize(**({"force": True} if isinstance(rounds, torch_rsst.RSST) else {}))
    return finish(case, compacted(case, model, groups, optimizer), optimizer)


def _rounds_options(case: Case) -> dict[str, Any]:
    options = {
        k: v for k, v in case.options.items() if k not in ("importance", "cut_at", "distill")
    }
    rounds = options.setdefault("rounds", 4)
    share = case.options.get("cut_at", CUT_AT)
    options["steps_per_round"] = max(1, round(share * case.budget.steps / rounds))
    options["regroup_amount"] = case.amount
    if "importance" in case.options:
        options.update(case.scored(case.options["importance"]))
    return options


@arm("refill")
def refill(case: Case) -> nn.Module:
    """Refill: units are masked at once in each round, kept units are dense."""
    model = case.dense_again()
    groups = case.groups(model)
    optimizer = case.budget.optimizer(model)
    rounds = torch_rsst.Refill(
        model, groups, optimizer=optimizer, fillback_rate=0.0, **_rounds_options(case)
    )
    return _driven(case, rounds, model, optimizer, groups)


@arm("rsst")
def rsst(case: Case) -> nn.Module:
    """RSST: a growing penalty on the units that go; data for scores unless an importance is named."""
    model = case.dense_again()
    groups = case.groups(model)
    optimizer = case.budget.optimizer(model)
    options = _rounds_options(case)
    if "importance" not in case.options:
        options["batches"], options["forward"] = case.data(), lambda model, batch: model(batch[0])
    rounds = torch_rsst.RSST(model, groups, optimizer=optimizer, **options)
    return _driven(case, rounds, model, optimizer, groups)


@arm("scratch")
def scratch(case: Case) -> nn.Module:
    """The pruned shape with new weights, trained for as many steps as dense training and budget took.

    With ``same_work``, for as many multiply-adds.
    """
    pruned = case.dense_again().eval()
    groups = case.groups(pruned)
    torch_rsst.apply_mask(pruned, torch_rsst.regroup(pruned, groups, amount=case.amount))
    small = compacted(case, pruned, groups)
    torch.manual_seed(case.seed)
    for module in small.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    steps = case.task.dense_steps + case.budget.steps
    if case.options.get("same_work"):
        full, less = (sum(p.numel() for p in m.parameters()) for m in (case.dense, small))
        steps = round(case.task.dense_steps * full / less) + case.budget.steps
    budget = Budget(case.task, steps, case.task.learning_rate, case.seed, task_loss(case.task))
    budget.train(small, budget.optimizer(small))
    case.budget.taken = case.budget.steps
    return small


def criterion_of(task: Task, dense: nn.Module, options: Mapping[str, Any]) -> Any:
    """The loss that an arm trains with."""
    return with_teacher(task, dense) if options.get("distill") else task_loss(task)


import benchmarks.accuracy.torch_pruning_arms  # noqa: E402, F401  # adds its arms

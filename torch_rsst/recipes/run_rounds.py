"""The pruning of a run: its units, its rounds, the data for its importance."""

from __future__ import annotations

from typing import Any

from accelerate.utils import broadcast_object_list
from torch import nn

import torch_rsst
from torch_rsst.groups.groups import Groups
from torch_rsst.recipes.config import RunConfig
from torch_rsst.recipes.training import Trainer
from torch_rsst.rounds.engine import Rounds


def find_units(config: RunConfig, trainer: Trainer) -> Groups:
    """The units of the model that may be removed.

    Raises:
        ValueError: where there are none.
    """
    example = trainer.example.to(trainer.accelerator.device)
    return torch_rsst.find_groups(trainer.bare, config.kinds, example_inputs=example)


def plan_target(config: RunConfig, trainer: Trainer, groups: Groups) -> dict[str, Any] | None:
    """How much to prune for the target of a run, by the weights as they are: a plan as plain data.

    None without a target. A collective call: all processes get the plan of the first.

    Raises:
        ValueError: where the target cannot be met.
    """
    if not config.budget:
        return None
    importance: Any = config.importance
    if config.scores_on_data:
        importance = torch_rsst.measure_importance(
            trainer.model, groups, importance, **data_source(config, trainer)
        )
    images = config.batch_size // trainer.processes if "latency" in config.budget else 1
    example = trainer.example[:1].repeat(images, 1, 1, 1).to(trainer.accelerator.device)
    planned = torch_rsst.plan(
        trainer.bare,
        groups,
        budget=config.budget,
        importance=importance,
        example_inputs=example,
        scope=config.scope_of(groups),
        round_to=config.round_to,
    )
    plan: dict[str, Any]
    (plan,) = broadcast_object_list([planned.to_dict()])  # times differ from process to process
    return plan


def make_rounds(config: RunConfig, trainer: Trainer, groups: Groups) -> Rounds:
    """RSST or Refill with the options of the run."""
    common: dict[str, Any] = {
        "optimizer": trainer.optimizer,
        "steps_per_round": config.epochs * trainer.steps_per_epoch,
        "rounds": config.rounds,
        "amount": config.amount,
        "regroup_amount": config.regroup_amount,
        "round_to": config.round_to,
        "importance": config.importance,
        "scope": config.scope,
        "rewind": None if config.rewind == "none" else config.rewind,
        "reconstruct": config.reconstruction,
        "follow": [] if trainer.average is None else [trainer.average],
        **data_source(config, trainer),
    }
    if config.method == "refill":
        return torch_rsst.Refill(
            trainer.model, groups, fillback_rate=config.fillback_rate, **common
        )
    return torch_rsst.RSST(
        trainer.model,
        groups,
        kept_units=config.kept_units,
        **config.penalty,
        **common,
    )


def data_source(config: RunConfig, trainer: Trainer) -> dict[str, Any]:
    """The arguments for data: none where neither the importance nor the reconstruction needs any."""
    if not config.measures:
        return {}
    source: dict[str, Any] = {
        "batches": lambda: trainer.loaders.samples(config.importance_batches),
        "forward": lambda model, batch: model(batch[0]),
    }
    if config.needs_loss:
        source["loss_fn"] = lambda output, batch: nn.functional.cross_entropy(output, batch[1])
    return source

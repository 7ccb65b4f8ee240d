"""The dry run: what a run would do. Nothing is trained or written."""

from __future__ import annotations

import copy
import warnings
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import nn

import torch_rsst
from torch_rsst.compaction.budgets import PlannedLayer
from torch_rsst.compaction.cost import Cost, measure_cost
from torch_rsst.groups.groups import Groups
from torch_rsst.recipes.advice import warn_of_rounding
from torch_rsst.recipes.config import RunConfig
from torch_rsst.recipes.run_rounds import data_source, find_units, make_rounds, plan_target
from torch_rsst.recipes.training import Trainer
from torch_rsst.utils.errors import RSSTWarning


@dataclass(frozen=True)
class Memory:
    """Bytes that training takes in one process.

    Attributes:
        model: weights, their masks and the products of both.
        gradients: gradients of all weights.
        optimizer: the state of the optimizer, and the moving average of weights, if there is one.
        activations: activations that are kept for the backward pass of one batch.
        teacher: weights of the dense model, whose predictions are in the loss.
    """

    model: int
    gradients: int
    optimizer: int
    activations: int
    teacher: int

    @property
    def total(self) -> int:
        """The sum of all."""
        return sum(astuple(self))


@dataclass(frozen=True)
class Forecast:
    """What a run would do.

    Attributes:
        name: the name of the model.
        device: where it is trained.
        images: the numbers of images to train on and of held-out images.
        classes: the number of classes.
        form: size, normalization and crop of the images, as a data configuration of timm.
        layers: each layer of units, with how many there are and how many would stay.
        before: parameters and multiply-adds of one image, of the dense model.
        after: the same of the compacted model.
        steps: optimizer steps of the dense stage, of all rounds and of fine-tuning.
        memory: the memory that training takes.
        plan: how much is pruned for a target, from :meth:`torch_rsst.Plan.to_dict`; None without one.
    """

    name: str
    device: str
    images: tuple[int, int]
    classes: int
    form: dict[str, Any]
    layers: tuple[PlannedLayer, ...]
    before: Cost
    after: Cost
    steps: tuple[int, int, int]
    memory: Memory
    plan: dict[str, Any] | None = None


def forecast(config: RunConfig) -> Forecast:
    """Build model and data, choose units by the present weights, and count.

    Raises:
        Exception: as the run itself would before its first step.
    """
    config.check()
    trainer = Trainer(config)
    groups = find_units(config, trainer)
    warn_of_rounding(config, trainer.bare, groups)
    if (plan := plan_target(config, trainer, groups)) is not None:
        config = replace(config, regroup_amount=plan["amount"])
    make_rounds(config, trainer, groups)  # raises where the options do not fit
    model, device = trainer.bare, trainer.accelerator.device
    image = trainer.example[:1].to(device)
    small = _smaller(config, trainer, groups)
    images = trainer.images
    return Forecast(
        name=trainer.name,
        device=str(device),
        images=(len(images.train), len(images.held_out)),  # type: ignore[arg-type]
        classes=images.classes,
        form=trainer.form,
        layers=_layers(model, small, groups),
        before=measure_cost(model, image),
        after=measure_cost(small, image),
        steps=(
            config.dense_epochs * trainer.steps_per_epoch,
            config.rounds * config.epochs * trainer.steps_per_epoch,
            config.finetune_epochs * trainer.steps_per_epoch,
        ),
        memory=_memory(config, trainer, groups),
        plan=plan,
    )


def _smaller(config: RunConfig, trainer: Trainer, groups: Groups) -> nn.Module:
    """The compacted model, if the units that score lowest now were removed."""
    model = copy.deepcopy(trainer.bare)
    fillback = config.fillback_rate if config.method == "refill" else 0.0
    refill = torch_rsst.regroup(
        model,
        groups,
        amount=config.regroup_amount,
        importance=config.importance,
        scope=config.scope_of(groups),
        round_to=config.round_to,
        fillback_rate=fillback,
        **data_source(config, trainer),
    )
    torch_rsst.apply_mask(model, refill)
    with warnings.catch_warnings():
        # Warnings about what cannot be cut depend on the weights, which training changes.
        warnings.simplefilter("ignore", RSSTWarning)
        example = trainer.example.to(trainer.accelerator.device)
        return torch_rsst.compact(model, groups, example_inputs=example)


def _layers(model: nn.Module, small: nn.Module, groups: Groups) -> tuple[PlannedLayer, ...]:
    before, after = (dict(m.named_parameters()) for m in (model, small))
    layers = []
    for layer in groups.layers:
        member = layer.ranked[0]
        kept = after.get(member.parameter)  # None where no unit stays
        wide = before[member.parameter].shape[member.dim]
        share = 0.0 if kept is None else kept.shape[member.dim] / wide
        layers.append(PlannedLayer(layer.name, layer.kind, layer.units, round(share * layer.units)))
    return tuple(layers)


def _memory(config: RunConfig, trainer: Trainer, groups: Groups) -> Memory:
    weights = sum(_bytes(p) for p in trainer.bare.parameters())
    ranked = {m.parameter for layer in groups.layers for m in layer.ranked}
    masked = sum(_bytes(p) for n, p in trainer.bare.named_parameters() if n in ranked)
    model = copy.deepcopy(trainer.bare)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = trainer.optimizer_of(model)
    optimizer.step()
    state = sum(
        _bytes(value)
        for of_parameter in optimizer.state.values()
        for value in of_parameter.values()
        if isinstance(value, torch.Tensor)
    )
    return Memory(
        model=weights + 2 * masked,
        gradients=weights,
        optimizer=state + (weights + 2 * masked if config.ema else 0),
        activations=_activations(config, trainer),
        teacher=weights if config.distill else 0,
    )


def _activations(config: RunConfig, trainer: Trainer) -> int:
    """Bytes that autograd keeps for one batch, measured on two images."""
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> Any:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    example = trainer.example.to(trainer.accelerator.device)
    weights = {p.untyped_storage().data_ptr() for p in trainer.bare.parameters()}
    with (
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
        trainer.accelerator.autocast(),
    ):
        outputs = trainer.bare(example)
    own: int = sum(size for place, size in kept.items() if place not in weights)
    del outputs
    return own // len(example) * (config.batch_size // trainer.processes)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()

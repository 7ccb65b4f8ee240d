"""What the ``torch-pruning`` package does on the same models, with the same budget."""

from __future__ import annotations

from typing import Any

import torch_pruning as tp
from torch import nn

from benchmarks.accuracy.arms import CUT_AT, Case, arm, finish
from benchmarks.accuracy.models import Attention, Mlp, ResidualBlock


def _pruner(case: Case, model: nn.Module, kind: Any, **options: Any) -> Any:
    """A pruner of the package, told which layers hold the units that the study prunes."""
    heads = {m.qkv: m.num_heads for m in model.modules() if isinstance(m, Attention)}
    pruned = [m.qkv for m in model.modules() if isinstance(m, Attention)]
    pruned += [m.fc1 for m in model.modules() if isinstance(m, Mlp)]
    convolutions = any(isinstance(m, ResidualBlock) for m in model.modules())
    layers = (nn.Linear, nn.Conv1d, nn.Embedding)
    ignored = [m for m in model.modules() if isinstance(m, layers) and m not in pruned]
    if convolutions:
        ignored = [model.stem[0], model.head]  # what find_groups leaves whole
    return kind(
        model,
        case.example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=case.amount,
        head_pruning_ratio=case.amount,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=ignored,
        **options,
    )


def _note_heads(model: nn.Module) -> None:
    """What is left to the user of the package: forward passes read the number of heads."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.num_heads = module.qkv.out_features // 3 // 8


@arm("torch-pruning-magnitude")
def magnitude(case: Case) -> nn.Module:
    """Its group magnitude (L2 norms), at once."""
    model = case.dense_again().eval()
    _pruner(case, model, tp.pruner.MagnitudePruner).step()
    _note_heads(model)
    return finish(case, model)


@arm("torch-pruning-growing")
def growing(case: Case) -> nn.Module:
    """Its growing regularization (Wang et al., ICLR 2021) in the first half of the budget, then the cut."""
    model = case.dense_again()
    delta = case.options.get("delta_reg", 1e-3)
    pruner = _pruner(case, model, tp.pruner.GrowingRegPruner, reg=delta, delta_reg=delta)
    pruner.update_regularizer()
    steps = round(CUT_AT * case.budget.steps)
    every = max(1, steps // 10)

    def regularize() -> None:
        if case.budget.taken % every == 0:
            pruner.update_reg()
        pruner.regularize(model)

    case.budget.train(model, case.budget.optimizer(model), steps, before_step=regularize)
    model.eval()
    pruner.step()
    _note_heads(model)
    return finish(case, model)

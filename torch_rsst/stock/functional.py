"""The stock-shaped calls: functions on modules and parameter names that prune in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.prune import BasePruningMethod
from torch.optim import Optimizer

from torch_rsst.distributed.replicas import agreed, agreed_on_first, warn_of_draws
from torch_rsst.importance.weights import Importance
from torch_rsst.masking.freezing import freeze_latents
from torch_rsst.masking.mask_values import check_binary
from torch_rsst.masking.masked_parameter import NewMasks, install
from torch_rsst.masking.optimizer_state import reset_moments as reset_entries
from torch_rsst.masking.parameter_ref import (
    Parameter,
    ParameterRef,
    check_ref,
    check_scores,
    parameter_list,
    ref_of,
)
from torch_rsst.masking.tied import by_parameter, check_memory
from torch_rsst.penalty.hooks import Optimizers, as_optimizers, assign_to_optimizers
from torch_rsst.selection.topk import Ranking
from torch_rsst.stock.methods import Fillback, FillbackPolicy, GlobalL1, HeadRegroup
from torch_rsst.stock.stock import refuse_fractions
from torch_rsst.utils.amounts import Amount, check_flag, to_count
from torch_rsst.utils.errors import check_type, refuse

RANDOM = (prune.RandomUnstructured, prune.RandomStructured)
# Methods whose rule is known, so that they need no joined vector; an override is called instead.
_L1_RULES = (GlobalL1.compute_mask, prune.L1Unstructured.compute_mask)


def global_unstructured(
    parameters: Iterable[Parameter],
    pruning_method: type[prune.BasePruningMethod],
    importance_scores: Mapping[Parameter, Tensor] | None = None,
    *,
    process_group: dist.ProcessGroup | None = None,
    **kwargs: Any,
) -> None:
    """Rank the alive entries of all parameters together and mask the lowest, in place.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(10, 4), torch.nn.Linear(4, 1))
        >>> parameters = [(net[0], "weight"), (net[1], "weight")]
        >>> torch_rsst.global_unstructured(parameters, torch_rsst.GlobalL1, amount=0.25)
        >>> sum(int((layer.weight_mask == 0).sum()) for layer in net)
        11

    A drop-in for :func:`torch.nn.utils.prune.global_unstructured`, with these differences: scores
    come from ``weight_orig``, never from the possibly stale ``weight``; ties go to the earliest
    entry; a NaN in an alive score is an error; a repeated call updates the mask and hook that are
    there; parameters keep their order; either all parameters are masked or, after an error, none.

    Args:
        parameters: (module, name) pairs, each once. Any iterable.
        pruning_method: :class:`GlobalL1`, or any class with ``PRUNING_TYPE = "unstructured"``.
        importance_scores: (module, name) → scores of the parameter's shape, used in its place. Pairs that
            are not listed in ``parameters`` have no say.
        process_group: for replicas of one model on several ranks: all ranks must choose the same
            entries, or all raise. What a random method chooses on the first rank is taken on all.
        **kwargs: the arguments of ``pruning_method``, such as ``amount``: an int counts entries, a
            float is the fraction of what is still alive.

    Raises:
        TypeError: for parameters or keys of scores that are no pairs, or a method of another
            ``PRUNING_TYPE``.
        ValueError: for an empty list, a parameter listed twice, scores of another shape, NaN in
            the score of an alive entry, or an amount out of range.
        RuntimeError: if the ranks of ``process_group`` disagree or one fails; on every rank.

    Warns:
        ReplicaWarning: for a random method on several ranks without a ``process_group``.
    """
    draws = isinstance(pruning_method, type) and issubclass(pruning_method, RANDOM)
    if draws:
        warn_of_draws("global_unstructured", process_group)

    def choose() -> tuple[list[ParameterRef], NewMasks]:
        return _choose(_distinct_sites(parameters), pruning_method, importance_scores, kwargs)

    if process_group is None:
        install(*choose())
        return

    def choose_here() -> tuple[list[ParameterRef], list[Tensor]]:
        refs, new = choose()
        return refs, new.as_tensors(refs)

    refs, masks = (agreed_on_first if draws else agreed)(process_group, choose_here, _named)
    install(refs, NewMasks.of(masks))


def _named(chosen: tuple[list[ParameterRef], list[Tensor]]) -> list[tuple[str, Tensor]]:
    shared = zip(by_parameter(chosen[0]), chosen[1], strict=True)
    return [(f"{places[0]}, number {i}", mask) for i, (places, mask) in enumerate(shared)]


def _choose(
    refs: list[ParameterRef],
    pruning_method: type[prune.BasePruningMethod],
    importance_scores: Mapping[Parameter, Tensor] | None,
    arguments: Mapping[str, Any],
) -> tuple[list[ParameterRef], NewMasks]:
    """The refs and their new masks; nothing is touched."""
    if not (isinstance(pruning_method, type) and issubclass(pruning_method, BasePruningMethod)):
        remedy = "Pass the class, such as GlobalL1, and its arguments by name: amount=0.2."
        got = getattr(pruning_method, "__name__", repr(pruning_method))
        refuse(TypeError, "pruning_method", "a pruning class", got, remedy)
    method: Any = pruning_method(**arguments)  # stock methods carry no types
    kind = getattr(method, "PRUNING_TYPE", None)
    if kind != "unstructured":
        got = f'{type(method).__name__} with "{kind}"'
        remedy = "Use GlobalL1, or prune whole units with regroup() and apply_mask()."
        refuse(TypeError, "pruning_method", 'a class with PRUNING_TYPE "unstructured"', got, remedy)
    _check_keys(importance_scores)
    shared = by_parameter(refs)
    unique = [tied[0] for tied in shared]
    scores = [_scores_of(tied, importance_scores) for tied in shared]
    masks = _rank(method, unique, scores)
    if importance_scores is not None:
        # Scores may be masks, or share their memory: take all that is wanted before any changes.
        masks = NewMasks.of(masks.as_tensors(unique))
    return refs, masks


def _distinct_sites(parameters: Iterable[Parameter]) -> list[ParameterRef]:
    refs: dict[ParameterRef, None] = {}  # a set that keeps the order
    for pair in parameter_list(parameters):
        ref = ref_of(pair)
        if ref in refs:
            remedy = "List every parameter once: twice, its entries would be counted twice."
            refuse(ValueError, f"parameter {ref}", "to be listed once", "it twice", remedy)
        check_binary(ref.mask, ref)
        refs[ref] = None
    if not refs:
        refuse(ValueError, "parameters", "at least one", "none", "Name the parameters to prune.")
    check_memory({f"parameters[{i}]": places for i, places in enumerate(by_parameter(refs))})
    return list(refs)


def _check_keys(importance_scores: Mapping[Parameter, Tensor] | None) -> None:
    """Refuse what would match no parameter, whatever is listed."""
    remedy = "Map (module, name) pairs to tensors."
    check_type(importance_scores, (Mapping, NoneType), "importance_scores", "a dict", remedy)
    for key, scores in (importance_scores or {}).items():
        is_pair = isinstance(key, tuple) and len(key) == 2
        if not (is_pair and isinstance(key[0], nn.Module) and isinstance(key[1], str)):
            refuse(
                TypeError, "key of importance_scores", "a (module, name) pair", repr(key), remedy
            )
        if scores is None:
            refuse(TypeError, f"importance_scores for {key[1]!r}", "a tensor", scores, remedy)


def _scores_of(
    tied: list[ParameterRef], importance_scores: Mapping[Parameter, Tensor] | None
) -> Tensor:
    """What a parameter is ranked by; scores may be given for any of the modules that share it."""
    if importance_scores is None:
        return check_scores(tied[0], None)
    keys = [(ref.module, ref.name) for ref in tied]
    given = [importance_scores[key] for key in keys if key in importance_scores]
    if len(given) > 1:
        remedy = "Give them for one of the modules that share the parameter."
        subject = f"importance_scores for {tied[0]}"
        refuse(ValueError, subject, "one tensor", f"{len(given)}", remedy)
    return check_scores(tied[0], given[0] if given else None)


def _rank(method: Any, refs: list[ParameterRef], scores: list[Tensor]) -> NewMasks:
    """The new masks of all refs; L1 ranking without joining them into one vector."""
    if type(method).compute_mask not in _L1_RULES:
        return NewMasks.of(_rank_joined(method, refs, scores))
    names = [str(ref) for ref in refs]
    ranking = Ranking(scores, among=[ref.mask for ref in refs], absolute=True, names=names)
    cut = ranking.cut(to_count(method.amount, ranking.available, of="alive entries"))
    return NewMasks(cut.write_stays)


def _rank_joined(method: Any, refs: list[ParameterRef], scores: list[Tensor]) -> list[Tensor]:
    """Any other unstructured method sees the alive entries of all parameters as one vector."""
    alive = torch.cat([ref.alive_entries.reshape(-1) for ref in refs])
    candidates = torch.cat([score.reshape(-1) for score in scores])[alive]
    mask = method.compute_mask(candidates, torch.ones_like(candidates))
    refuse_fractions(mask, type(method).__name__)
    alive[alive.clone()] = mask != 0
    parts = torch.split(alive, [ref.original.numel() for ref in refs])
    return [part.reshape(ref.original.shape) for part, ref in zip(parts, refs, strict=True)]


def head_structured(
    module: nn.Module,
    name: str,
    amount: Amount | None,
    num_heads: int,
    *,
    projections: int = 3,
    dim: int = 0,
    importance: str | Importance = "magnitude",
    process_group: dist.ProcessGroup | None = None,
) -> nn.Module:
    """Mask the least important heads of one parameter whole, in place; the others become dense.

    Example:
        >>> qkv = torch.nn.Linear(8, 24)
        >>> _ = torch_rsst.head_structured(qkv, "weight", amount=1, num_heads=2)
        >>> int(qkv.weight_mask.sum())
        96

    Args:
        module: holds the parameter.
        name: the parameter's name.
        amount: fraction (float) or number (int) of all heads that go; None takes as many as the
            density of the present mask says: ``round(Σ alive / size)`` heads stay.
        num_heads: heads of each projection.
        projections: projections stacked along ``dim``: 3 for a fused qkv, 1 for a single one.
        dim: 0 for weights that produce heads, 1 for an output projection.
        importance: ``"remain"``, ``"magnitude"`` or a callable.
        process_group: for replicas: all ranks must choose the same heads, or all raise.

    Returns:
        the module that was given, with ``name_orig`` and ``name_mask`` added.

    Raises:
        ValueError: where heads do not divide the rows, or an argument is out of range.
        RuntimeError: if the ranks of ``process_group`` disagree or one fails; on every rank.
    """
    HeadRegroup.apply(
        module,
        name,
        amount,
        num_heads,
        projections=projections,
        dim=dim,
        importance=importance,
        process_group=process_group,
    )
    return module


def fillback(
    module: nn.Module,
    name: str,
    rate: Amount,
    importance_scores: Tensor | None = None,
    *,
    policy: FillbackPolicy = "latent",
    snapshot: Mapping[str, Tensor] | None = None,
    freeze_masked: bool = False,
    reset_moments: Optimizers | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> nn.Module:
    """Give the highest-scored masked entries of a parameter back, in place; take nothing.

    Example:
        >>> layer = torch.nn.Linear(4, 1, bias=False)
        >>> _ = torch_rsst.l1_unstructured(layer, "weight", amount=2)
        >>> _ = torch_rsst.fillback(layer, "weight", rate=0.5)
        >>> int(layer.weight_mask.sum())
        3

    Args:
        module: holds the masked parameter.
        name: the parameter's name.
        rate: fraction (float) or number (int) of the masked entries to give back.
        importance_scores: of the parameter's shape; |``weight_orig``| by default.
        policy: the value that returns: ``"latent"`` is what ``weight_orig`` holds, ``"snapshot"``
            what ``snapshot`` holds, ``"zero"`` zero.
        snapshot: a state dict of the module, for ``policy="snapshot"``.
        freeze_masked: hold what stays masked from now on, see :func:`freeze_masked`: a latent that
            nobody froze has drifted under momentum and weight decay.
        reset_moments: the optimizer (or several) whose momentum and running averages of the returned entries
            start again at 0. By default they are kept: entries go on with what the optimizer
            remembers of them.
        process_group: for replicas: all ranks must choose the same entries, or all raise.

    Returns:
        the module that was given.

    Raises:
        TypeError: for anything but a torch optimizer in ``reset_moments``, or a bool in ``freeze_masked``.
        ValueError: for a dense parameter, a rate out of range, a NaN score, a missing snapshot or
            optimizers that do not update the parameter.
        RuntimeError: if the ranks of ``process_group`` disagree or one fails; on every rank.
    """

    def check() -> tuple[ParameterRef, list[Optimizer]]:
        ref = check_ref(module, name)
        check_flag(freeze_masked, "freeze_masked")
        optimizers = [] if reset_moments is None else as_optimizers(reset_moments, "reset_moments")
        if optimizers:
            assign_to_optimizers({name: ref.original}, optimizers, "auto")
        return ref, optimizers

    ref, optimizers = agreed(process_group, check, lambda _: ())
    masked = None if ref.alive is None else ~ref.alive
    Fillback.apply(
        module,
        name,
        rate,
        importance_scores=importance_scores,
        policy=policy,
        snapshot=snapshot,
        process_group=process_group,
    )
    if masked is not None and ref.alive is not None:
        for optimizer in optimizers:
            reset_entries(optimizer, ref.original, masked & ref.alive)
    if freeze_masked:
        freeze_latents([ref])
    return module

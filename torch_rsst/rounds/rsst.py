"""RSST: soft rounds. What is to go is penalized until cutting it changes little."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, get_args

import torch.distributed as dist
from torch import nn

from torch_rsst.groups.groups import Group, GroupLayer, Groups
from torch_rsst.importance.batches import Batches, DataSource, Forward, LossFn
from torch_rsst.importance.weights import Importance, remain
from torch_rsst.masking.mask_sets import Masks, alive_in, extract_mask
from torch_rsst.masking.names import named_weights
from torch_rsst.masking.parameter_ref import Parameter
from torch_rsst.penalty.hooks import Mode, Optimizers
from torch_rsst.penalty.penalty_arguments import SHRINK_TO, GradScale, Penalty
from torch_rsst.reconstruction.reconstruction import Method
from torch_rsst.regrouping.ranking import with_followers
from torch_rsst.regrouping.regrouping import Decision, Scope, Ungrouped
from torch_rsst.rounds.engine import Chosen, Rounds, intersection
from torch_rsst.rounds.round_arguments import (
    Course,
    KeptUnits,
    Ranking,
    RegroupAmount,
    Regrouping,
    Rewind,
    RewindOptimizer,
)
from torch_rsst.rounds.state import plain_settings
from torch_rsst.schedules import Schedule
from torch_rsst.utils.amounts import Amount, check_flag
from torch_rsst.utils.errors import RoundWarning, check_choice, refuse


class RSST(Rounds):
    """Soft: the refill mask steers a growing L2 penalty, so that the final cut costs nothing.

    Example:
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
        >>> groups = torch_rsst.find_groups(mlp)
        >>> optimizer = torch.optim.AdamW(mlp.parameters())
        >>> rsst = torch_rsst.RSST(mlp, groups, optimizer=optimizer, rounds=2, steps_per_round=10)
        >>> for rnd in rsst:
        ...     for _ in range(rnd.start_step, 10):
        ...         optimizer.zero_grad()
        ...         mlp(torch.randn(16, 4)).square().mean().backward()
        ...         optimizer.step()
        >>> rsst.finalize()
        >>> torch_rsst.sparsity_report(mlp, groups).gone("neurons")
        4

    Each round ranks the weights as they are now (global L1), regroups to whole units, and yields;
    you train ``steps_per_round`` optimizer steps, in which the weights of units that are to go shrink.
    ``iter()`` continues and never restarts; asking for the next round closes the present one; ``break``
    leaves it open. Start from a trained model, or pass ``train_first=True``.

    With ``kept_units="dense"`` the ranking, ``rnd.ranked_mask``, decides scores of weights and density
    budgets and masks nothing. A unit that was penalized for a full round and is to go again is masked when
    the next round opens; ``finalize()`` masks the rest. With ``kept_units="sparse"`` all entries that the
    ranking prunes are masked during training and stay masked, in kept units too.

    Args:
        model: the model to prune, in place.
        groups: from :func:`find_groups`.
        optimizer: carries the penalty and the step count, one or a list; or call
            ``rnd.attach(optimizer)``.
        steps_per_round: optimizer steps of a round, over which the penalty grows.
        rounds: how many rankings and trainings.
        amount: what a ranking prunes: a fraction of the entries that the last one left, or a count.
        regroup_amount: fraction of all units that is meant to go, None for the density budget, or
            a callable round index → fraction for a ramp. Rounded to whole units in each scope: of 3
            heads in a layer, 0.5 lets 2 go; ``scope="size"`` comes nearer. An int counts the units
            that go in each scope.
        importance: how units are scored, see :func:`regroup`: ``"auto"`` is ``"obs"`` where there are
            ``batches``, else ``"magnitude"``.
        scope: what units compete with, see :func:`regroup`: ``"auto"`` is ``"size"``, the units of all layers whose units
            have as many weights, where heads and neurons are scored by ``"obs"``, else ``"layer"``.
        rewind: after each choice of a mask, put surviving weights back to those at construction
            (``"init"``) or to a state dict; None keeps them.
        rewind_optimizer: what becomes of the optimizers' moments then: ``"reset"`` starts them anew,
            ``"init"`` puts them back to those at construction, a state dict (a list of them for several
            optimizers) to those; ``"keep"`` leaves them. Learning rates stay as they are, and what an optimizer
            remembers of parameters that the model does not have. A parameter may change its group.
        kept_units: ``"dense"`` or ``"sparse"``, see above.
        dense_training: the older name: True for ``kept_units="dense"``, False for ``"sparse"``.
        train_first: yield one unpenalized round, of index −1, before the first.
        parameters: what to rank, as (module, name) pairs or dense names; by default the ranked
            members of the groups.
        min_keep: units per layer that stay whatever the budget.
        round_to: raise the kept units of each layer to a multiple of this.
        ungrouped: see :func:`regroup`.
        freeze_masked: hold masked latents as they are, see :func:`freeze_masked`; otherwise they
            drift under momentum and weight decay, which shows when they come back.
        schedule: of the penalty, see :class:`RegularizedPruner`; as are the arguments that follow.
        strength: λ at the end of a round, instead of ``shrink_to``: its effect grows with the steps.
        shrink_to: what the penalty leaves of the weights in P over a round, however many steps it has.
            Not with ``strength``, a callable ``schedule`` or ``mode="coupled"``, which turn it off.
        shrink_by: the share of a round by which it has; λ is 0 afterwards.
        mode: ``"auto"``, ``"coupled"`` or ``"decoupled"``.
        block_loss_grad: also zero the gradient of the loss on P.
        accumulation_steps: backward passes per step; used without an optimizer only.
        grad_scale: loss scale; used without an optimizer only.
        reconstruct: ``"least_squares"`` or ``"mean"``: ``finalize()`` also refits the layers that consume
            what it masks, towards the model as it was when the last round opened, of which a copy is
            kept. What an earlier round chose and a later one masks when it opens is not refitted for: it has
            shrunk under the penalty by then. See :func:`torch_rsst.reconstruct`. Not with ``rewind``.
        batches: for an importance that needs data, which is measured anew in each round: an iterable,
            drawn once per round, or a function that returns one; what ``model(batch)`` takes. No part
            of the state, as are the arguments that follow: pass them again when you resume.
        forward: ``(model, batch) → output``, for batches that ``model(batch)`` does not take.
        loss_fn: ``(output, batch) → loss``, for ``importance="taylor"``.
        follow: averages of the model's weights (EMA, SWA), changed in place: they get its masks, their weights in P
            are shrunk with the model's, and rewinding puts back the same weights. See :func:`follow`.
        process_group: ranks that hold replicas of the model: all must choose the same masks, or all raise. By default those
            of its ``DistributedDataParallel``.

    Raises:
        TypeError, ValueError, KeyError: for arguments out of range or groups of another model;
            nothing has been changed then.

    Warns:
        RoundWarning: for an int ``amount`` or ``regroup_amount`` that is a tiny share of what it counts, or a
            ``regroup_amount`` that means all units; when a round opens whose ranking leaves a layer nothing to choose
            its units by; when a round closes, for fewer than ``steps_per_round`` steps, and where P fell below 1 % of its norm
            before half of the steps that it was to take.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Groups | Iterable[Group] | Iterable[GroupLayer],
        *,
        optimizer: Optimizers | None = None,
        steps_per_round: int,
        rounds: int = 20,
        amount: Amount = 0.2,
        regroup_amount: RegroupAmount = 0.5,
        importance: str | Importance = "auto",
        scope: Scope = "auto",
        rewind: Rewind = None,
        rewind_optimizer: RewindOptimizer = "reset",
        kept_units: KeptUnits | None = None,
        dense_training: bool | None = None,
        train_first: bool = False,
        parameters: Iterable[Parameter | str] | None = None,
        min_keep: int = 1,
        round_to: int | None = None,
        ungrouped: Ungrouped = "keep",
        freeze_masked: bool = False,
        schedule: str | Schedule = "late_exponential",
        strength: float | None = None,
        shrink_to: float | None = SHRINK_TO,
        shrink_by: float = 1.0,
        mode: Mode = "auto",
        block_loss_grad: bool = False,
        accumulation_steps: int = 1,
        grad_scale: GradScale | None = None,
        reconstruct: Method | None = None,
        batches: Batches | None = None,
        forward: Forward | None = None,
        loss_fn: LossFn | None = None,
        follow: Iterable[nn.Module] = (),
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.kept_units = _kept_units(kept_units, dense_training)
        super().__init__(
            model,
            groups,
            optimizer=optimizer,
            course=Course(
                steps_per_round,
                rounds,
                rewind,
                rewind_optimizer,
                train_first,
                freeze_masked,
                reconstruct=reconstruct,
            ),
            ranking=Ranking(amount, parameters),
            regrouping=Regrouping(
                importance, scope, 0.0, min_keep, round_to, ungrouped, regroup_amount
            ),
            penalty=Penalty(
                schedule,
                strength,
                shrink_to,
                shrink_by,
                mode,
                block_loss_grad,
                accumulation_steps,
                grad_scale,
            ),
            data=DataSource(batches, forward, loss_fn),
            follow=follow,
            process_group=process_group,
        )

    def _trained_with(self, chosen: Chosen) -> Masks:
        return chosen.current_mask

    def _mask_to_rank(self) -> Masks:
        """What the last ranking left, as far as it is alive."""
        alive = super()._mask_to_rank()
        return alive if self._last is None else intersection(alive, self._last.ranked_mask)

    def _alive(self, ranked: Masks) -> Masks:
        if self.kept_units == "sparse":
            return ranked
        weights, masks = named_weights(self._model), extract_mask(self._model)
        alive = {name: alive_in(weights, masks, name) for name in ranked}
        return with_followers(weights, alive, self._groups)

    def _without_gone(self, alive: Masks, refill: Masks, decision: Decision) -> Masks:
        """Dense: without what was penalized for the whole last round, and is to go again."""
        last, decided = self._last, self._history.rounds
        if self.kept_units == "sparse" or last is None or not decided:
            return alive
        if decided[-1].index != last.index or last.pruner.steps < self.course.steps_per_round:
            return alive
        weights, current = named_weights(self._model), dict(alive)
        kept_then = [verdicts.kept for verdicts in decided[-1].verdicts]
        for layer, then, now in zip(self._groups.layers, kept_then, decision.kept, strict=True):
            for member in layer.members:
                stays = member.spread(then | now, weights[member.parameter])
                current[member.parameter] = current[member.parameter] & stays
        in_units = {member.parameter for layer in self._groups.layers for member in layer.members}
        for name in current.keys() - in_units:  # single weights
            current[name] = current[name] & (last.refill_mask[name] | refill[name])
        return current

    def _choose(self, index: int) -> Chosen:
        chosen = super()._choose(index)
        self._warn_of_emptied_layers(index, self._final_mask(chosen))
        return chosen

    def _warn_of_emptied_layers(self, index: int, final: Masks) -> None:
        """A global ranking can kill units that the refill mask keeps; RSST gives nothing back."""
        weights = named_weights(self._model)
        left = {
            layer: int((remain(layer, weights, final) > 0).sum()) for layer in self._groups.layers
        }
        least = self.regrouping.min_keep
        emptied = [f"{layer} keeps {n}" for layer, n in left.items() if n < min(least, layer.units)]
        if emptied:
            warnings.warn(
                f"Round {index}: the ranking leaves layers fewer living units than min_keep={least}: "
                f"{'; '.join(emptied[:5])}. Lower amount or rounds, rank fewer parameters, or use "
                f"kept_units='dense' or Refill, which keep units whole.",
                RoundWarning,
                stacklevel=4,
            )

    def _settings(self) -> dict[str, Any]:
        penalty = {**vars(self.penalty), "schedule": self.penalty.base_schedule}
        del penalty["strength"]  # the schedule holds it
        return {
            **super()._settings(),
            **plain_settings(penalty),
            "kept_units": self.kept_units,
        }


def _kept_units(kept_units: KeptUnits | None, dense_training: bool | None) -> KeptUnits:
    if dense_training is not None:
        if kept_units is not None:
            expected, got = "kept_units alone", f"dense_training={dense_training} as well"
            refuse(ValueError, "kept_units", expected, got, "Leave dense_training out.")
        return "dense" if check_flag(dense_training, "dense_training") else "sparse"
    if kept_units is None:
        return "dense"
    check_choice("kept_units", kept_units, get_args(KeptUnits))
    return kept_units

"""Rounds: RSST (soft) and Refill (hard), each a few lines over the shared engine."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from torch_rsst.groups.groups import Group, GroupLayer, Groups
from torch_rsst.importance.batches import Batches, DataSource, Forward, LossFn
from torch_rsst.importance.weights import Importance, remain
from torch_rsst.masking.mask_sets import Masks, named_weights
from torch_rsst.masking.parameter_ref import Parameter
from torch_rsst.penalty.hooks import Mode, Optimizers
from torch_rsst.penalty.regularizer import GradScale
from torch_rsst.reconstruction.reconstruction import Method
from torch_rsst.regrouping.regrouping import RegroupPlan, Scope, Ungrouped
from torch_rsst.rounds.engine import Chosen, RegroupAmount, Rewind, Round, Rounds
from torch_rsst.schedules import Schedule, resolve_schedule
from torch_rsst.utils.amounts import Amount, refill_limit
from torch_rsst.utils.errors import RoundWarning

__all__ = ["RSST", "Refill", "Round", "Rounds"]


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
    you train ``steps_per_round`` optimizer steps. Masked entries stay exactly 0, penalized ones
    shrink. ``iter()`` continues and never restarts; asking for the next round closes the present
    one; ``break`` leaves it open. Start from a trained model, or pass ``train_first=True``.

    Args:
        model: the model to prune, in place.
        groups: from :func:`find_groups`.
        optimizer: carries the penalty and the step count, one or a list; or call
            ``rnd.attach(optimizer)``.
        steps_per_round: optimizer steps of a round, over which the penalty grows.
        rounds: how many rankings and trainings.
        amount: what a ranking prunes: a fraction of the entries still alive, or a count.
        regroup_amount: fraction of all units that is meant to go, None for the density budget, or
            a callable round index → fraction for a ramp. Rounded to whole units in each scope: of 3
            heads in a layer, 0.5 lets 2 go; ``scope="type"`` comes nearer. An int counts the units
            that go in each scope.
        importance: how units are scored, see :func:`regroup`: ``"auto"`` is ``"variance"`` where there are
            ``batches``, else ``"magnitude"``.
        scope: what units compete with: ``"layer"``, ``"type"`` or ``"global"``.
        rewind: after each choice of a mask, put surviving weights back to those at construction
            (``"init"``) or to a state dict; None keeps them.
        dense_training: let masked entries of kept units train too, until the next ranking.
        train_first: yield one unpenalized round, of index −1, before the first.
        parameters: what to rank, as (module, name) pairs or dense names; by default the ranked
            members of the groups.
        min_keep: units per layer that stay whatever the budget.
        round_to: raise the kept units of each layer to a multiple of this.
        ungrouped: see :func:`regroup`.
        freeze_masked: hold masked latents as they are, see :func:`freeze_masked`; otherwise they
            drift under momentum and weight decay, which shows when they come back.
        schedule: of the penalty, see :class:`RegularizedPruner`; as are the arguments that follow.
        strength: λ at the end of a round.
        mode: ``"auto"``, ``"coupled"`` or ``"decoupled"``.
        block_loss_grad: also zero the gradient of the loss on P.
        accumulation_steps: backward passes per step; used without an optimizer only.
        grad_scale: loss scale; used without an optimizer only.
        reconstruct: ``"least_squares"`` or ``"mean"``: ``finalize()`` also refits the layers that consume
            what it masks, towards the model as it was when the last round opened, of which a copy is
            kept. See :func:`torch_rsst.reconstruct`. Not with ``rewind``.
        batches: for an importance that needs data, which is measured anew in each round: an iterable,
            drawn once per round, or a function that returns one; what ``model(batch)`` takes. No part
            of the state, as are the arguments that follow: pass them again when you resume.
        forward: ``(model, batch) → output``, for batches that ``model(batch)`` does not take.
        loss_fn: ``(output, batch) → loss``, for ``importance="taylor"``.

    Raises:
        TypeError, ValueError, KeyError: for arguments out of range or groups of another model;
            nothing has been changed then.
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
        scope: Scope = "layer",
        rewind: Rewind = None,
        dense_training: bool = False,
        train_first: bool = False,
        parameters: Iterable[Parameter | str] | None = None,
        min_keep: int = 1,
        round_to: int | None = None,
        ungrouped: Ungrouped = "keep",
        freeze_masked: bool = False,
        schedule: str | Schedule = "exp_custom_exponents",
        strength: float = 0.5,
        mode: Mode = "auto",
        block_loss_grad: bool = False,
        accumulation_steps: int = 1,
        grad_scale: GradScale | None = None,
        reconstruct: Method | None = None,
        batches: Batches | None = None,
        forward: Forward | None = None,
        loss_fn: LossFn | None = None,
    ) -> None:
        self.dense_training = dense_training
        super().__init__(
            model,
            groups,
            RegroupPlan(importance, scope, 0.0, min_keep, round_to, ungrouped),
            optimizer=optimizer,
            steps_per_round=steps_per_round,
            rounds=rounds,
            amount=amount,
            regroup_amount=regroup_amount,
            rewind=rewind,
            train_first=train_first,
            parameters=parameters,
            freeze_masked=freeze_masked,
            data=DataSource(batches, forward, loss_fn),
            reconstruct=reconstruct,
            penalty={
                "schedule": resolve_schedule(schedule, strength),
                "mode": mode,
                "block_loss_grad": block_loss_grad,
                "accumulation_steps": accumulation_steps,
                "grad_scale": grad_scale,
            },
        )

    def _choose(self, index: int, plan: RegroupPlan) -> Chosen:
        chosen = super()._choose(index, plan)
        final = _intersection(chosen.current_mask, chosen.refill_mask)
        self._warn_of_emptied_layers(index, final)
        return chosen

    def _warn_of_emptied_layers(self, index: int, final: Masks) -> None:
        """A global ranking can kill units that the refill mask keeps; RSST gives nothing back."""
        weights = named_weights(self._model)
        left = {
            layer: int((remain(layer, weights, final) > 0).sum()) for layer in self._groups.layers
        }
        least = self._plan.min_keep
        emptied = [f"{layer} keeps {n}" for layer, n in left.items() if n < min(least, layer.units)]
        if emptied:
            warnings.warn(
                f"Round {index}: the ranking leaves layers fewer living units than min_keep={least}: "
                f"{'; '.join(emptied[:5])}. Lower amount or rounds, rank fewer parameters, or use "
                f"Refill, which gives kept units their weights back.",
                RoundWarning,
                stacklevel=4,
            )

    def _training_mask(self, current: Masks, refill: Masks) -> Masks:
        return _union(current, refill) if self.dense_training else current

    def _alive_to_penalize(self, current: Masks, refill: Masks) -> Masks:
        return current

    def _final_mask(self, current: Masks, refill: Masks) -> Masks:
        return _intersection(current, refill)

    def _mask_to_rank(self) -> Masks:
        alive = super()._mask_to_rank()
        if self.dense_training and self._last is not None:
            return _intersection(alive, self._last.current_mask)
        return alive

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "dense_training": self.dense_training}


class Refill(Rounds):
    """Hard: the refill mask is applied at once; kept units are dense again.

    Example:
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
        >>> groups = torch_rsst.find_groups(mlp)
        >>> optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
        >>> refill = torch_rsst.Refill(
        ...     mlp, groups, optimizer=optimizer, rounds=1, steps_per_round=10, regroup_amount=0.5
        ... )
        >>> for rnd in refill:
        ...     for _ in range(rnd.start_step, 10):
        ...         optimizer.zero_grad()
        ...         mlp(torch.randn(16, 4)).square().mean().backward()
        ...         optimizer.step()
        >>> refill.finalize()
        >>> torch_rsst.sparsity_report(mlp, groups).gone("neurons")
        4

    Each round ranks the weights as they are now (global L1), regroups to whole units, masks those
    that go, gives kept units all their entries back (with the values that ``weight_orig`` holds),
    and yields; you train ``steps_per_round`` optimizer steps under the refill mask.

    Args:
        fillback_rate: the share of what would go that is given back, of a ``regroup_amount`` too:
            of 100 units, 0.5 and 0.1 let 45 go. With ``regroup_amount=None``
            the units then settle at f / (1 − (1 − amount)(1 − f)), 36 % at 0.2 and 0.1.
        regroup_amount: fraction of all units that goes, an int or a callable as for :class:`RSST`, or
            None to keep as many as the density after ranking says.
        reconstruct: ``"least_squares"`` or ``"mean"``: whenever a round opens and masks units, refit the layers
            that consume them. See :func:`torch_rsst.reconstruct`. Not with ``rewind``.
        reset_moments: entries that come back start with momentum and running averages of 0 in the
            ``optimizer``; by default they go on with what it remembers of them.

    The other arguments are those of :class:`RSST`.

    Warns:
        RoundWarning: where ``rounds`` and ``amount`` ask for fewer than the fillback lets go.
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
        regroup_amount: RegroupAmount = None,
        fillback_rate: float = 0.1,
        importance: str | Importance = "auto",
        scope: Scope = "layer",
        rewind: Rewind = None,
        train_first: bool = False,
        parameters: Iterable[Parameter | str] | None = None,
        min_keep: int = 1,
        round_to: int | None = None,
        ungrouped: Ungrouped = "keep",
        freeze_masked: bool = False,
        reset_moments: bool = False,
        reconstruct: Method | None = None,
        batches: Batches | None = None,
        forward: Forward | None = None,
        loss_fn: LossFn | None = None,
    ) -> None:
        super().__init__(
            model,
            groups,
            RegroupPlan(importance, scope, fillback_rate, min_keep, round_to, ungrouped),
            optimizer=optimizer,
            steps_per_round=steps_per_round,
            rounds=rounds,
            amount=amount,
            regroup_amount=regroup_amount,
            rewind=rewind,
            train_first=train_first,
            parameters=parameters,
            freeze_masked=freeze_masked,
            reset_moments=reset_moments,
            data=DataSource(batches, forward, loss_fn),
            reconstruct=reconstruct,
            penalty={},
        )
        self._warn_about_limit()

    def _warn_about_limit(self) -> None:
        if self.regroup_amount is not None or not isinstance(self.amount, float):
            return
        limit = refill_limit(self.amount, self._plan.fillback_rate)
        target = (1.0 - self.amount) ** self.rounds
        if target < limit and self._plan.fillback_rate > 0:
            warnings.warn(
                f"{self.rounds} rounds at amount={self.amount} ask for {target:.1%} of the weights, "
                f"but with fillback_rate={self._plan.fillback_rate} the units settle at "
                f"{limit:.0%}. Lower fillback_rate; for an exact share, pass regroup_amount and "
                f"fillback_rate=0.",
                RoundWarning,
                stacklevel=3,
            )

    _refits_on_opening = True

    def _training_mask(self, current: Masks, refill: Masks) -> Masks:
        return refill

    def _alive_to_penalize(self, current: Masks, refill: Masks) -> Masks:
        return refill  # what should be alive is: nothing is left to penalize

    def _final_mask(self, current: Masks, refill: Masks) -> Masks:
        return refill


def _union(a: Masks, b: Masks) -> Masks:
    return {name: a[name] | b[name] if name in b else a[name] for name in a}


def _intersection(a: Masks, b: Masks) -> Masks:
    """A key in one of them only: wholly alive in the other."""
    both = {name: a[name] & b[name] for name in a.keys() & b.keys()}
    return {**a, **b, **both}

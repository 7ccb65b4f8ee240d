"""Refill: hard rounds. What is to go is masked at once, and kept units are dense again."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch.distributed as dist
from torch import nn

from torch_rsst.groups.groups import Group, GroupLayer, Groups
from torch_rsst.importance.batches import Batches, DataSource, Forward, LossFn
from torch_rsst.importance.weights import Importance
from torch_rsst.masking.mask_sets import Masks
from torch_rsst.masking.parameter_ref import Parameter
from torch_rsst.penalty.hooks import Optimizers
from torch_rsst.penalty.penalty_arguments import Penalty
from torch_rsst.reconstruction.reconstruction import Method
from torch_rsst.regrouping.regrouping import Scope, Ungrouped
from torch_rsst.rounds.engine import Chosen, Rounds
from torch_rsst.rounds.round_arguments import (
    Course,
    Ranking,
    RegroupAmount,
    Regrouping,
    Rewind,
    RewindOptimizer,
)
from torch_rsst.utils.amounts import Amount, refill_limit
from torch_rsst.utils.errors import RoundWarning


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

    _refits_on_opening = True
    _gives_back = True

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
        scope: Scope = "auto",
        rewind: Rewind = None,
        rewind_optimizer: RewindOptimizer = "reset",
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
        follow: Iterable[nn.Module] = (),
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
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
                reset_moments,
                reconstruct,
            ),
            ranking=Ranking(amount, parameters),
            regrouping=Regrouping(
                importance, scope, fillback_rate, min_keep, round_to, ungrouped, regroup_amount
            ),
            penalty=Penalty(shrink_to=None),  # of an empty set: it only counts steps
            data=DataSource(batches, forward, loss_fn),
            follow=follow,
            process_group=process_group,
        )
        self._warn_about_limit()

    def _warn_about_limit(self) -> None:
        amount, fillback_rate = self.ranking.amount, self.regrouping.fillback_rate
        if self.regrouping.regroup_amount is not None or not isinstance(amount, float):
            return
        limit = refill_limit(amount, fillback_rate)
        target = (1.0 - amount) ** self.course.rounds
        if target < limit and fillback_rate > 0:
            warnings.warn(
                f"{self.course.rounds} rounds at amount={amount} ask for {target:.1%} of the weights, "
                f"but with fillback_rate={fillback_rate} the units settle at {limit:.0%}. Lower "
                f"fillback_rate; for an exact share, pass regroup_amount and fillback_rate=0.",
                RoundWarning,
                stacklevel=3,
            )

    def _trained_with(self, chosen: Chosen) -> Masks:
        return chosen.refill_mask

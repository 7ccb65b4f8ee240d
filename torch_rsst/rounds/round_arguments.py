"""The arguments of rounds: a frozen dataclass for each concern, for checks, defaults and saved state.

That of the penalty is :class:`torch_rsst.penalty.penalty_arguments.Penalty`, that of the data
:class:`torch_rsst.importance.batches.DataSource`. The constructors of RSST and Refill take the same
names as flat keywords.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

from torch_rsst.distributed.dtensor import total
from torch_rsst.groups.groups import Groups
from torch_rsst.importance.weights import Importance
from torch_rsst.masking.mask_sets import alive_in
from torch_rsst.masking.parameter_ref import Parameter
from torch_rsst.reconstruction.reconstruction import METHODS, Method
from torch_rsst.regrouping.regrouping import RegroupPlan, Scope, scopes_of, sizes_of
from torch_rsst.rounds.optimizer_rewind import states_in
from torch_rsst.utils.amounts import (
    Amount,
    check_amount,
    check_count,
    check_flag,
    plain_amount,
    units_to_keep,
)
from torch_rsst.utils.errors import RoundWarning, check_choice, refuse

RegroupAmount: TypeAlias = Amount | Callable[[int], Amount] | None
Rewind: TypeAlias = Literal["init"] | Mapping[str, Tensor] | None
RewindOptimizer: TypeAlias = (
    Literal["reset", "init", "keep"] | Mapping[str, Any] | Sequence[Mapping[str, Any]]
)
KeptUnits: TypeAlias = Literal["dense", "sparse"]


@dataclass(frozen=True)
class Course:
    """How many rounds, how long they are, and what happens when one opens and at the end."""

    steps_per_round: int
    rounds: int = 20
    rewind: Rewind = None
    rewind_optimizer: RewindOptimizer = "reset"
    train_first: bool = False
    freeze_masked: bool = False
    reset_moments: bool = False
    reconstruct: Method | None = None

    def __post_init__(self) -> None:
        own = vars(self)
        for name in ("steps_per_round", "rounds"):
            own[name] = check_count(own[name], name, at_least=1)
        for name in ("train_first", "freeze_masked", "reset_moments"):
            own[name] = check_flag(own[name], name)
        states_in(self.rewind_optimizer)  # also where nothing is rewound
        if self.reconstruct is not None:
            check_choice("reconstruct", self.reconstruct, METHODS)
            if self.rewind is not None:
                remedy = "Rewinding would undo the refit: leave out one of them."
                refuse(ValueError, "reconstruct", "rewind=None", "both", remedy)


@dataclass(frozen=True)
class Ranking:
    """What a round's ranking prunes of what."""

    amount: Amount = 0.2
    parameters: Iterable[Parameter | str] | None = None

    def __post_init__(self) -> None:
        vars(self)["amount"] = plain_amount(self.amount)

    def check(self, weights: Mapping[str, Tensor], alive: Mapping[str, Tensor], times: int) -> None:
        """Raise where a count is more than there is, warn where it looks like a percentage.

        Args:
            weights: what is ranked.
            alive: masks.
            times: how often it prunes what it has left.
        """
        if isinstance(self.amount, int):
            entries = sum(int(total(alive_in(weights, alive, n))) for n in weights)
            _check_meaning(self.amount, "amount", entries, "weights alive", "in each round")
            # Of all, not of those alive: rounds that are resumed are made for a model with masks.
            every = sum(weight.numel() for weight in weights.values())
            if self.amount * times > every:
                expected = (
                    f"at most {every // times:,} in each of {times} rounds, for {every:,} weights"
                )
                remedy = "Lower amount or rounds, or pass a float for a share of what is left."
                refuse(ValueError, "amount", expected, self.amount, remedy)


@dataclass(frozen=True)
class Regrouping(RegroupPlan):
    """What is to go, and by what units compete."""

    importance: str | Importance = "auto"
    scope: Scope = "auto"
    regroup_amount: RegroupAmount = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.regroup_amount is None:
            if self.ungrouped == "element":
                remedy = "Pass regroup_amount, or ungrouped='keep'."
                got = "regroup_amount=None"
                refuse(ValueError, "ungrouped='element'", "an amount", got, remedy)
        elif not callable(self.regroup_amount):
            check_amount(self.regroup_amount, "regroup_amount")
            vars(self)["regroup_amount"] = plain_amount(self.regroup_amount)

    def check(self, groups: Groups, weights: Mapping[str, Tensor]) -> None:
        """Raise where a count is more than a scope has, warn where it looks like a percentage or means all."""
        amount = self.regroup_amount
        if amount is None or callable(amount):
            return
        units = {
            f"{kind} of {name or 'the model'}": sum(groups.layers[i].units for i in positions)
            for (name, kind), positions in scopes_of(
                groups, self.scope, sizes_of(groups, weights)
            ).items()
        }
        if isinstance(amount, int):
            for scope, count in units.items():
                _check_meaning(amount, "regroup_amount", count, scope, "in each scope")
        everything = [
            f"all {count} {scope}"
            for scope, count in units.items()
            if count > 1
            and amount == (count if isinstance(amount, int) else 1.0)
            and not units_to_keep(amount, count, {}, self.fillback_rate)
        ]
        if everything and self.min_keep == 1:  # another number was asked for
            warnings.warn(
                f"regroup_amount={amount} means {'; '.join(everything[:5])}: min_keep=1 stays in each layer. "
                f"Pass a smaller share, or min_keep=0 to let all go.",
                RoundWarning,
                stacklevel=4,
            )

    def amount_of(self, index: int) -> Amount | None:
        """``regroup_amount`` of a round."""
        if not callable(self.regroup_amount):
            return self.regroup_amount
        amount = self.regroup_amount(index)
        check_amount(amount, f"regroup_amount of round {index}")
        return amount


def _check_meaning(amount: int, subject: str, available: int, of: str, where: str) -> None:
    if amount > available:
        expected = f"at most {available:,}, as many as there are {of}: an int is a count {where}"
        remedy = "Pass a float for a share, such as 0.5 for half."
        refuse(ValueError, subject, expected, amount, remedy)
    if 2 <= amount <= 100 and amount < 0.01 * available:
        warnings.warn(
            f"{subject}={amount} is a count: {amount} of {available:,} {of} ({amount / available:.2g} of "
            f"them) {where}. For {amount} %, pass {amount / 100:g}.",
            RoundWarning,
            stacklevel=5,
        )

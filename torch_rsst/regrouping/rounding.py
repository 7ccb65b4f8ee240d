"""How far the share of whole units that go is from the one that was asked for. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from torch_rsst.groups.groups import Groups
from torch_rsst.masking.mask_sets import extract_mask
from torch_rsst.masking.names import named_weights
from torch_rsst.regrouping.regrouping import RegroupPlan, choose, score_layers

_NEAR = 0.25  # of the share that was asked for


@dataclass(frozen=True)
class Rounding:
    """Units of a kind that go, where that is far from what was asked for.

    Attributes:
        kind: of the units.
        gone: how many go.
        units: how many there are.
        asked: the share that was asked for.
        over_all: how many would go with ``scope="type"``.
    """

    kind: str
    gone: int
    units: int
    asked: float
    over_all: int

    def text(self, *, amount: str, scope: str) -> str:
        """A sentence for a warning.

        Args:
            amount: how the argument is named that sets the share.
            scope: how the choice is named that counts units over all layers.
        """
        remedy = f"Pass another {amount}."
        if self._distance(self.over_all) < self._distance(self.gone):
            remedy = f"{scope} counts over all layers: {self.over_all} would go."
        return (
            f"{self.gone} of {self.units} {self.kind} will go ({self.gone / self.units:.0%}), where "
            f"{self.asked:.0%} was asked for: each layer has whole units, some of which stay. {remedy}"
        )

    @property
    def is_far(self) -> bool:
        """Whether it is worth a warning."""
        return self._distance(self.gone) > _NEAR * self.asked

    def _distance(self, gone: int) -> float:
        return abs(gone / self.units - self.asked)


def far_roundings(
    model: nn.Module, groups: Groups, amount: float, plan: RegroupPlan
) -> list[Rounding]:
    """The kinds of which much more or much less will go than a share.

    Args:
        model: which has the units; its weights do not matter.
        groups: its units.
        amount: the share of units to go.
        plan: by what units compete; its importance does not matter.
    """
    plan = replace(plan, importance="magnitude").choose_scope(groups)
    scored = score_layers(named_weights(model), groups, extract_mask(model), plan)

    def going(plan: RegroupPlan) -> Iterator[tuple[str, int, int]]:
        kept = choose(groups, scored, amount, plan).kept
        for kind in dict.fromkeys(layer.kind for layer in groups.layers):
            stay = [k for k, layer in zip(kept, groups.layers, strict=True) if layer.kind == kind]
            yield kind, sum(int((~k).sum()) for k in stay), sum(k.numel() for k in stay)

    asked = amount * (1.0 - plan.fillback_rate)
    over_all = {kind: gone for kind, gone, _ in going(replace(plan, scope="type"))}
    found = (Rounding(kind, gone, n, asked, over_all[kind]) for kind, gone, n in going(plan))
    return [rounding for rounding in found if rounding.is_far]

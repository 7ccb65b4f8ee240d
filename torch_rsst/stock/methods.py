"""Pruning methods in PyTorch's own mold: ``compute_mask`` is pure, ``apply`` is all or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from types import NoneType
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from torch_rsst.distributed.dtensor import placed_like, total
from torch_rsst.groups.groups import head_layer
from torch_rsst.importance.registry import resolve_importance
from torch_rsst.importance.weights import Importance, remain, score_units
from torch_rsst.masking.live_weight import ORIG
from torch_rsst.masking.masked_parameter import MaskHook
from torch_rsst.masking.parameter_ref import ParameterRef
from torch_rsst.masking.rollback import AllOrNothing
from torch_rsst.regrouping.keep_units import ScoredLayer, keep_units
from torch_rsst.selection.topk import lowest
from torch_rsst.utils.amounts import Amount, check_amount, to_count
from torch_rsst.utils.errors import check_choice, check_type, refuse, shown

FillbackPolicy: TypeAlias = Literal["latent", "snapshot", "zero"]
POLICIES = ("latent", "snapshot", "zero")
_DIM = "Heads are split along dim 0 of a weight and along dim 1 of an output projection."


class GlobalL1(MaskHook):
    """Mask the alive entries with the smallest |score|; ties go to the earliest entry.

    Example:
        >>> method = torch_rsst.GlobalL1(amount=1)
        >>> method.compute_mask(torch.tensor([3.0, -1.0, 2.0]), default_mask=torch.ones(3))
        tensor([1., 0., 1.])

    Meant for :func:`torch_rsst.global_unstructured`; on one parameter it is L1 pruning of that
    parameter.

    Args:
        amount: an int counts entries, a float is the fraction of what is still alive.

    Raises:
        TypeError, ValueError: for an amount that is neither, or that exceeds what is alive.
    """

    PRUNING_TYPE = "unstructured"

    def __init__(self, amount: Amount) -> None:
        check_amount(amount)
        self.amount = amount

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """``default_mask`` with the lowest alive entries set to 0, as a new tensor."""
        alive = default_mask != 0
        count = to_count(self.amount, int(total(alive)), of="alive entries")
        goes = lowest([t], count, among=[alive], absolute=True)[0]
        return default_mask.masked_fill(goes, 0)


class HeadRegroup(MaskHook):
    """Keep the best heads of one parameter dense and mask the others whole.

    Example:
        >>> method = torch_rsst.HeadRegroup(0.5, num_heads=2, projections=1, importance="remain")
        >>> method.compute_mask(torch.ones(4, 1), torch.tensor([[1.0], [0.0], [0.0], [0.0]])).T
        tensor([[1., 1., 0., 0.]])

    Heads are scored on entries alive in the mask that is there; kept heads become all-ones, so
    that their individually pruned entries come back.

    Args:
        amount: fraction or number of all heads that go; None for the density budget.
        num_heads: heads of each projection.
        projections: projections stacked along ``dim``; 3 for a fused qkv, 1 for a single one.
        dim: the dimension that is dealt out to heads.
        importance: ``"remain"``, ``"magnitude"`` or a callable, see :mod:`torch_rsst.importance`.
    """

    def __init__(
        self,
        amount: Amount | None,
        num_heads: int,
        *,
        projections: int = 3,
        dim: int = 0,
        importance: str | Importance = "magnitude",
    ) -> None:
        if amount is not None:
            check_amount(amount)
        _check_dim(dim)
        self.amount, self.num_heads = amount, num_heads
        self.projections, self.dim = projections, dim
        self.importance = resolve_importance(importance)

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The refill mask of the heads, in the dtype of ``default_mask``."""
        if not -t.ndim <= self.dim < t.ndim:
            expected = f"-{t.ndim} to {t.ndim - 1} for shape {tuple(t.shape)}"
            refuse(IndexError, "dim", expected, self.dim, _DIM)
        dim = self.dim % t.ndim
        layer = head_layer(
            "weight",
            rows=t.shape[dim],
            num_heads=self.num_heads,
            projections=self.projections,
            dim=dim,
        )
        weights, masks = {"weight": t.detach()}, {"weight": default_mask != 0}
        alive = remain(layer, weights, masks)
        sizes = torch.full((self.num_heads,), t.numel() // self.num_heads)
        scores = score_units(self.importance, layer, weights, masks, alive)
        kept = keep_units([ScoredLayer(scores, alive, sizes)], amount=self.amount).kept
        return layer.members[0].spread(kept[0], t).to(default_mask.dtype)


def _check_dim(dim: object) -> None:
    if isinstance(dim, bool) or not isinstance(dim, Integral):
        refuse(TypeError, "dim", "an int", shown(dim), _DIM)


class Fillback(MaskHook):
    """Give back the masked entries with the highest scores; take nothing.

    Example:
        >>> method = torch_rsst.Fillback(rate=0.5)
        >>> method.compute_mask(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.0, 0.0, 1.0]))
        tensor([1., 0., 1.])

    Args:
        rate: fraction (float) or number (int) of the masked entries to give back.
        policy: the value that returns: ``"latent"`` is what ``weight_orig`` holds (it may have
            drifted under momentum and weight decay), ``"snapshot"`` the value in ``snapshot``,
            ``"zero"`` zero.
        snapshot: for ``policy="snapshot"``: a state dict of the module, or of a pruned one.

    Raises:
        TypeError, ValueError: for a rate out of range, an unknown policy, a missing snapshot.
    """

    def __init__(
        self,
        rate: Amount,
        *,
        policy: FillbackPolicy = "latent",
        snapshot: Mapping[str, Tensor] | None = None,
    ) -> None:
        check_amount(rate, "rate")
        check_choice("policy", policy, POLICIES)
        kinds, remedy = (Mapping, NoneType), "Pass snapshot=module.state_dict()."
        check_type(snapshot, kinds, "snapshot", "a state dict", remedy)
        if (policy == "snapshot") != (snapshot is not None):
            remedy = "Pass snapshot=module.state_dict() with policy='snapshot', and only then."
            got = f"policy={policy!r} with{'' if snapshot is not None else 'out'} one"
            refuse(ValueError, "snapshot", "a state dict for policy='snapshot'", got, remedy)
        self.rate, self.policy = rate, policy
        self._snapshot = snapshot

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """``default_mask`` with the masked entries of highest |t| set to 1, as a new tensor."""
        return self._give_back(t.detach().abs(), default_mask)

    def _new_mask(self, scores: Tensor, mask: Tensor, *, given: bool) -> Tensor:
        return self._give_back(scores if given else scores.abs(), mask)

    def _give_back(self, scores: Tensor, mask: Tensor) -> Tensor:
        masked = mask == 0
        count = to_count(self.rate, int(total(masked)), subject="rate", of="masked entries")
        # Unsigned integers have no negative; and not -scores, which some versions refuse of shards.
        reverse = (scores if scores.is_floating_point() else scores.double()) * -1
        return mask.masked_fill(
            lowest([reverse], count, among=[masked], names=["the masked entries"])[0], 1
        )

    def _choose(self, ref: ParameterRef, importance_scores: Tensor | None) -> Tensor:
        if ref.mask is None:
            remedy = "Prune it first; there is nothing to give back."
            refuse(ValueError, f"fillback of {ref}", "a masked parameter", "a dense one", remedy)
        self._returning_value(ref.name, ref.original)  # refused here where it does not fit
        return super()._choose(ref, importance_scores)

    def _install(self, ref: ParameterRef, alive: Tensor) -> None:
        value, before = self._returning_value(ref.name, ref.original), ref.alive
        if value is None or before is None:
            super()._install(ref, alive)
            return
        with torch.no_grad(), AllOrNothing([ref]):
            super()._install(ref, alive)
            returned = alive & ~before
            # In one go, at the very end: nothing can fail after it.
            ref.original.copy_(torch.where(returned, value, ref.original))

    def _returning_value(self, name: str, original: Tensor) -> Tensor | None:
        if self.policy == "latent":
            return None
        if self._snapshot is None:
            return torch.zeros_like(original)
        value = self._snapshot.get(name + ORIG, self._snapshot.get(name))
        if value is None or value.shape != original.shape:
            got = "no such entry" if value is None else f"shape {tuple(value.shape)}"
            remedy = "Take it from the same module."
            expected = f"{name!r} or {name + ORIG!r} of shape {tuple(original.shape)}"
            refuse(ValueError, "snapshot", expected, got, remedy)
        return placed_like(value.detach(), original).to(original.dtype)

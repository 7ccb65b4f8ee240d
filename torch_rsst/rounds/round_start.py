"""The model as it was when a round opened: what consumers are refitted towards at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torch_rsst.masking.mask_sets import Masks, apply_mask, as_masks, extract_mask
from torch_rsst.masking.rewind import Snapshot
from torch_rsst.utils.module_state import deep_copy


@dataclass(frozen=True, eq=False)
class Reference:
    """Weights, buffers and masks, without the modules.

    Attributes:
        snapshot: weights and buffers.
        masks: of parameters that were masked; others were wholly alive.
    """

    snapshot: Snapshot
    masks: Masks

    @classmethod
    def of(cls, model: nn.Module) -> Reference:
        """A copy of a model's values."""
        return cls(Snapshot.of(model, "init"), extract_mask(model))

    def applied_to(self, model: nn.Module) -> nn.Module:
        """A copy of a model with these values and masks; the model is not changed."""
        made = deep_copy(model)
        whole = {name: torch.ones_like(mask) for name, mask in extract_mask(made).items()}
        apply_mask(made, {**whole, **self.masks})
        self.snapshot.restore(made)
        return made

    def state(self) -> dict[str, Any]:
        """Copies, for a checkpoint."""
        return {**self.snapshot.state(), "masks": as_masks(self.masks)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any] | None) -> Reference | None:
        """The reference of a checkpoint; None where it has none."""
        if state is None:
            return None
        return cls(Snapshot.from_state(state), as_masks(state["masks"]))

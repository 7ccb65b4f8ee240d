"""Rewinding: a copy of weights and buffers, put back where entries survive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_rsst.distributed.dtensor import placed_like
from torch_rsst.masking.live_weight import ORIG
from torch_rsst.masking.mask_undo import is_writable
from torch_rsst.masking.names import (
    BufferPlace,
    dense_keys,
    named_buffers,
    named_refs,
    named_weights,
)
from torch_rsst.utils.errors import check_choice, check_type, listing, refuse


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Weights by dense name and buffers by name; empty where nothing is rewound."""

    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, rewind: Any) -> Snapshot:
        """What ``rewind`` asks for: None, ``"init"`` (the model as it is now) or a state dict.

        Raises:
            TypeError, ValueError: for anything else, or a state dict of another model.
        """
        if rewind is None:
            return cls({}, {})
        weights = named_weights(model)
        buffers = {name: places[0].buffer for name, places in _buffers(model).items()}
        if rewind == "init":
            return cls(_copied(weights), _copied(buffers))
        if isinstance(rewind, str):
            check_choice("rewind", rewind, ["init"])
        remedy = "Pass model.state_dict() of an earlier moment."
        check_type(rewind, Mapping, "rewind", "None, 'init' or a state dict", remedy)
        present = {**weights, **buffers}
        saved = {name: rewind[key] for key, name in dense_keys(rewind, present).items()}
        chosen: dict[str, Any] = {name: saved.get(name + ORIG, saved.get(name)) for name in weights}
        kept = {name: saved[name] for name in buffers if name in saved}
        unfit = [
            name
            for name, value in {**chosen, **kept}.items()
            if not isinstance(value, Tensor)
            or value.shape != present[name].shape
            or value.is_meta
            or value.is_complex()
            or value.layout != torch.strided
        ]
        if unfit:
            got = f"none for {listing(unfit)}"
            remedy = "Pass the full state dict of this very model."
            refuse(ValueError, "rewind", "every parameter and buffer in its shape", got, remedy)
        placed = {name: placed_like(v.detach(), weights[name]) for name, v in chosen.items()}
        return cls(_copied(placed), _copied(kept))

    def check(self, model: nn.Module) -> None:
        """Raise a ValueError where a parameter has another shape by now: copied, one value would fill all of it."""
        present = named_weights(model)
        unfit = {
            name: (tuple(value.shape), tuple(present[name].shape))
            for name, value in self.weights.items()
            if name in present and value.shape != present[name].shape
        }
        if unfit:
            name, (then, now) = next(iter(unfit.items()))
            more = f" (and others for {listing(list(unfit)[1:])})" if len(unfit) > 1 else ""
            remedy = "A layer was replaced: put the former one back, or build anew what holds its earlier weights."
            refuse(ValueError, f"rewinding {name!r}", f"shape {then}", f"shape {now}{more}", remedy)

    def restore(self, model: nn.Module) -> None:
        """Put alive entries of every parameter and all buffers back, in place; masked latents stay.

        Buffers that a forward pass has given another shape, as caches, get their former one; those that the
        module does not have are left out.

        Raises:
            ValueError: see :meth:`check`; nothing is changed then.
        """
        self.check(model)
        present = _buffers(model)
        with torch.no_grad():
            for name, places in named_refs(model).items():
                if name in self.weights:
                    original, alive = places[0].original, places[0].alive
                    value = self.weights[name].to(original)
                    original.copy_(value if alive is None else torch.where(alive, value, original))
            for name in self.buffers.keys() & present.keys():
                buffer, value = present[name][0].buffer, self.buffers[name]
                if is_writable(buffer) and buffer.shape == value.shape:
                    buffer.copy_(value)
                    continue
                value = value.to(buffer, copy=True)
                if is_writable(buffer):
                    buffer.data = value
                else:  # expanded, or made in inference mode
                    for place in present[name]:
                        place.module._buffers[place.key] = value

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Copies, for a checkpoint."""
        return {"weights": _copied(self.weights), "buffers": _copied(self.buffers)}

    @classmethod
    def from_state(cls, state: Mapping[str, Mapping[str, Tensor]]) -> Snapshot:
        """The snapshot of a checkpoint."""
        return cls(_copied(state["weights"]), _copied(state["buffers"]))


def _buffers(model: nn.Module) -> dict[str, list[BufferPlace]]:
    """First name → every place of a buffer, those of modules that share it."""
    found: dict[int, tuple[str, list[BufferPlace]]] = {}
    for name, place in named_buffers(model).items():
        found.setdefault(id(place.buffer), (name, []))[1].append(place)
    return dict(found.values())


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}

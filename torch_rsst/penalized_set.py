"""The penalized set P of a model and what a penalty does to it: pull gradients, shrink weights.

Whatever lies outside P is never touched, masked latents included. Nothing here loops over entries,
waits for the device or moves data between devices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from torch_rsst.errors import listing, message
from torch_rsst.masks import named_sites
from torch_rsst.shards import local, placed_like, sharded_like, total


class PenalizedSet:
    """Parameters with entries in P, by dense name; parameters without any are left out."""

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        sites = named_sites(model)
        # The complement of P is kept: that is what the operations below leave alone.
        self._entries: dict[str, tuple[nn.Parameter, Tensor]] = {}
        for name, mask in masks.items():
            subject = f"refill mask of {name!r}"
            if name not in sites:
                remedy = f"It has {listing(sites)}."
                expected = "a parameter of the model"
                raise KeyError(
                    message(subject, expected=expected, got="no such name", remedy=remedy)
                )
            parameter = sites[name][0].original
            if mask.shape != parameter.shape:
                expected = f"the parameter's shape {tuple(parameter.shape)}"
                got, remedy = f"shape {tuple(mask.shape)}", "Make the masks with regroup(model, …)."
                raise ValueError(message(subject, expected=expected, got=got, remedy=remedy))
            mask = placed_like(mask, parameter)
            if int(total(mask)):
                self._entries[name] = (parameter, ~local(mask))

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name → the trainable parameter."""
        return {name: parameter for name, (parameter, _) in self._entries.items()}

    def norm(self) -> float:
        """The L2 norm of the weights in P, in float64. Synchronizes the device."""
        squares = 0.0
        for parameter, rest in map(self._entry, self):
            own = local(parameter.detach()).double().square().masked_fill(rest, 0.0)
            squares += float(total(sharded_like(own, parameter)))
        return math.sqrt(squares)

    def pull(self, names: Iterable[str], strength: float, scale: Tensor | float | None) -> None:
        """Coupled: ``grad += strength · scale · weight`` on P; a missing gradient is made."""
        self._check_gradients(names)
        with torch.no_grad():
            for parameter, rest in map(self._entry, names):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                pull = local(parameter).masked_fill(rest, 0.0)
                local(parameter.grad).add_(pull if scale is None else pull * scale, alpha=strength)

    def block(self, names: Iterable[str]) -> None:
        """Set the gradient on P to 0; where there is none, there is nothing to block."""
        self._check_gradients(names)
        with torch.no_grad():
            for parameter, rest in map(self._entry, names):
                if parameter.grad is not None:
                    local(parameter.grad).masked_fill_(~rest, 0.0)

    def shrink(self, names: Iterable[str], strength: float, skipped: Tensor | None) -> None:
        """Decoupled: ``weight *= 1 − min(1, strength)`` on P, unless ``skipped`` says so on the device."""
        keep = 1.0 - min(1.0, strength)
        with torch.no_grad():
            for parameter, rest in map(self._entry, names):
                stays = rest if skipped is None else rest | skipped.to(rest.device).bool()
                own = local(parameter)
                own.copy_(torch.where(stays, own, own * keep))

    def _check_gradients(self, names: Iterable[str]) -> None:
        """Refuse sparse gradients, which P cannot index, before the first one is changed."""
        sparse = [
            name
            for name in names
            for gradient in [self._entries[name][0].grad]
            if gradient is not None and gradient.layout != torch.strided
        ]
        if sparse:
            remedy = "Make the layer with sparse=False, or use mode='decoupled' and do not block."
            subject = f"gradient of {listing(sparse)}"
            raise RuntimeError(
                message(subject, expected="a dense tensor", got="a sparse one", remedy=remedy)
            )

    def _entry(self, name: str) -> tuple[nn.Parameter, Tensor]:
        """A parameter and the complement of P in it, on its device even after ``model.to``."""
        parameter, rest = self._entries[name]
        if rest.device != parameter.device:
            rest = rest.to(parameter.device)
            self._entries[name] = (parameter, rest)
        return parameter, rest

"""The penalized set P of a model and what a penalty does to it: pull gradients, shrink weights.

Whatever lies outside P is never touched, masked latents included. Nothing here loops over entries,
waits for the device or moves data between devices.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_rsst.distributed.dtensor import (
    local,
    placed_like,
    redistributed_like,
    sharded_like,
    total,
)
from torch_rsst.masking.mask_sets import named_refs
from torch_rsst.masking.parameter_ref import MASKABLE
from torch_rsst.utils.errors import MissingNameError, listing, refuse

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class PenalizedSet:
    """Parameters with entries in P, by dense name; parameters without any are left out."""

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        refs = named_refs(model)
        self._entries: dict[str, tuple[nn.Parameter, Tensor]] = {}
        self._factors: dict[Any, _Factors] = {}
        self._memory = _Memory()
        for name, mask in masks.items():
            subject = f"refill mask of {name!r}"
            if name not in refs:
                remedy = f"It has {listing(refs)}."
                expected = "a parameter of the model"
                refuse(MissingNameError, subject, expected, "no such name", remedy)
            parameter = refs[name][0].original
            if mask.shape != parameter.shape:
                expected = f"the parameter's shape {tuple(parameter.shape)}"
                got, remedy = f"shape {tuple(mask.shape)}", "Make the masks with regroup(model, …)."
                refuse(ValueError, subject, expected, got, remedy)
            if parameter.dtype not in MASKABLE:
                expected = f"one of {', '.join(map(str, MASKABLE))}"
                remedy = "Leave it out, or cast it first."
                refuse(ValueError, f"{name!r}", expected, parameter.dtype, remedy)
            mask = placed_like(mask, parameter)
            if int(total(mask)):
                self._entries[name] = (parameter, _where(local(mask), local(parameter)))

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
        for parameter, where in map(self._entry, self):
            own = local(parameter.detach()).double().square().masked_fill(where.logical_not(), 0.0)
            squares += float(total(sharded_like(own, parameter)))
        return math.sqrt(squares)

    def pull(self, names: Iterable[str], strength: float, scale: Tensor | float | None) -> None:
        """Coupled: ``grad += strength · scale · weight`` on P; a missing gradient is made."""
        self._check_gradients(names)
        with torch.no_grad():
            for parameter, where in map(self._entry, names):
                own, gradient = local(parameter), local(self._gradient(parameter))
                pull = self._in_p(own, where)
                if scale is not None:
                    pull = pull.to(_wide(own.dtype)) * scale
                gradient.add_(pull, alpha=strength)

    def block(self, names: Iterable[str]) -> None:
        """Set the gradient on P to 0; where there is none, there is nothing to block."""
        self._check_gradients(names)
        with torch.no_grad():
            for parameter, where in map(self._entry, names):
                if parameter.grad is not None:
                    local(self._gradient(parameter)).masked_fill_(where.bool(), 0.0)

    @staticmethod
    def _gradient(parameter: nn.Parameter) -> Tensor:
        """The gradient, distributed as the parameter is: of a partial sum each rank would change its own."""
        gradient = parameter.grad
        if gradient is None:
            with torch.inference_mode(False):
                gradient = torch.zeros_like(parameter)
        gradient = redistributed_like(gradient, parameter)
        if gradient is not parameter.grad:
            parameter.grad = gradient
        return gradient

    def shrink(self, names: Iterable[str], strength: float, skipped: Tensor | None) -> None:
        """Decoupled: ``weight *= 1 − min(1, strength)`` on P, unless ``skipped`` says so on the device."""
        strength = min(1.0, strength)
        units: dict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor]]] = {}
        with torch.no_grad():
            for name in names:
                parameter, where = self._entry(name)
                own = local(parameter)
                if where.dtype == torch.uint8:
                    # In two passes, where exact factors take three: what is wrong is at most the last
                    # bit of the weight as it was.
                    acts = self._spare(own).copy_(where)
                    if skipped is not None:
                        acts.mul_(_took_place(skipped, where))
                    own.addcmul_(own, acts, value=-strength)
                else:
                    units.setdefault((own.device, own.dtype), []).append((name, own))
            for together in units.values():
                factors = self._factors_for(tuple(name for name, _ in together))
                factors.set(1.0 - strength, skipped)
                torch._foreach_mul_([own for _, own in together], factors.views)

    def _in_p(self, own: Tensor, where: Tensor) -> Tensor:
        """Weights in P and 0 elsewhere: their bits times 1 or 0, as 0 · ∞ is no 0 but that of bits is."""
        pull, bits = self._spare(own), _INTEGERS[own.element_size()]
        if where.dtype == torch.bool:
            torch.mul(own.view(bits), where, out=pull.view(bits))
        else:
            pull.view(bits).copy_(where).mul_(own.view(bits))
        return pull

    def _spare(self, like: Tensor) -> Tensor:
        """Memory of the same kind, on the CPU one that the next call of this thread overwrites."""
        if like.device.type != "cpu":  # soon fetched, and not shared between streams
            return torch.empty_like(like)
        by_dtype = self._memory.by_dtype
        if like.dtype not in by_dtype or by_dtype[like.dtype].numel() < like.numel():
            largest = max(local(p).numel() for p, _ in self._entries.values())
            with torch.inference_mode(False):  # what is made in it could not be changed outside
                by_dtype[like.dtype] = torch.empty(largest, dtype=like.dtype, device=like.device)
        return by_dtype[like.dtype][: like.numel()].view(like.shape)

    def _factors_for(self, names: tuple[str, ...]) -> _Factors:
        """Made once for the parameters that are shrunk together, and again after ``model.to``."""
        first, where = self._entry(names[0])
        key = names, first.dtype, where.device
        if key not in self._factors:
            vectors = [self._entry(name)[1] for name in names]
            with torch.inference_mode(False):
                self._factors[key] = _Factors(vectors, _wide(first.dtype))
        return self._factors[key]

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
            refuse(RuntimeError, subject, "a dense tensor", "a sparse one", remedy)

    def _entry(self, name: str) -> tuple[nn.Parameter, Tensor]:
        """A parameter and where P lies in it, on its device even after ``model.to``."""
        parameter, where = self._entries[name]
        if where.device != parameter.device:
            where = where.to(parameter.device)
            self._entries[name] = (parameter, where)
        return parameter, where


class _Memory(threading.local):
    """A thread's own, used over and over: to fetch it anew would take longer than the arithmetic."""

    def __init__(self) -> None:
        self.by_dtype: dict[torch.dtype, Tensor] = {}


class _Factors:
    """What the units of many parameters are multiplied with: all made in one operation a step."""

    def __init__(self, vectors: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._in_p = torch.cat([vector.reshape(-1) for vector in vectors])
        self._values = torch.empty_like(self._in_p, dtype=dtype)
        self._one = torch.ones((), dtype=dtype, device=self._in_p.device)
        parts = torch.split(self._values, [vector.numel() for vector in vectors])
        self.views = [part.view_as(vector) for part, vector in zip(parts, vectors, strict=True)]

    def set(self, factor: float, skipped: Tensor | None) -> None:
        """Let ``views`` hold the factor in P and 1 elsewhere, or 1 everywhere if a step was skipped."""
        acts = self._in_p if skipped is None else self._in_p & _took_place(skipped, self._in_p)
        torch.where(acts, torch.full_like(self._one, factor), self._one, out=self._values)


def _took_place(skipped: Tensor, like: Tensor) -> Tensor:
    return (skipped == 0).to(like.device)


def _where(penalized: Tensor, weight: Tensor) -> Tensor:
    """Where P lies, in the form that takes least.

    Where whole units lie in P, a bool vector along one dimension: no memory to speak of, and no time to
    read it. Else 1 in P and 0 elsewhere as uint8, which become numbers to multiply with in a fourth of the
    time that bools take. But all of P as bool where something outside it is not finite, as 0 · ∞ is no 0:
    rare, and not worth another way. (What stops being finite later, outside P and where units have holes,
    is not a number after a decoupled step.)
    """
    if not bool(weight.detach().masked_fill(penalized, 0.0).isfinite().all()):
        return penalized
    for dim in range(penalized.dim()):
        others = [d for d in range(penalized.dim()) if d != dim]
        units = penalized.all(dim=others, keepdim=True) if others else penalized
        if bool((units == penalized).all()):
            return units
    return penalized.to(torch.uint8)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """A dtype in which factors near 1 are not 1, and scales of a GradScaler are not infinite."""
    return torch.promote_types(dtype, torch.float32)

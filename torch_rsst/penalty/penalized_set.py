"""The penalized set P of a model and what a penalty does to it: pull gradients, shrink weights.

Whatever lies outside P is never touched, masked latents included. Nothing here loops over entries,
waits for the device or moves data between devices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from torch_rsst.distributed.dtensor import Ranks, local, placed_like, redistributed_like, total
from torch_rsst.masking.mask_values import check_shape
from torch_rsst.masking.names import named_refs
from torch_rsst.masking.parameter_ref import MASKABLE
from torch_rsst.utils.errors import listing, refuse, refuse_name

# In units of eps: with less, rounding to nearest would change the effect of many factors by more than 1 %.
_LEAST = 4


class PenalizedSet:
    """Parameters with entries in P, by dense name; parameters without any are left out."""

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        refs = named_refs(model)
        self._entries: dict[str, tuple[nn.Parameter, Tensor]] = {}
        self.pending: dict[str, float] = {}
        """By name, the factor that its weights have yet to be multiplied with; 1 where it is missing."""
        for name, mask in masks.items():
            subject = f"refill mask of {name!r}"
            if name not in refs:
                refuse_name(subject, refs)
            parameter = refs[name][0].original
            check_shape(subject, mask, parameter, "Make the masks with regroup(model, …).")
            if parameter.dtype not in MASKABLE:
                expected = f"one of {', '.join(map(str, MASKABLE))}"
                remedy = "Leave it out, or cast it first."
                refuse(ValueError, f"{name!r}", expected, parameter.dtype, remedy)
            mask = placed_like(mask, parameter)
            if int(total(mask)):
                self._entries[name] = (parameter, _multipliers(local(mask), local(parameter)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def in_other(self, model: nn.Module) -> PenalizedSet:
        """The same entries of a module with the same parameters."""
        made, refs = PenalizedSet(model, {}), named_refs(model)
        for name, (_, in_p) in self._entries.items():
            made._entries[name] = (refs[name][0].original, in_p)
        return made

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name → the trainable parameter."""
        return {name: parameter for name, (parameter, _) in self._entries.items()}

    def norm(self) -> float:
        """The L2 norm of the weights in P, in float64. Synchronizes the device."""
        return math.sqrt(sum(float(square) for square in self.squared_norms()))

    def squared_norms(self) -> list[Tensor]:
        """Σ w² over P in float64: a tensor for each device or mesh, without waiting for any."""
        sums: dict[tuple[Ranks, torch.device], Tensor] = {}
        for parameter, in_p in map(self._entry, self):
            ranks, own = Ranks.of([parameter]), local(parameter.detach())
            if along := [d for d in range(own.dim()) if in_p.shape[d] != own.shape[d]]:
                own = torch.linalg.vector_norm(own, dim=along, keepdim=True, dtype=torch.float64)
            inside = own.masked_fill(in_p == 0, 0.0)
            square = torch.linalg.vector_norm(inside, dtype=torch.float64).square()
            if not ranks.counts(parameter):  # a replica, which another rank counts
                square = torch.zeros_like(square)
            key = ranks, own.device
            sums[key] = sums[key] + square if key in sums else square
        return [ranks.add_up(square) for (ranks, _), square in sums.items()]

    def pull(self, names: Iterable[str], strength: float, scale: Tensor | float | None) -> None:
        """Coupled: ``grad += strength · scale · weight`` on P; a missing gradient is made."""
        self._check_gradients(names)
        with torch.no_grad():
            for parameter, in_p in map(self._entry, names):
                own, gradient = local(parameter), local(self._gradient(parameter))
                # Scales of a GradScaler are infinite in float16.
                factor = in_p.to(own.dtype) if scale is None else in_p.to(_wide(own.dtype)) * scale
                # 0 · ∞ is no 0, and one such gradient would spoil the norm of all when it is clipped.
                gradient.addcmul_(own.nan_to_num(0.0, 0.0, 0.0), factor, value=strength)

    def block(self, names: Iterable[str]) -> None:
        """Set the gradient on P to 0; where there is none, there is nothing to block."""
        self._check_gradients(names)
        with torch.no_grad():
            for parameter, in_p in map(self._entry, names):
                if parameter.grad is not None:
                    local(self._gradient(parameter)).masked_fill_(in_p.bool(), 0.0)

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
        """Decoupled: ``weight *= 1 − min(1, strength)`` on P, unless ``skipped`` says so on the device.

        In float16 and bfloat16 a factor near 1 would change nothing, or too much. Such factors are
        multiplied up over the steps until the dtype can represent the product well.
        """
        with torch.no_grad():
            for name in names:
                parameter, in_p = self._entry(name)
                own = local(parameter)
                factor = self._due(name, 1.0 - min(1.0, strength), own.dtype)
                if factor == 1.0:
                    continue
                if skipped is not None:
                    in_p = in_p * (skipped == 0).to(in_p.device)
                if in_p.dtype == torch.uint8:  # in two passes instead of three
                    own.addcmul_(own, in_p.to(own.dtype), value=factor - 1.0)
                else:
                    here = own.new_full((), factor, dtype=_wide(own.dtype))
                    own.mul_(torch.where(in_p, here, 1.0))

    def _due(self, name: str, factor: float, dtype: torch.dtype) -> float:
        """What the weights are to be multiplied with now, 1 while that is left pending."""
        factor *= self.pending.pop(name, 1.0)
        if dtype.itemsize > 2 or factor <= 1.0 - _LEAST * torch.finfo(dtype).eps:
            return factor
        self.pending[name] = factor
        return 1.0

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
        """A parameter and its multipliers, on its device even after ``model.to``."""
        parameter, in_p = self._entries[name]
        if in_p.device != parameter.device:
            in_p = in_p.to(parameter.device)
            self._entries[name] = (parameter, in_p)
        return parameter, in_p


def _multipliers(penalized: Tensor, weight: Tensor) -> Tensor:
    """1 in P and 0 elsewhere, in the form that takes least memory and time.

    Where whole units lie in P, a bool vector along one dimension. Else bytes, which become numbers in a fourth
    of the time that bools take. But all of P as bool where something outside it is not finite, as 0 · ∞ is
    no 0: rare, and not worth another way. (What stops being finite later, outside P and where units have
    holes, is not a number after a decoupled step.)
    """
    for dim in range(penalized.dim()):
        others = [d for d in range(penalized.dim()) if d != dim]
        units = penalized.all(dim=others, keepdim=True) if others else penalized
        if bool((units == penalized).all()):
            return units
    finite = weight.detach().masked_fill(penalized, 0.0).isfinite().all()
    return penalized.to(torch.uint8) if bool(finite) else penalized


def _wide(dtype: torch.dtype) -> torch.dtype:
    """A dtype in which factors near 1 are not 1, and scales of a GradScaler are not infinite."""
    return torch.promote_types(dtype, torch.float32)

"""Trials on copies of modules: random weights, zeroed units, outputs that agree or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import is_dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torch_rsst.groups.groups import GroupLayer
from torch_rsst.groups.surgery import Removal
from torch_rsst.masking.masked_parameter import restore
from torch_rsst.masking.names import named_weights
from torch_rsst.masking.parameter_ref import masked_refs
from torch_rsst.utils.module_state import deep_copy, drop_caches

_NOISE = 65_537
"""Random numbers that noise repeats: drawing takes long. A prime, so that no two rows of a weight are alike."""


def dense_copy(module: nn.Module) -> nn.Module:
    """A copy in eval mode, without masks."""
    module = deep_copy(module)
    module.eval()  # which returns nothing in some classes
    refs = masked_refs(module.modules())
    for ref in refs:  # fractions in masks say nothing about the structure
        assert ref.mask is not None, "masked_refs() lists masked refs"
        ref.mask.copy_(ref.mask != 0)
    restore(refs)
    return module


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """A dense copy in eval mode whose parameters and statistics are away from where they begin."""
    module = dense_copy(module)
    if any(is_half(p) for p in module.parameters()):
        module.float()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(_NOISE, generator=generator)

    def noise(like: Tensor) -> Tensor:
        start = int(torch.randint(_NOISE, (), generator=generator))
        repeats = -(-(start + like.numel()) // _NOISE)
        return drawn.repeat(repeats)[start : start + like.numel()].view(like.shape).to(like)

    with torch.no_grad():
        for parameter in dict.fromkeys(module.parameters()):
            if parameter.is_floating_point() and parameter.numel():
                spread = parameter.std(correction=0).clamp(min=0.05)
                parameter.add_(noise(parameter).mul_(spread))
        for norm in module.modules():
            if isinstance(norm, nn.modules.batchnorm._NormBase) and norm.running_mean is not None:
                norm.running_mean.add_(noise(norm.running_mean) * 0.1)
                assert norm.running_var is not None
                norm.running_var.mul_(1.0 + 0.2 * noise(norm.running_var).abs())
    drop_caches(module)
    return module


def take_signs(module: nn.Module, of: nn.Module) -> None:
    """Give all weights the signs that they have in another module, in place: some must not be below 0."""
    own = named_weights(of)
    with torch.no_grad():
        for name, weight in named_weights(module).items():
            if weight.is_floating_point():
                signed = weight.abs().copysign(own[name].to(weight.dtype))
                weight.copy_(signed.where(own[name] != 0, weight))
    drop_caches(module)


def tried(
    module: nn.Module, run: Callable[[nn.Module], list[Tensor]], seed: int = 0
) -> tuple[nn.Module, list[Tensor]]:
    """A randomized copy and its outputs; with weights of the module's own signs where others give NaN.

    What the run has cached is dropped: values that a later run reads there would not show where they come from.
    """
    whole = randomized(module, seed)
    outputs = run(whole)
    if not are_finite(outputs):
        take_signs(whole, module)
        outputs = run(whole)
    drop_caches(whole)
    return whole, outputs


def are_finite(outputs: Iterable[Tensor]) -> bool:
    """Whether outputs hold neither NaN nor infinity."""
    return all(bool(tensor.isfinite().all()) for tensor in outputs)


def why_not_finite(module: nn.Module) -> str:
    """Why the outputs of a copy with random weights are not finite."""
    for name, weight in named_weights(module).items():
        if not bool(weight.isfinite().all()):
            return f"its {name} holds NaN or infinity: look for the step at which training diverged"
    return "its outputs are not finite with the random weights on which it is tried"


def is_half(value: Any) -> bool:
    """Whether a value is a tensor of 16-bit floats."""
    return isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)


def silence(module: nn.Module, removals: Iterable[Removal]) -> None:
    """Set all entries of units to 0, in place."""
    weights = named_weights(module)
    with torch.no_grad():
        for removal in removals:
            for member in removal.layer.members:
                weight = weights[member.parameter]
                weight.masked_fill_(member.spread(removal.gone, weight, fill=False), 0.0)
    drop_caches(module)


def negate(module: nn.Module, layer: GroupLayer) -> None:
    """Change the signs of what units put out before any activation, in place."""
    weights = named_weights(module)
    with torch.no_grad():
        for member in layer.members:
            if not member.consumes:
                weights[member.parameter].neg_()
    drop_caches(module)


def shake(module: nn.Module) -> None:
    """Change all parameters as rounding might, in place."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in dict.fromkeys(module.parameters()):
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.mul_(1.0 + 8.0 * torch.finfo(parameter.dtype).eps * noise)
    drop_caches(module)


def outputs_of_modules(
    model: nn.Module, run: Callable[[nn.Module], object]
) -> dict[str, list[Tensor]]:
    """Path → what the module puts out in all of its calls."""
    seen: dict[str, list[Tensor]] = {}

    def record(path: str, *given: Any) -> None:
        seen.setdefault(path, []).extend(tensors_of(given[-1]))

    with ExitStack() as hooks, torch.no_grad():
        for path, module in model.named_modules():
            hooks.enter_context(module.register_forward_hook(partial(record, path)))
        run(model)
    return seen


def choices(units: int, least: int, parts: int = 1, step: int = 1) -> Iterator[Tensor]:
    """Some units, one more, all but one, as many as may go; those of the choice before are included.

    Where units are of several parts, one after the other, as many of each go: a multiple of ``step``.
    """
    each, generator = units // parts, torch.Generator().manual_seed(0)
    least = -(-least // step) * step
    some = max(step, -(-each // 3) // step * step)
    order = torch.stack([_going(each, some, generator) for _ in range(parts)])
    for count in sorted({some, some + step, each - max(least, step), each - least}):
        if 0 < count <= each - least:
            gone = torch.zeros(parts, each, dtype=torch.bool)
            yield gone.scatter_(1, order[:, :count], True).flatten()


def _going(units: int, some: int, generator: torch.Generator) -> Tensor:
    """All units in an order that no layout could share, and that shows where one is told by its index.

    The first one leads, so that every other one moves. Those that go with it come before the place where the
    shorter tensor ends, so that what stands there is met by another one, or by none. The last one, next, shows
    those that are counted from the end; the one that stays longest is none of the late ones, which shows halves.
    """
    inner = torch.randperm(max(units - 2, 0), generator=generator) + 1
    is_early = inner < units - some
    early, late = inner[is_early], inner[~is_early]
    first, last = torch.tensor([0]), torch.arange(1, units)[-1:]
    return torch.cat([first, early[: some - 1], last, late, early[some - 1 :]])


def tensors_in(values: Any) -> list[Tensor]:
    """All tensors in nested values: lists, dicts of any class, dataclasses, namespaces, distributions.

    Other objects, such as caches of keys and values, are looked into where nothing else holds a tensor.
    """
    found, closed = _opened(values, _is_open)
    return found or _opened(closed, lambda value: hasattr(value, "__dict__"))[0]


def _opened(values: Any, is_open: Callable[[Any], bool]) -> tuple[list[Tensor], list[Any]]:
    """The tensors in nested values and in the objects that are opened, and what has not been opened."""
    found: list[Tensor] = []
    closed: list[Any] = []
    seen: dict[int, Any] = {}  # holds what it knows by address
    waiting = tree_leaves(values)
    while waiting:
        value = waiting.pop(0)
        if isinstance(value, Tensor):
            found.append(value)
        elif not is_open(value):
            closed.append(value)
        elif id(value) not in seen:
            seen[id(value)] = value
            held = dict(value) if isinstance(value, Mapping) else vars(value)
            waiting[:0] = tree_leaves(held)
    return found, closed


def _is_open(value: Any) -> bool:
    kinds = (Mapping, SimpleNamespace, torch.distributions.Distribution)
    return isinstance(value, kinds) or (is_dataclass(value) and not isinstance(value, type))


def tensors_of(outputs: Any) -> list[Tensor]:
    """Copies of all tensors in what a module puts out, with its numbers and arrays of numbers as tensors."""
    tensors = [tensor.detach().clone() for tensor in tensors_in(outputs)]
    return [*tensors, *_numbers_in(outputs)]


def _numbers_in(outputs: Any) -> Iterator[Tensor]:
    for value in tree_leaves(outputs):
        if isinstance(value, float):
            yield torch.tensor(value, dtype=torch.float64)
        elif type(value).__module__ == "numpy" and value.dtype.kind == "f":
            yield torch.as_tensor(value.astype("float64"))


def agree(one: Sequence[Tensor], other: Sequence[Tensor], tolerance: float = 1e-4) -> bool:
    """Whether two outputs agree, but for how sums are rounded.

    Args:
        one: tensors.
        other: tensors that should be the same.
        tolerance: relative to the largest value of each tensor.
    """
    if [tensor.shape for tensor in one] != [tensor.shape for tensor in other]:
        return False
    inexact = [
        (as_real(a), as_real(b))
        for a, b in zip(one, other, strict=True)
        if a.is_floating_point() or a.is_complex()
    ]
    if not inexact:
        return all(map(torch.equal, one, other))
    return all(
        torch.allclose(a, b, rtol=0.0, atol=tolerance * _largest(a) + 1e-9, equal_nan=True)
        for a, b in inexact
        if a.numel()
    )


def as_real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _largest(tensor: Tensor) -> float:
    """The largest finite value."""
    return float(tensor.nan_to_num(0.0, 0.0, 0.0).abs().max())


def one_line(error: Exception) -> str:
    """An error as part of a sentence."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__

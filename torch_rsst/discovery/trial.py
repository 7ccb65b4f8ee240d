"""Trials on copies of modules: random weights, zeroed units, outputs that agree or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
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


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """A dense copy in eval mode whose parameters and statistics are away from where they begin."""
    module = deep_copy(module)
    module.eval()  # which returns nothing in some classes
    refs = masked_refs(module.modules())
    for ref in refs:  # fractions in masks say nothing about the structure
        assert ref.mask is not None, "masked_refs() lists masked refs"
        ref.mask.copy_(ref.mask != 0)
    restore(refs)
    if any(is_half(p) for p in module.parameters()):
        module.float()
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

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
    """A randomized copy and its outputs; with weights of the module's own signs where others give NaN."""
    whole = randomized(module, seed)
    outputs = run(whole)
    if not are_finite(outputs):
        take_signs(whole, module)
        outputs = run(whole)
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

    handles = [m.register_forward_hook(partial(record, path)) for path, m in model.named_modules()]
    try:
        with torch.no_grad():
            run(model)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def choices(units: int, least: int, parts: int = 1, step: int = 1) -> Iterator[Tensor]:
    """Some units, then all but one, then as many as may go; those of the choice before are included.

    Where units are of several parts, one after the other, as many of each go: a multiple of ``step``.
    """
    each, generator = units // parts, torch.Generator().manual_seed(0)
    least = -(-least // step) * step
    some = max(step, -(-each // 3) // step * step)
    order = torch.stack([_going(each, some, generator) for _ in range(parts)])
    for count in dict.fromkeys((some, each - max(least, step), each - least)):
        if 0 < count <= each - least:
            gone = torch.zeros(parts, each, dtype=torch.bool)
            yield gone.scatter_(1, order[:, :count], True).flatten()


def _going(units: int, some: int, generator: torch.Generator) -> Tensor:
    """All units in an order that no layout could share, and that shows where one is told by its index.

    The first one leads, so that every other one moves, and the last one follows on some. These come before
    the place where the shorter tensor ends, so that what stands there is met by another one, or by none.
    """
    shuffled = torch.randperm(units, generator=generator)
    inner = shuffled[(shuffled > 0) & (shuffled < units - 1)]
    is_early = inner < units - some
    inner = torch.cat([inner[is_early], inner[~is_early]])
    first, last = torch.tensor([0]), torch.arange(1, units)[-1:]
    return torch.cat([first, inner[: some - 1], last, inner[some - 1 :]])


def tensors_of(outputs: Any) -> list[Tensor]:
    """Copies of all tensors in what a module puts out."""
    leaves = tree_leaves(outputs)
    return [leaf.detach().clone() for leaf in leaves if isinstance(leaf, Tensor)]


def agree(one: Sequence[Tensor], other: Sequence[Tensor], tolerance: float = 1e-4) -> bool:
    """Whether two outputs agree, but for how sums are rounded.

    Args:
        one: tensors.
        other: tensors that should be the same.
        tolerance: relative to the largest value of each tensor.
    """
    if [tensor.shape for tensor in one] != [tensor.shape for tensor in other]:
        return False
    return all(
        torch.allclose(a, b, rtol=0.0, atol=tolerance * _largest(a) + 1e-9, equal_nan=True)
        for a, b in zip(one, other, strict=True)
        if a.numel() and a.is_floating_point()
    )


def _largest(tensor: Tensor) -> float:
    """The largest finite value."""
    return float(tensor.nan_to_num(0.0, 0.0, 0.0).abs().max())


def one_line(error: Exception) -> str:
    """An error as part of a sentence."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__

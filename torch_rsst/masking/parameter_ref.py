"""A place that holds a parameter: find it, check that it can be masked, read its mask."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torch_rsst.distributed.dtensor import placed_like
from torch_rsst.distributed.fsdp import reshard
from torch_rsst.masking.dense_scope import check_masks_in_place
from torch_rsst.masking.live_weight import MASK, ORIG, loses_renormalization
from torch_rsst.masking.mask_undo import has_own_memory
from torch_rsst.utils.errors import listing, message, refuse, shown
from torch_rsst.utils.iterables import items

MASKABLE = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


Parameter: TypeAlias = tuple[nn.Module, str]
"""How PyTorch's pruning calls name a parameter."""


@dataclass(frozen=True)
class ParameterRef:
    """A place that holds a parameter: ``module`` and the parameter's dense name in it."""

    module: nn.Module
    name: str

    @property
    def key(self) -> str:
        """The parameter's name in the module now."""
        return self.name + ORIG if self.is_masked else self.name

    @property
    def held(self) -> nn.Parameter | None:
        """What the module has there, if anything."""
        return self.module._parameters.get(self.key)

    @property
    def original(self) -> nn.Parameter:
        """The trainable parameter, ``weight_orig`` where masked, else ``weight``."""
        found = self.held
        assert found is not None, "check_ref() lets no other parameter in"
        return found

    @property
    def is_masked(self) -> bool:
        """Whether ``weight_orig`` and ``weight_mask`` both exist."""
        has_orig = self.module._parameters.get(self.name + ORIG) is not None
        return has_orig and self.module._buffers.get(self.name + MASK) is not None

    @property
    def mask(self) -> Tensor | None:
        """The mask buffer, in the parameter's dtype; None where dense."""
        return self.module._buffers[self.name + MASK] if self.is_masked else None

    @property
    def alive(self) -> Tensor | None:
        """The current mask as bool, distributed as the parameter is; None where dense (all alive)."""
        return None if self.mask is None else placed_like(self.mask != 0, self.original)

    @property
    def alive_entries(self) -> Tensor:
        """The same, all ones where dense."""
        alive = self.alive
        return torch.ones_like(self.original, dtype=torch.bool) if alive is None else alive

    def __str__(self) -> str:
        return f"'{self.name}' of {type(self.module).__name__}"


def dense_name(module: nn.Module, key: str) -> str:
    """The name that parameter ``key`` of ``module`` has when nothing is pruned."""
    name = key.removesuffix(ORIG)
    return name if name != key and ParameterRef(module, name).is_masked else key


def check_ref(module: object, name: object) -> ParameterRef:
    """The reference to a parameter that can be masked.

    Raises:
        TypeError: unless given a module and a string.
        ValueError: where the name is no maskable parameter; says which are.
    """
    if not isinstance(module, nn.Module) or not isinstance(name, str):
        got = f"({type(module).__name__}, {shown(name)})"
        remedy = "Pass for example (model.fc, 'weight')."
        refuse(TypeError, "parameter", "a (module, name) pair", got, remedy)
    ref = ParameterRef(module, name)
    check_masks_in_place(f"parameter {ref}", [module])
    reshard([module])
    if ref.is_masked:
        return ref
    subject = f"parameter {ref}"
    own = [dense_name(module, key) for key, p in module._parameters.items() if p is not None]
    check_not_parametrized(ref)
    if name.endswith(ORIG) and name.removesuffix(ORIG) in own:
        remedy = f"Pass {name.removesuffix(ORIG)!r}: masks of one parameter combine."
        got = "the original of a parameter that is masked already"
        refuse(ValueError, subject, "a dense parameter name", got, remedy)
    parameter = module._parameters.get(name)
    if parameter is None:
        remedy = f"It has {listing(own)}." if own else "It has no parameters of its own."
        refuse(ValueError, subject, "one of the module's parameters", "none", remedy)
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        remedy = "Run one forward pass first, so that its shape is known."
        refuse(ValueError, subject, "an initialized parameter", "a lazy one", remedy)
    if taken := [key for key in (name + ORIG, name + MASK) if _is_taken(module, key)]:
        expected = f"{name + ORIG!r} and {name + MASK!r} to be free names"
        got = f"one in use: {taken[0]!r}"
        remedy = "Rename it: this is where PyTorch's pruning keeps the weights and the mask."
        refuse(ValueError, subject, expected, got, remedy)
    if name == "weight" and loses_renormalization(module):
        got = f"max_norm={module.max_norm} in a table with a forward of its own"
        remedy = "Set max_norm to None: there it would write to a product that is thrown away."
        refuse(ValueError, subject, "a weight that its module does not write to", got, remedy)
    if parameter.layout != torch.strided:
        got, remedy = str(parameter.layout), "Call to_dense() first."
        refuse(ValueError, subject, "a dense tensor", got, remedy)
    if not has_own_memory(parameter):
        expected, got = "entries with memory of their own", "an expanded tensor"
        remedy = "Clone it first: its entries cannot be masked one by one."
        refuse(ValueError, subject, expected, got, remedy)
    if parameter.dtype not in MASKABLE:
        expected = f"one of {', '.join(map(str, MASKABLE))}"
        remedy = "Cast it first, or leave it out: only such weights can be pruned."
        refuse(ValueError, subject, expected, parameter.dtype, remedy)
    return ref


def check_not_parametrized(ref: ParameterRef) -> None:
    """Raise a ValueError for a name that ``torch.nn.utils.parametrize`` has made a computed one."""
    if parametrize.is_parametrized(ref.module, ref.name):
        remedy = (
            "Call torch.nn.utils.parametrize.remove_parametrizations first, or mask what the "
            f"parametrization computes from, such as 'parametrizations.{ref.name}.original'."
        )
        refuse(ValueError, f"parameter {ref}", "a plain parameter", "a parametrized one", remedy)


def _is_taken(module: nn.Module, key: str) -> bool:
    registries = (module._parameters, module._buffers, module._modules, module.__dict__)
    return any(key in registry for registry in registries) or hasattr(type(module), key)


def parameter_list(parameters: object) -> list[Any]:
    """What a user lists to be ranked, as a list; any iterable but a string will do.

    Raises:
        TypeError: for anything else.
    """
    found = items(parameters)
    if found is None:
        raise TypeError(_not_pairs(type(parameters).__name__))
    return found


def ref_of(pair: object) -> ParameterRef:
    """The reference to a (module, name) pair.

    Raises:
        TypeError, ValueError: for no such pair, or as :func:`check_ref` does.
    """
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
        raise TypeError(_not_pairs(shown(pair)))
    return check_ref(*pair)


def _not_pairs(got: str) -> str:
    remedy = "Pass a list such as [(model.fc, 'weight')]."
    return message("parameters", expected="(module, name) pairs", got=got, remedy=remedy)


def check_has_values(ref: ParameterRef) -> None:
    """Raise a ValueError for a parameter on the meta device: it can be masked, but not ranked."""
    if ref.original.is_meta:
        remedy = "Materialize the model first: load_state_dict(…, assign=True), or to_empty."
        got = "a parameter on the meta device"
        refuse(ValueError, f"parameter {ref}", "values", got, remedy)


def check_scores(ref: ParameterRef, scores: Tensor | None) -> Tensor:
    """What a parameter is ranked by: ``weight_orig``, or the scores that were given.

    Raises:
        TypeError: unless given a tensor of numbers.
        ValueError: for another shape than the parameter's.
    """
    if scores is None or ref.is_masked:
        check_has_values(ref)
    if scores is None:
        return ref.original.detach()
    subject = f"importance_scores for {ref}"
    remedy = "Give every entry of the parameter one score."
    if not isinstance(scores, Tensor) or scores.is_complex() or scores.dtype == torch.bool:
        got = str(scores.dtype) if isinstance(scores, Tensor) else type(scores).__name__
        refuse(TypeError, subject, "a tensor of numbers", got, remedy)
    if scores.shape != ref.original.shape:
        expected = f"shape {tuple(ref.original.shape)}"
        got = f"shape {tuple(scores.shape)}"
        refuse(ValueError, subject, expected, got, remedy)
    integers = scores.numel() and not scores.is_floating_point()
    if integers and max(int(scores.max()), -int(scores.min())) > 1 << 53:
        expected, got = "integers within ±2**53, which float64 tells apart", "larger ones"
        refuse(ValueError, subject, expected, got, "Scale them down.")
    return placed_like(scores.detach(), ref.original)


def masked_refs(modules: Iterable[nn.Module]) -> list[ParameterRef]:
    """Every parameter of the modules that is masked, by whatever pruning method."""
    return [
        ParameterRef(module, key.removesuffix(ORIG))
        for module in modules
        for key in module._parameters
        if key.endswith(ORIG) and ParameterRef(module, key.removesuffix(ORIG)).is_masked
    ]

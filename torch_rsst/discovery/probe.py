"""Runs modules to check that the units which an adapter offers can be cut exactly."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves, tree_map

from torch_rsst.discovery.adapter import Adapter, Call, family, is_of_torch
from torch_rsst.discovery.examples import guesses
from torch_rsst.discovery.fixed_width import why_mixed
from torch_rsst.discovery.trial import (
    agree,
    are_finite,
    as_real,
    choices,
    is_half,
    negate,
    one_line,
    silence,
    tensors_in,
    tensors_of,
    tried,
    why_not_finite,
)
from torch_rsst.groups.groups import GroupLayer
from torch_rsst.groups.surgery import Removal, cut, module_at
from torch_rsst.masking.live_weight import MASK
from torch_rsst.masking.names import named_weights
from torch_rsst.masking.parameter_ref import ParameterRef
from torch_rsst.utils.errors import refuse, shown
from torch_rsst.utils.module_state import deep_copy, undisturbed

Fact = tuple[Any, ...]

ON_META = "its weights are on the meta device, so that it cannot be run"
_PLAIN = (int, float, str, bool, type(None))
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_REMOVE = "parametrize.remove_parametrizations"
_REMOVERS = {WeightNorm: "remove_weight_norm", SpectralNorm: "remove_spectral_norm"}
"""Hooks of PyTorch that make a weight of others → what takes them off, in :mod:`torch.nn.utils`."""
_DRAWS = 8
"""How often weights are drawn for a trial, until an output shows that units are gone."""


@dataclass(frozen=True)
class Verdict:
    """What a check found; nothing is set where units can be cut.

    Attributes:
        refused: why these are no units.
        fixed: why they can be masked but not cut.
        least: how many must stay for the module to run.
    """

    refused: str = ""
    fixed: str = ""
    least: int = 0


@dataclass(frozen=True, eq=False)
class Probe:
    """Checks units on copies of modules with random weights; the model itself is left as it is.

    Attributes:
        model: whose modules are checked.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments for the model;
            None: modules get random tokens, or what they get when the model runs on a guess.
    """

    model: nn.Module
    example_inputs: Any = None
    _verdicts: dict[Fact, Verdict] = field(default_factory=dict)
    _failures: dict[Fact, str | None] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any) -> Probe:
        """A probe; a model that does not run on the inputs it is given raises a ValueError here."""
        probe = cls(model, example_inputs)
        if example_inputs is not None:
            _ = probe._recorded
        return probe

    def check(self, module: nn.Module, adapter: Adapter, layer: GroupLayer) -> Verdict:
        """Whether units can be cut from a module exactly.

        Args:
            module: that holds the units.
            adapter: that found them.
            layer: the units, by names within the module.
        """
        if is_on_meta(module):
            return Verdict(refused=ON_META)
        call, error = self.call_of(module, layer, adapter)
        if call is None:
            return Verdict(refused=error)
        alike = (type(adapter), self.signature(module), signature_of_call(call))
        if alike not in self._verdicts:
            self._verdicts[alike] = check_on(module, adapter, layer, call)
        return self._verdicts[alike]

    def _why_not_run(self, module: nn.Module, error: str) -> str:
        if self.example_inputs is None:
            return f"it cannot be run alone ({error}); pass example_inputs"
        if module in self._recorded:
            return f"it does not run once more on what it gets from example_inputs ({error})"
        return "it is not called when the model runs on example_inputs; pass some on which it is"

    def two_calls(self, module: nn.Module, layer: GroupLayer) -> list[Call]:
        """Two different inputs that the module runs on, or none; of other lengths if these fit."""
        call, _ = self.call_of(module, layer, family(layer.family) if layer.family else None)
        return [] if call is None else [call, other_call(module, call)]

    def call_of(
        self, module: nn.Module, layer: GroupLayer, adapter: Adapter | None
    ) -> tuple[Call | None, str]:
        """The first arguments that fit a module; or None, and why none do."""
        error = "it is not called when the model runs on its example"
        signature = self.signature(module)
        for call in self.calls(module, layer, adapter):
            alike = (signature, signature_of_call(call))
            if alike not in self._failures:
                self._failures[alike] = _failure(module, call)
            if (failure := self._failures[alike]) is None:
                return call, ""
            error = failure
        return None, self._why_not_run(module, error)

    def calls(
        self, module: nn.Module, layer: GroupLayer, adapter: Adapter | None
    ) -> Iterator[Call]:
        """Arguments that the module may take, the likeliest first."""
        given = self.example_inputs is not None
        if given and module in self._recorded:
            yield self._recorded[module]
        if adapter is not None:
            yield from adapter.examples(module)
        if given:
            return
        tokens = adapter is not None and not adapter.whole_model
        if tokens:
            yield from _tokens(module, layer)
        if module in self._recorded:
            yield self._recorded[module]
        if tokens:
            yield from _tokens(module, layer, sequence=False)

    def signature(self, module: nn.Module) -> Fact:
        """What two modules share that differ in the values of their tensors only."""
        return tuple(
            (
                path,
                type(part),
                tuple(
                    (k, _fact(v))
                    for k, v in sorted(vars(part).items())
                    if k not in _OF_EVERY_MODULE and (type(part), k) not in self._numberings
                    if not k.startswith("_") or isinstance(v, _PLAIN)
                ),
                tuple((k, _fact(t)) for k, t in part._parameters.items()),
                tuple(
                    (k, _fact(t), _flag(t))
                    for k, t in part._buffers.items()
                    if not k.endswith(MASK)
                ),
                tuple(map(id, (*part._forward_hooks.values(), *part._forward_pre_hooks.values()))),
            )
            for path, part in module.named_modules()
        )

    @cached_property
    def _numberings(self) -> set[tuple[type[nn.Module], str]]:
        """Attributes that hold the number of a module's block, such as ``layer_idx``: no settings.

        They are integers that equal the last number in the path of every module of a class, for more than
        two numbers.
        """
        seen: dict[tuple[type[nn.Module], str], set[tuple[int, int]]] = {}
        for path, module in self.model.named_modules():
            numbers = [int(part) for part in path.split(".") if part.isdigit()]
            for key, value in vars(module).items():
                if type(value) is int:
                    pairs = seen.setdefault((type(module), key), set())
                    pairs.add((value, numbers[-1] if numbers else -1))
        return {
            key for key, pairs in seen.items() if len(pairs) > 2 and all(a == b for a, b in pairs)
        }

    @cached_property
    def _recorded(self) -> dict[nn.Module, Call]:
        """What each module gets when the model runs on its example, or on the first fitting guess."""
        if self.example_inputs is not None:
            return record_calls(self.model, self.example_inputs)
        for guess in guesses(self.model):
            try:
                return record_calls(self.model, guess)
            except Exception:
                continue
        return {}


def other_call(module: nn.Module, call: Call) -> Call:
    """Other random inputs, of another length if the module runs on them."""
    longer = tree_map(_longer, tree_map(_other, call))
    found: Call = longer if _failure(module, longer) is None else tree_map(_other, call)
    return found


def record_calls(model: nn.Module, example_inputs: Any) -> dict[nn.Module, Call]:
    """What each module gets when the model runs on the example inputs, in eval mode.

    Single layers of PyTorch are left out: they are tried as parts of others only, and copies take long.
    """
    recorded: dict[nn.Module, Call] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module not in recorded:  # copied: modules may write to what they are given
            recorded[module] = tree_map(_copied, (args, kwargs))

    with ExitStack() as hooks:
        for module in model.modules():
            if module._modules or not is_of_torch(module):
                hooks.enter_context(module.register_forward_pre_hook(record, with_kwargs=True))
        with undisturbed(model):
            run_example(model, example_inputs)
    return recorded


def run_on(model: nn.Module, example_inputs: Any) -> Any:
    """Call a model with a tensor, a tuple of positional, or a dict of keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    return model(*(example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)))


def run_example(model: nn.Module, example_inputs: Any) -> Any:
    """Call a model with inputs of the user, and name them where it does not run on them.

    Raises:
        ValueError: with what the model says.
    """
    try:
        return run_on(model, example_inputs)
    except Exception as error:
        got = f"{shown(example_inputs)} ({one_line(error)})"
        remedy = "Pass inputs of the size, dtype and device that the model takes."
        refuse(ValueError, "example_inputs", "inputs that the model runs on", got, remedy)


def output_error(one: nn.Module, other: nn.Module, example_inputs: Any) -> tuple[float, float]:
    """The largest difference between the outputs of two models in eval mode, and the largest output.

    Infinite where the outputs are not of the same shapes.

    Raises:
        ValueError: where the first does not run on these inputs.
    """
    outputs = []
    for model, run in ((one, run_example), (other, run_on)):
        with undisturbed(model):
            tensors = tensors_in(run(model, tree_map(_copied, example_inputs)))
        outputs.append([tensor for tensor in tensors if tensor.numel()])
    if [tensor.shape for tensor in outputs[0]] != [tensor.shape for tensor in outputs[1]]:
        return float("inf"), float("nan")
    pairs = [(as_real(a).double(), as_real(b).double()) for a, b in zip(*outputs, strict=True)]
    error = max((float((a - b).abs().max()) for a, b in pairs), default=0.0)
    return error, max((float(a.abs().max()) for a, _ in pairs), default=0.0)


def run_call(module: nn.Module, call: Call) -> Any:
    """Call a module with copies of some arguments."""
    args, kwargs = tree_map(_copied, call)
    return module(*args, **kwargs)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, nn.Module):
        return value
    try:
        return copy.deepcopy(value)  # caches of keys and values are written to
    except Exception:
        return value


def check_on(module: nn.Module, adapter: Adapter, layer: GroupLayer, call: Call) -> Verdict:
    """Whether units can be cut from a module exactly, by one call of it."""
    with undisturbed(module):
        return _check(module, adapter, layer, call)


def _check(
    module: nn.Module, adapter: Adapter, layer: GroupLayer, call: Call, draw: int = 0
) -> Verdict:
    weights = named_weights(module)
    if missing := [m.parameter for m in layer.members if m.parameter not in weights]:
        return Verdict(refused=_why_missing(module, missing[0]))
    given, call = call, tree_map(lambda v: v.float() if is_half(v) else v, call)
    whole, before = tried(module, lambda copied: outputs_on(copied, call), draw)
    if not are_finite(before):
        return Verdict(refused=why_not_finite(module))
    differs, exact = False, None
    mixes = (lambda *_: None) if adapter.told_apart else _why_mixed
    least = max(adapter.least, layer.least)
    for gone, negated in _trials(layer, least):
        removal = Removal(layer, gone)
        # Each choice has the units of the one before: so parameters need no copy of their own.
        masked = deep_copy(whole, {id(parameter): parameter for parameter in whole.parameters()})
        if negated:
            negate(masked, layer)
        else:
            silence(masked, [removal])
        expected = outputs_on(masked, call)
        differs = differs or not (negated or agree(before, expected))
        if not differs and draw + 1 < _DRAWS:  # no unit that goes was active
            return _check(module, adapter, layer, given, draw + 1)
        try:
            cut(masked, [removal])
            got = outputs_on(adapter.shrink(masked, removal), call)
        except Exception as error:
            if differs and bool(gone.all()):
                return Verdict(least=1)  # some may go, but not all
            if mixed := mixes(module, layer, given):
                return Verdict(refused=mixed)
            text = "it does not run without some of its units, as where its forward fixes how many it has"
            return Verdict(fixed=f"{text} ({one_line(error)})")
        if not agree(expected, got):
            mixed = None if exact else mixes(module, layer, given)
            if exact is not None and not mixed and bool(gone.all()):
                return Verdict(least=1)  # some may go, but not all
            return Verdict(refused=mixed or "its output without some of its units differs")
        exact = differs  # shown by outputs that units changed
    # On few tokens, no unit may be active at all: larger inputs show a difference if any can.
    mixed = None if differs else mixes(module, layer, given)
    if mixed and layer.units <= least:
        mixed = too_few(layer.kind, layer.units)
    return Verdict(refused=mixed or "")


def _why_missing(module: nn.Module, name: str) -> str:
    """Why a weight is none of the parameters by which a module is known."""
    path, _, own = name.rpartition(".")
    holder = module_at(module, path)
    if own in holder._parameters or ParameterRef(holder, own).is_masked:
        return f"its {name} is tied to another parameter of it"
    kinds = {type(hook) for hook in holder._forward_pre_hooks.values()}
    removers = [remedy for kind, remedy in _REMOVERS.items() if kind in kinds]
    remedy = f"torch.nn.utils.{(removers or [_REMOVE])[0]}(module, {own!r})"
    made = f"its {name} is made of other parameters, as by weight_norm or spectral_norm"
    return f"{made}: take that off before you find groups, with {remedy}"


def _trials(layer: GroupLayer, least: int) -> Iterator[tuple[Tensor, bool]]:
    """Which units go in each trial; or the same ones again, with signs that are changed before it, to stay so.

    Neurons are tried with both signs: what is active nowhere with one of them is so with the other, and the
    largest of some that stay is 0 or not.
    """
    for gone in choices(layer.units, least, len(layer.parts), layer.multiple):
        yield gone, False
        if layer.kind == "neurons" and not gone.all():
            yield gone, True


def is_on_meta(module: nn.Module) -> bool:
    """Whether a module has parameters without values."""
    return any(parameter.is_meta for parameter in module.parameters())


def too_few(kind: str, units: int) -> str:
    """Why no unit can go where all are needed."""
    return f"it has no more {kind} than it needs to run ({units})"


def _why_mixed(module: nn.Module, layer: GroupLayer, call: Call) -> str | None:
    """On the module itself: the forward of a copy may be bound to the module it was copied from."""
    try:
        with undisturbed(module):
            return why_mixed(module, layer, *call)
    except Exception as error:
        return f"its units cannot be told apart ({one_line(error)})"


def outputs_on(module: nn.Module, call: Call) -> list[Tensor]:
    """What a module puts out for copies of some arguments."""
    with torch.no_grad():
        return tensors_of(run_call(module, call))


def _tokens(module: nn.Module, layer: GroupLayer, *, sequence: bool = True) -> Iterator[Call]:
    """Random tokens, or a random feature map, as the layer that puts the units out takes them.

    Without ``sequence``, one token per sample.
    """
    first = layer.members[0]
    inner = module_at(module, first.parameter.rpartition(".")[0])
    weight = named_weights(module)[first.parameter]
    generator = torch.Generator().manual_seed(0)
    between = (4,) * sequence
    shapes: list[tuple[int, ...]]
    if isinstance(inner, nn.Conv2d):
        shapes = [(2, inner.in_channels, 4, 4)] if sequence else []
    elif isinstance(inner, nn.Linear):
        shapes = [(2, *between, inner.in_features)]
    else:  # which of its dimensions meets the input is not known
        widths = dict.fromkeys(weight.shape if weight.ndim > 1 else ())
        shapes = [(2, *between, width) for width in widths]
    for shape in shapes:
        yield (torch.randn(shape, generator=generator).to(weight),), {}


def signature_of_call(call: Call | None) -> Fact:
    """What two calls share that differ in the values of their tensors only."""
    return tuple(_fact(value) for value in tree_leaves(call))


def _fact(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype, value.device)
    if isinstance(value, _PLAIN):
        return (type(value), value)
    if isinstance(value, (tuple, list)):
        return tuple(map(_fact, value))
    return id(value)


def _flag(buffer: Tensor | None) -> Any:
    """The value of a buffer that holds one number, as a setting may; of others, nothing."""
    return buffer.item() if buffer is not None and buffer.ndim == 0 and not buffer.is_meta else None


def _other(value: Any) -> Any:
    """Other random numbers of the same spread; what is no tensor of floats stays."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    return noise.to(value) * value.std() if value.numel() > 1 else value


def _longer(value: Any) -> Any:
    """One token more: what a unit emits may depend on how many there are."""
    is_tokens = isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3
    return torch.cat([value, value[:, :1]], dim=1) if is_tokens else value


def _failure(module: nn.Module, call: Call) -> str | None:
    """What a module raises when it is called like this, if anything."""
    try:
        with undisturbed(module):
            run_call(module, call)
    except Exception as failure:
        return str(failure)
    return None

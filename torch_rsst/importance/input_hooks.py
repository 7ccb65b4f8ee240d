"""Hooks that record the inputs of the layers that consume units, while a model runs in eval mode."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from torch_rsst.distributed.dtensor import is_sharded, local, placed_like
from torch_rsst.groups.groups import NO_UNIT, GroupLayer, Groups, Member
from torch_rsst.masking.masked_product import masked_operand
from torch_rsst.masking.names import named_refs
from torch_rsst.masking.parameter_ref import ParameterRef
from torch_rsst.utils import module_state
from torch_rsst.utils.errors import refuse


@dataclass(frozen=True, eq=False)
class Share:
    """The features that the units of one layer have in the input of a layer that consumes them.

    Attributes:
        layer: the position of the units' layer among the groups.
        index: features of the input that belong to a unit.
        unit: the unit of each of these.
    """

    layer: int
    index: Tensor
    unit: Tensor


@dataclass(frozen=True, eq=False)
class HookedInput:
    """The input of a layer that consumes units.

    Attributes:
        name: of the layer's weight.
        ref: its module and weight.
        dim: the dimension of the weight that meets the input.
        axis: the dimension of the input along which the features lie, from the end.
        size: how many features there are.
        shares: which of them belong to which units.
        stack: of stacked weights, the index of the one that meets this input; None where there is one.
    """

    name: str
    ref: ParameterRef
    dim: int
    axis: int
    size: int
    shares: tuple[Share, ...]
    stack: int | None = None


_EXPERTS = "_experts_implementation"
_INDEX = Tensor.__getitem__
_MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)

Record: TypeAlias = Callable[[HookedInput, Tensor], Tensor]
"""``(hooked, input) → the input that the layer is called with``."""


def hooked_inputs(model: nn.Module, groups: Groups) -> list[HookedInput]:
    """The inputs at which the outputs of all units can be recorded; of tied weights, at all their places.

    Raises:
        ValueError: for a layer of units none of whose members consumes them.
    """
    refs = named_refs(model)
    shares: dict[tuple[str, int | None], list[tuple[Member, Share]]] = {}
    for position, layer in enumerate(groups.layers):
        for member in _consumers(layer, refs):
            rows = (
                enumerate(member.unit_of) if member.unit_of.ndim > 1 else [(None, member.unit_of)]
            )
            for stack, unit_of in rows:
                owned = unit_of != NO_UNIT
                share = Share(position, owned.nonzero().flatten(), unit_of[owned])
                shares.setdefault((member.parameter, stack), []).append((member, share))
    return [
        HookedInput(
            name,
            ref,
            found[0][0].dim,
            _axis(ref.module),
            found[0][0].unit_of.shape[-1],
            tuple(share for _, share in found),
            stack,
        )
        for (name, stack), found in shares.items()
        for ref in refs[name]
    ]


def _consumers(layer: GroupLayer, refs: Mapping[str, list[ParameterRef]]) -> list[Member]:
    """The members whose entries meet an input that can be recorded."""
    marked = [
        (member, ref)
        for member in layer.members
        if member.consumes
        and member.dim == _input_dim((ref := refs[member.parameter][0]).module, member.dim)
    ]
    seen = [member for member, ref in marked if not _within_recurrent(ref)]
    if not seen:
        remedy = "magnitude and remain need none."
        if marked:
            kind = type(marked[0][1].module).__name__
            got = (
                f"{', '.join(m.parameter for m, _ in marked)}, which a {kind} applies within itself"
            )
            remedy = f"Pass importance='magnitude', or leave out these units: {remedy}"
        else:
            got = "none"
            remedy = (
                "Mark the weight of the layer that consumes the units with consumes=True, as find_groups "
                f"does; {remedy}"
            )
        expected = "a member that consumes the units"
        refuse(ValueError, f"activations of {layer}", expected, got, remedy)
    return seen


def _within_recurrent(ref: ParameterRef) -> bool:
    """Whether a recurrent layer applies a weight to what no other module sees: states, inputs of later layers."""
    return isinstance(ref.module, nn.RNNBase) and not ref.name.startswith("weight_ih_l0")


def _meets_arguments(ref: ParameterRef) -> bool:
    """Whether the weight of a module meets what the module is called with.

    Of a weight with a name of its own nobody knows: the functions that it is passed to tell.
    """
    return ref.name in ("weight", "in_proj_weight") or isinstance(ref.module, nn.RNNBase)


def _input_dim(module: nn.Module, dim: int) -> int:
    """The dimension of a module's weight that meets its input; ``dim`` where its class is not known."""
    if isinstance(module, _ConvTransposeNd):
        return 0
    return 1 if isinstance(module, (nn.Linear, _ConvNd)) else dim


def _axis(module: nn.Module) -> int:
    return -1 - len(module.kernel_size) if isinstance(module, _ConvNd) else -1


@contextmanager
def recorded(inputs: Sequence[HookedInput], record: Record) -> Iterator[None]:
    """Call ``record`` with each of these inputs whenever a layer receives it; its result replaces the input.

    Modules that are called have a forward pre-hook. Where a module is not called, or holds a weight of another
    name, and the weight is passed to ``F.linear``, to a product of matrices or, as in attention, to
    ``F.multi_head_attention_forward``, these functions are intercepted. So are those that multiply by one of
    several stacked weights; experts run one after the other meanwhile.
    """
    within: set[int] = set()
    with ExitStack() as stack:
        for hooked in inputs:
            module = hooked.ref.module
            if hooked.stack is not None:
                stack.callback(_run_experts_singly(getattr(module, "config", None)))
                continue
            if not _meets_arguments(hooked.ref):
                continue

            def before(
                module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                hooked: HookedInput = hooked,
            ) -> tuple[tuple[Any, ...], dict[str, Any]]:
                within.add(id(hooked.ref.original))
                if args:
                    return (_packed(record, hooked, args[0]), *args[1:]), kwargs
                name = next(iter(kwargs))
                return args, {**kwargs, name: _packed(record, hooked, kwargs[name])}

            def after(*_: Any, hooked: HookedInput = hooked) -> None:
                within.discard(id(hooked.ref.original))

            hook = module.register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(hook.remove)
            stack.callback(module.register_forward_hook(after, always_call=True).remove)
        stack.enter_context(_Functions(inputs, record, within))
        yield


def _packed(record: Record, hooked: HookedInput, value: Any) -> Any:
    """Record an input; of packed sequences, their entries."""
    if isinstance(value, PackedSequence):
        return value._replace(data=record(hooked, value.data))
    return record(hooked, value)


def _run_experts_singly(config: Any) -> Callable[[], None]:
    """Let experts of transformers run one by one, not in fused kernels; returns what undoes it."""
    before = getattr(config, _EXPERTS, None)
    if before is None:
        return lambda: None
    setattr(config, _EXPERTS, "eager")
    return lambda: setattr(config, _EXPERTS, before)


class _Functions(TorchFunctionMode):
    """Records the inputs that are passed to functions together with the weight of a consumer."""

    def __init__(self, inputs: Sequence[HookedInput], record: Record, within: set[int]) -> None:
        super().__init__()
        self._inputs = {id(h.ref.original): h for h in inputs if h.stack is None}
        self._stacks: dict[int, dict[int, HookedInput]] = {}
        for hooked in inputs:
            if hooked.stack is not None:
                self._stacks.setdefault(id(hooked.ref.original), {})[hooked.stack] = hooked
        self._record, self._within = record, within
        # Products of weights and masks, and single ones of stacked weights.
        self._products: Any = WeakTensorKeyDictionary()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """See :class:`torch.overrides.TorchFunctionMode`."""
        kwargs = kwargs or {}
        if func is F.linear:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            if (hooked := self._hooked(weight)) is not None:
                if args:
                    args = (self._record(hooked, args[0]), *args[1:])
                else:
                    kwargs = {**kwargs, "input": self._record(hooked, kwargs["input"])}
        elif func is F.multi_head_attention_forward:
            given = inspect.signature(func).bind(*args, **kwargs).arguments
            if (hooked := self._hooked(given["out_proj_weight"])) is not None:
                return self._attend(hooked, given)
        elif len(args) == 2:
            args = (self._multiplied(func, *args), args[1])
        made = func(*args, **kwargs)
        operand = id(masked_operand(func, args))
        if (found := self._inputs.get(operand) or self._stacks.get(operand)) is not None:
            self._products[made] = found
        elif (
            func is _INDEX
            and made.ndim == 2
            and isinstance(args[1], (int, Tensor))
            and (every := self._stack_of(args[0]))
        ):
            self._products[made] = every[int(args[1])]
        return made

    def _multiplied(self, func: Any, value: Any, weight: Any) -> Any:
        """The first operand of a product with a weight, with one of stacked ones, or with all of them, recorded."""
        if func in _MATMULS and (hooked := self._hooked(weight)) is not None and weight.ndim == 2:
            return self._record(hooked, value)
        if func is torch.bmm and (every := self._stack_of(weight)):
            return torch.stack([self._record(every[i], each) for i, each in enumerate(value)])
        return value

    def _stack_of(self, weights: Any) -> dict[int, HookedInput]:
        """The inputs of stacked weights, or of their product with a mask."""
        found = self._stacks.get(id(weights)) or self._products.get(weights)
        return found if isinstance(found, dict) else {}

    def _hooked(self, weight: Any) -> HookedInput | None:
        """The input that a weight belongs to; None within a call of its module, which has a hook."""
        hooked: Any = self._inputs.get(id(weight))
        if hooked is None and isinstance(weight, Tensor):
            hooked = self._products.get(weight)
        known = isinstance(hooked, HookedInput) and id(hooked.ref.original) not in self._within
        return hooked if known else None

    def _attend(self, hooked: HookedInput, given: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Run attention with an identity as its output layer, then apply that layer here.

        The function offers no other way to see the input of its output layer.
        """
        weight, bias = given["out_proj_weight"], given["out_proj_bias"]
        identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        changed = {**given, "out_proj_weight": identity, "out_proj_bias": None}
        attended, weights = F.multi_head_attention_forward(**changed)
        return F.linear(self._record(hooked, attended), weight, bias), weights


@contextmanager
def undisturbed(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Run a model in eval mode under masks; afterwards everything is as before.

    Args:
        model: without wrappers.
        masks: bool, by dense name; a parameter without one is wholly alive.
    """
    gradients = torch.is_grad_enabled()
    sharded = any(is_sharded(parameter) for parameter in model.parameters())
    with ExitStack() as stack:
        stack.enter_context(module_state.undisturbed(model, managed=sharded))
        stack.enter_context(torch.set_grad_enabled(gradients))
        # Its copies of weights were made under other masks, or outside of a graph.
        stack.callback(torch.clear_autocast_cache)
        stack.enter_context(_masked_by(model, masks))
        torch.clear_autocast_cache()
        yield


@contextmanager
def _masked_by(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Use other masks for a while, by writing values: no module is changed."""
    changed: list[tuple[Tensor, Tensor]] = []

    def set_to(tensor: Tensor, value: Tensor) -> None:
        changed.append((tensor, tensor.clone()))
        tensor.copy_(value)

    try:
        for name, places in named_refs(model).items():
            for ref in places:
                # By .data: no version counter moves, so that a graph which waits for backward stays valid.
                if (mask := ref.mask) is not None:
                    own = local(mask.data)
                    alive = placed_like(masks[name], mask) if name in masks else None
                    wanted = torch.ones_like(own) if alive is None else local(alive).to(own.dtype)
                    if not torch.equal(own, wanted):
                        set_to(own, wanted)
                elif name in masks:
                    own = local(ref.original.data)
                    dead = ~local(placed_like(masks[name], ref.original))
                    if bool(dead.any()):
                        set_to(own, own.masked_fill(dead, 0.0))
        yield
    finally:
        for tensor, before in reversed(changed):
            tensor.copy_(before)

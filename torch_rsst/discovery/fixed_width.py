"""Tell units apart in a module that does not run without some of them: whose forward fixes its width."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_rsst.discovery.trial import tensors_of
from torch_rsst.groups.groups import NO_UNIT, GroupLayer
from torch_rsst.groups.surgery import module_at


class _Seen(Exception):  # noqa: N818 - control flow: the input we wanted is there
    """Ends a forward pass early."""


MIXED = "its units mix before the output layer, so that none can be removed exactly"
NOT_FED = "its input layer does not feed its output layer"


def why_mixed(
    module: nn.Module, layer: GroupLayer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """Why units cannot be told apart, or None where each reaches its own inputs of the next layer alone.

    Args:
        module: holds the units; run in the mode that it is in.
        layer: the units, by names within the module: linear layers that put them out, one that takes
            them in.
        args: positional arguments that the module runs on.
        kwargs: and keyword arguments.
    """
    taking = [member for member in layer.ranked if member.consumes]
    giving = [member for member in layer.ranked if not member.consumes]
    layers = [module_at(module, m.parameter.rpartition(".")[0]) for m in (*taking, *giving)]
    if len(taking) != 1 or not giving or not all(isinstance(m, nn.Linear) for m in layers):
        return "it does not run without some of its units"
    consumer, producers = layers[0], layers[1:]
    some = _half_of(layer.units)
    unit = torch.isin(taking[0].unit_of, some)
    disturbed = [torch.isin(member.unit_of, some) for member in giving]
    everything = [member.unit_of != NO_UNIT for member in giving]
    run = partial(module, *args, **kwargs)
    with torch.no_grad():
        before = _input_of(consumer, run)
        with _disturb(producers, disturbed):
            after = _input_of(consumer, run)
        # What removing all units does to the layer that takes them in.
        with consumer.register_forward_pre_hook(_zeros):
            without = tensors_of(run())
            with _disturb(producers, everything):
                still = tensors_of(run())
    if before.shape != after.shape or before.shape[-1:] != unit.shape:
        return "its output layer gets inputs of an unexpected shape"
    changed = (before != after).reshape(-1, unit.numel()).any(0).cpu()
    if bool(changed[~unit].any()):
        return MIXED
    if not bool(changed[unit].any()):
        return NOT_FED
    if not all(map(torch.equal, without, still)):
        return "its units also reach its output around the output layer"
    return None


def _half_of(units: int) -> Tensor:
    """Half of the units in no order that a layout could share; the only one, if there is one."""
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(units, generator=generator)[: max(1, units // 2)]


def _input_of(consumer: nn.Module, run: Callable[[], object]) -> Tensor:
    seen: list[Tensor] = []

    def capture(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].detach().clone())
        raise _Seen

    with consumer.register_forward_pre_hook(capture, prepend=True), suppress(_Seen):
        run()
    if not seen:
        raise RuntimeError("its output layer was not called")
    return seen[0]


def _zeros(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (torch.zeros_like(inputs[0]), *inputs[1:])


@contextmanager
def _disturb(producers: Sequence[nn.Module], features: Sequence[Tensor]) -> Iterator[None]:
    with ExitStack() as stack:
        for producer, which in zip(producers, features, strict=True):

            def replace(_: nn.Module, __: object, output: Tensor, which: Tensor = which) -> Tensor:
                # Positive and much larger than before, so that no activation hides the difference.
                return torch.where(which.to(output.device), output.abs() + 10.0, output)

            stack.enter_context(producer.register_forward_hook(replace))
        yield

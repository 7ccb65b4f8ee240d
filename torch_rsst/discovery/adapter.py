"""The contract of an adapter, the registry, and the probe that adapters check themselves with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torch_rsst.errors import unknown_choice
from torch_rsst.groups import GroupLayer


@dataclass(frozen=True)
class Unsupported:
    """A module that looks like a family, and why its units cannot be offered."""

    layer: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.layer or 'the model'} ({self.kind}): {self.reason}"


class Adapter(Protocol):
    """Knows one family of modules by its type and structure."""

    kind: str

    def find(self, name: str, module: nn.Module, probe: Probe) -> GroupLayer | Unsupported | None:
        """The units of ``module``, why they cannot be offered, or None for another family.

        Args:
            name: the module's dotted name in the model, "" for the model itself.
            module: looked at, never changed.
            probe: runs the module to check that its units are what they seem.
        """
        ...


KINDS = ("heads", "neurons", "channels")
ADAPTERS: list[Adapter] = []


def register(adapter: Adapter) -> Adapter:
    """Add a family. The latest is asked first; the first that knows a module answers for it.

    Returns:
        the adapter that was given.

    Raises:
        ValueError: for a kind that :func:`torch_rsst.find_groups` does not ask for.
    """
    if adapter.kind not in KINDS:
        raise ValueError(unknown_choice(f"kind of {type(adapter).__name__}", adapter.kind, KINDS))
    ADAPTERS.insert(0, adapter)
    return adapter


class _Seen(Exception):  # noqa: N818 - control flow: the input we wanted is there
    """Ends a forward pass early."""


@dataclass(frozen=True)
class Probe:
    """Runs single modules to see which inputs of one depend on which outputs of another.

    Attributes:
        inputs: module → the (args, kwargs) that it got in a run of the model on the user's
            example inputs. Other modules get random tokens.
    """

    inputs: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)

    def why_mixed(
        self,
        module: nn.Module,
        producer: nn.Linear,
        consumer: nn.Linear,
        rows: Tensor,
        columns: Tensor,
    ) -> str | None:
        """Check that every unit reaches its own inputs of the next layer, and nothing else.

        Args:
            module: run on its own.
            producer: its layer that puts the units out.
            consumer: its layer that takes them in.
            rows: the unit of each of the producer's outputs, int64.
            columns: the unit of each of the consumer's inputs, int64.

        Returns:
            None if so, else the reason why the units cannot be told apart.
        """
        if producer.weight.device.type == "meta":
            return "its weights are on the meta device, so that it cannot be run"
        some = _half_of(int(columns.max()) + 1)
        unit = torch.isin(columns, some)
        everything = torch.ones_like(rows, dtype=torch.bool)
        args, kwargs = self.inputs.get(module, ((_tokens(producer),), {}))
        try:
            with undisturbed(module):
                before = _input_of(consumer, module, args, kwargs)
                with _disturb(producer, torch.isin(rows, some)):
                    after = _input_of(consumer, module, args, kwargs)
                with _silence(consumer):
                    without = _output_of(module, args, kwargs)
                    with _disturb(producer, everything):
                        still = _output_of(module, args, kwargs)
        except Exception as error:
            return f"it does not run on (batch, tokens, features) ({error}); pass example_inputs"
        if before.shape != after.shape or before.shape[-1:] != unit.shape:
            return "its output layer gets inputs of an unexpected shape"
        if not all(bool(tensor.isfinite().all()) for tensor in (before, *without)):
            return "its activations are not finite, so that its units cannot be told apart"
        changed = (before != after).reshape(-1, unit.numel()).any(0).cpu()
        if bool(changed[~unit].any()):
            return "its units mix before the output layer, so that none can be removed exactly"
        if not bool(changed[unit].any()):
            return "its input layer does not feed its output layer"
        if not all(map(torch.equal, without, still)):
            return "its units also reach its output around the output layer"
        return None


def _half_of(units: int) -> Tensor:
    """Half of the units in no order that a layout could share; the only one, if there is one."""
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(units, generator=generator)[: max(1, units // 2)]


def _tokens(layer: nn.Linear) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 4, layer.in_features, generator=generator)
    return tokens.to(layer.weight)


def _input_of(
    consumer: nn.Linear, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    seen: list[Tensor] = []

    def capture(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].detach().clone())
        raise _Seen

    handle = consumer.register_forward_pre_hook(capture, prepend=True)
    try:
        module(*args, **kwargs)
    except _Seen:
        pass
    finally:
        handle.remove()
    if not seen:
        raise RuntimeError("its output layer was not called")
    return seen[0]


def _output_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    leaves = tree_leaves(module(*args, **kwargs))
    return [leaf.detach().clone() for leaf in leaves if isinstance(leaf, Tensor)]


@contextmanager
def _silence(consumer: nn.Linear) -> Iterator[None]:
    """What removing all units does to the layer that takes them in."""

    def zero(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.zeros_like(inputs[0]), *inputs[1:])

    handle = consumer.register_forward_pre_hook(zero)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _disturb(producer: nn.Linear, features: Tensor) -> Iterator[None]:
    def replace(_: nn.Module, __: object, output: Tensor) -> Tensor:
        # Positive and much larger than before, so that no activation hides the difference.
        return torch.where(features.to(output.device), output.abs() + 10.0, output)

    handle = producer.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Run the block in eval mode without gradients; put back modes, RNG, buffers and attributes."""
    modes = [(m, m.training) for m in module.modules()]
    attributes = [
        (m, {k: v for k, v in m.__dict__.items() if isinstance(v, Tensor)}) for m, _ in modes
    ]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    devices = [p.device for p in module.parameters() if p.device.type == "cuda"]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=set(devices)):
            module.eval()
            yield
    finally:
        for m, training in modes:
            m.training = training
        for m, tensors in attributes:
            m.__dict__.update(tensors)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)

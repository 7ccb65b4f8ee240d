"""Follow the channels of a model through one run of it."""

# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torch_rsst.discovery.channels import entry_rules, layer_rules, moving_rules
from torch_rsst.discovery.channels.ledger import Ledger
from torch_rsst.discovery.channels.walk import OUTPUT, RULES, UNLABELED, Walk, unknown
from torch_rsst.discovery.trial import tensors_in
from torch_rsst.masking.names import without_wrappers
from torch_rsst.utils.module_state import kept_state

RULE_FILES = (entry_rules, layer_rules, moving_rules)
"""Imported for the rules that they register."""


class _Follow(TorchDispatchMode):
    """Applies the rule of every operator that runs."""

    def __init__(self, walk: Walk, names: Mapping[Tensor, str]) -> None:
        super().__init__()
        self.walk = walk
        self.names = names

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = tensors_in([args, kwargs])
        for parameter in given:
            if isinstance(parameter, nn.Parameter) and parameter in self.names:
                self.walk.ledger.unseen.discard(self.names[parameter])
        namespace, _, name = func._schema.name.partition("::")
        schema = func._schema.arguments
        arguments = {a.name: value for a, value in zip(schema, args, strict=False)} | kwargs
        left_out = [a for a in schema if a.name not in arguments and a.has_default_value()]
        arguments |= {a.name: a.default_value for a in left_out}
        if namespace != "aten":
            name = f"{namespace}::{name}"
        apply = RULES.get(name) or RULES.get(name.removesuffix("_")) or unknown
        apply(self.walk, name.removesuffix("_"), arguments, out)
        self.walk.weigh(given, tensors_in([out]))
        return out


def follow(model: nn.Module, ledger: Ledger, runs: Sequence[Callable[[], Any]]) -> None:
    """Run a model and write down which entries of its parameters and buffers belong to a channel.

    Args:
        model: dense.
        ledger: to write to; the parameters and buffers of the model are entered first.
        runs: call the model, whose state is put back. What one of them raises is raised here, after what it has done.
    """
    walk = Walk(ledger, paths={m: without_wrappers(p) for p, m in model.named_modules()})
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    ledger.unseen.update(names.values())
    for name, parameter in model.named_parameters():
        fields = ledger.enter(without_wrappers(name), parameter, buffer=False)
        walk.put(parameter, fields, weight=True)
    for name, buffer in model.named_buffers():
        fields = ledger.enter(without_wrappers(name), buffer, buffer=True)
        walk.put(buffer, fields, weight=True)
    for module, path in walk.paths.items():
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and walk.labels(value) is UNLABELED:
                walk.put(value, (), attribute=f"{path}.{key}" if path else key)
    for run in runs:
        running = running_modules(model, walk.running)
        with kept_state(model), torch.no_grad(), _without_mkldnn(), running, _Follow(walk, names):
            out = run()
        for tensor in tensors_in([out]):
            walk.freeze(walk.labels(tensor).fields, OUTPUT)


@contextmanager
def _without_mkldnn() -> Iterator[None]:
    """MKL-DNN has one operator for a whole LSTM, in place of those that are followed."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


@contextmanager
def running_modules(model: nn.Module, running: list[nn.Module]) -> Iterator[None]:
    """Keep the modules that are running in a list, the innermost last."""

    def enter(module: nn.Module, *_: object) -> None:
        running.append(module)

    def leave(*_: object) -> None:
        running.pop()

    running.clear()
    with ExitStack() as hooks:
        for module in model.modules():
            hooks.enter_context(module.register_forward_pre_hook(enter))
            hooks.enter_context(module.register_forward_hook(leave))
        yield

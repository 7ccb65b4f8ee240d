"""Put modules back exactly as they were where a call fails: all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn

from torch_rsst.distributed.fsdp import rename_parameter
from torch_rsst.masking.live_weight import MASK, ORIG
from torch_rsst.masking.mask_undo import restore_callbacks
from torch_rsst.masking.parameter_ref import ParameterRef
from torch_rsst.utils.module_state import contents_back


@contextmanager
def place_kept(ref: ParameterRef) -> Iterator[None]:
    """Put the parameter back to its place in the module, whatever name the block gives it, and its mask among the others.

    Optimizers address parameters by position, averages (EMA, SWA) buffers, too.
    """
    registry, names = ref.module._parameters, (ref.name + ORIG, ref.name)
    order = list(registry)
    yield
    now = next((name for name in names if name in registry), None)
    reorder(registry, [now if key in names else key for key in order])
    _order_masks(ref.module)


def reorder(registry: dict[Any, Any], order: Iterable[Any]) -> None:
    """Let keys of ``order`` come first, as they stand there, and others after them.

    In place: hooks, optimizers and parametrizations may hold the registry itself.
    """
    keys = [key for key in dict.fromkeys([*order, *registry]) if key in registry]
    if keys != list(registry):
        for key in keys:
            registry[key] = registry.pop(key)


def _order_masks(module: nn.Module) -> None:
    """Let masks, where they stand among the buffers, be in the order of their parameters, not that of their making."""
    originals = [key for key in module._parameters if key.endswith(ORIG)]
    order = {key.removesuffix(ORIG) + MASK: i for i, key in enumerate(originals)}
    keys = list(module._buffers)
    masks = iter(sorted((key for key in keys if key in order), key=order.__getitem__))
    reorder(module._buffers, [next(masks) if key in order else key for key in keys])


class AllOrNothing:
    """Put modules back exactly as they were if the block raises, interrupts included.

    Gives a list for what else must be called then, the last one first, once the modules are back. All
    of it may be called twice.

    A class, not a generator: one that is interrupted on its way out waits at its ``yield`` until
    somebody drops the exception, and would put things back then.
    """

    def __init__(
        self, refs: Sequence[ParameterRef], *, written: Sequence[ParameterRef] | None = None
    ) -> None:
        """Note what is there.

        Args:
            refs: whose modules may change.
            written: those with masks whose values may change; by default the same.
        """
        self._sites, self._written = refs, refs if written is None else written
        self._undo: list[Callable[[], object]] = []

    def __enter__(self) -> list[Callable[[], object]]:
        modules = {id(ref.module): ref.module for ref in self._sites}.values()
        masks = {id(ref.mask): ref.mask for ref in self._written if ref.mask is not None}
        self._masks_back = restore_callbacks(list(masks.values()))
        self._modules_back = [step for module in modules for step in _steps_back(module)]
        return self._undo

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            return
        names_back = [partial(_restore_parameter_name, ref) for ref in self._sites]
        with torch.no_grad():
            _to_the_end(
                [*self._modules_back, *names_back, *reversed(self._undo), *self._masks_back]
            )


def _to_the_end(steps: Sequence[Callable[[], object]]) -> None:
    """Call all, whatever fails or interrupts, and raise that afterwards."""
    raised: BaseException | None = None
    for step in steps:
        while True:
            try:
                step()
            except KeyboardInterrupt as interrupt:
                raised = interrupt
                continue
            except BaseException as error:
                raised = error
            break
    if raised is not None:
        raise raised


def _restore_parameter_name(ref: ParameterRef) -> None:
    now, other = ref.name, ref.name + ORIG
    if other in ref.module._parameters:
        now, other = other, now
    rename_parameter(ref.module, other, now)


def _steps_back(module: nn.Module) -> list[Callable[[], object]]:
    """What puts a module's class, attributes, registries and other dicts, lists and sets back.

    In place: hook handles hold weak references to registries.
    """
    attributes = module.__dict__
    found = [each for each in attributes.values() if isinstance(each, (dict, list, set))]
    class_back = partial(object.__setattr__, module, "__class__", type(module))
    return [class_back, *map(contents_back, [attributes, *found])]

"""Why a model does not run without some units: which group leaves out what its units touch."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from torch import nn

from torch_rsst.groups.groups import GroupLayer
from torch_rsst.groups.surgery import Removal, buffer_shape
from torch_rsst.masking.names import named_buffers, places_of, without_wrappers
from torch_rsst.utils.errors import listing, message, one_line

HAND_MADE = (
    "Groups made by hand may leave out what their units touch: use find_groups(model). "
    "If it found them, please report the model."
)


def why_not_run(small: nn.Module, removals: Sequence[Removal], error: BaseException) -> str:
    """The text of an error that names the group, and what is missing in it.

    Args:
        small: does not run.
        removals: what was cut out of it.
        error: what it raises.
    """
    cut = [removal for removal in removals if removal.count]
    layers = [removal.layer for removal in cut if not removal.layer.family]
    place, module = _where(small, error.__traceback__)
    own = _tensors_of(small, place)
    there = [layer for layer in layers if own & _listed([layer])] or layers
    remedy = HAND_MADE
    if missing := sorted(own - _listed([removal.layer for removal in cut])):
        remedy = (
            f"Its members and buffers do not list {listing(missing)}: add what its units touch. "
            f"{HAND_MADE}"
        )
    elif layers:
        remedy = f"Check dim and unit_of of its members, and what they leave out. {HAND_MADE}"
    subject = f"groups of {there[0]}" if there else "compact"
    got = f"an error in {place or 'the model'} ({module}: {one_line(error)})"
    return message(
        subject, expected="a model that runs without some of its units", got=got, remedy=remedy
    )


def _where(model: nn.Module, trace: TracebackType | None) -> tuple[str, str]:
    """The path and the class of the innermost module of a model that an error came through."""
    paths = {module: without_wrappers(path) for path, module in model.named_modules()}
    found: nn.Module = model
    while trace is not None:
        caller = trace.tb_frame.f_locals.get("self")
        if isinstance(caller, nn.Module) and caller in paths:
            found = caller
        trace = trace.tb_next
    return paths[found], type(found).__name__


def _tensors_of(model: nn.Module, path: str) -> set[str]:
    """The parameters and buffers that have a size, of the module at a path itself."""
    names = named_buffers(model).keys() | places_of(model).keys()
    own = {name for name in names if name.rpartition(".")[0] == path}
    return {name for name in own if buffer_shape(model, name) != ()}  # a counter of batches, say


def _listed(layers: Sequence[GroupLayer]) -> set[str]:
    return {m.parameter for layer in layers for m in (*layer.members, *layer.buffers)}

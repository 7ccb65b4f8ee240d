"""Let what is frozen in a model stay frozen in what compaction makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

from torch_rsst.distributed.dtensor import placed_like
from torch_rsst.groups.surgery import Shortened, select
from torch_rsst.masking.freezing import Heirs, heirs_of_parameter
from torch_rsst.masking.names import named_refs


def heirs_of(
    model: nn.Module, small: nn.Module, successors: Mapping[nn.Parameter, Shortened | None]
) -> Heirs:
    """What would hold of the parameters of ``small`` what is held of those of ``model``.

    Args:
        model: compacted.
        small: what it has become.
        successors: parameter of ``model`` → what it has become; None for those that are gone.
    """
    now = {refs[0].original: refs[0] for refs in named_refs(small).values()}
    heirs: Heirs = {}
    for refs in named_refs(model).values():
        old = refs[0].original
        if (new := successors[old]) is not None:
            cut = partial(_cut, old, new)
            heirs = heirs_of_parameter(refs, now[new.parameter], cut) | heirs
    return heirs


def _cut(old: nn.Parameter, new: Shortened, entries: Tensor) -> Tensor:
    # What a constant was added to has to keep it.
    same = select(old, new.kept) == new.parameter.detach()
    return placed_like(select(entries, new.kept), same) & same

"""Cut units out of a model, whatever their kind, and make its modules run without them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from torch_rsst.discovery.adapter import family
from torch_rsst.groups.surgery import Removal, Shortened, cut, module_at, replace_module


def cut_out(
    model: nn.Module, removals: Sequence[Removal]
) -> tuple[nn.Module, dict[nn.Parameter, Shortened]]:
    """Cut units out of a model in place, and make its modules run without them.

    Args:
        model: dense, or with masks of the units alone.
        removals: of units found in it, by names within it.

    Returns:
        the model, or what takes its place, and what replaced each shortened parameter.
    """
    removals = [removal for removal in removals if removal.count]
    shortened = cut(model, removals)
    for removal in reversed(removals):  # what is inside first: an emptied module loses it
        layer = removal.layer
        if layer.family:
            adapter = family(layer.family)
            path = "" if adapter.whole_model else layer.name
            new = adapter.shrink(module_at(model, path), removal)
            model = replace_module(model, path, new)
    return model, shortened

"""Change a module's class, and keep what masks have made of it."""

from __future__ import annotations

from torch import nn

from torch_rsst.masking.live_weight import ORIG, make_live, make_plain
from torch_rsst.masking.parameter_ref import ParameterRef


def become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Make a module one of class ``cls``, in place; its masked parameters stay properties.

    Args:
        module: of a class that ``cls`` derives from, or of ``cls`` already.
        cls: a class with the same attributes, importable at module level, so that it pickles.
    """
    held = [name.removesuffix(ORIG) for name in module._parameters if name.endswith(ORIG)]
    masked = [name for name in held if ParameterRef(module, name).is_masked]
    for name in masked:
        make_plain(module, name)
    if not isinstance(module, cls):
        module.__class__ = cls
    for name in masked:
        make_live(module, name)

"""RSST and Refill: structured sparsity on top of :mod:`torch.nn.utils.prune`.

``import torch_rsst as prune`` is a drop-in for ``from torch.nn.utils import prune``: everything
that module defines is here, plus what follows in ``__all__``.

The names come from :mod:`torch_rsst.api` when the first of them is used: the command line then answers
``--help`` without the seconds that importing torch takes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torch_rsst._version import __version__ as __version__

if TYPE_CHECKING:
    from torch_rsst.api import *  # noqa: F403
    from torch_rsst.api import __all__ as __all__

_APART = ("plot", "testing")  # they import matplotlib and hypothesis


def __getattr__(name: str) -> Any:
    if name in _APART:
        return importlib.import_module(f"torch_rsst.{name}")
    if name == "__all__" or not name.startswith("__"):
        api = importlib.import_module("torch_rsst.api")
        if hasattr(api, name):
            return globals().setdefault(name, getattr(api, name))
        if name in globals():  # a submodule, which the import has put here
            return globals()[name]
    raise AttributeError(f"module 'torch_rsst' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__"), *_APART})

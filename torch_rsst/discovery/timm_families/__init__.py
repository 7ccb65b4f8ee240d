"""Modules of timm whose structure alone does not tell how to shrink them: one file per family.

Every adapter of a file that names the classes it knows is registered.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil

from torch_rsst.discovery.adapter import register
from torch_rsst.discovery.head_parts import HeadAdapter

for _file in pkgutil.iter_modules(__path__):
    with contextlib.suppress(ImportError):  # a family that this version of timm does not have
        _module = importlib.import_module(f"{__name__}.{_file.name}")
        for _class in [value for value in vars(_module).values() if isinstance(value, type)]:
            _is_own = _class.__module__ == _module.__name__
            if _is_own and issubclass(_class, HeadAdapter) and _class.classes:
                register(_class())

"""Modules of timm whose structure alone does not tell how to shrink them: one file per family."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil

for _file in pkgutil.iter_modules(__path__):
    with contextlib.suppress(ImportError):  # a family that this version of timm does not have
        importlib.import_module(f"{__name__}.{_file.name}")

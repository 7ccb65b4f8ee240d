"""Adapters for the modules of other packages, loaded once a model of theirs can exist."""

from __future__ import annotations

import importlib
import sys

FAMILIES = {
    "timm": "torch_rsst.discovery.timm_families",
    "torchvision": "torch_rsst.discovery.torchvision_families",
    "transformers": "torch_rsst.discovery.transformers_families",
}
"""Package → the module that registers adapters for it."""


def load_families() -> None:
    """Register the adapters of every package that has been imported; again, nothing happens."""
    for package, adapters in FAMILIES.items():
        if package in sys.modules:
            importlib.import_module(adapters)

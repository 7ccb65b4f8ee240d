"""Adapters for the modules of other packages, loaded once a model of theirs can exist."""

from __future__ import annotations

import contextlib
import importlib
import sys

_OF_TRANSFORMERS = "torch_rsst.discovery.transformers_families"
FAMILIES = {
    "timm": "torch_rsst.discovery.timm_families",
    "torchvision": "torch_rsst.discovery.torchvision_families",
    "transformers": _OF_TRANSFORMERS,
    "transformers.models.t5.modeling_t5": f"{_OF_TRANSFORMERS}.t5",
    "transformers.models.mt5.modeling_mt5": f"{_OF_TRANSFORMERS}.t5",
    "transformers.models.beit.modeling_beit": f"{_OF_TRANSFORMERS}.beit",
    "transformers.models.data2vec.modeling_data2vec_vision": f"{_OF_TRANSFORMERS}.beit",
}
"""Package, or a file of it that takes long to import → the module that registers adapters for it."""


def load_families() -> None:
    """Register adapters for all that has been imported; again, nothing happens."""
    for package, adapters in FAMILIES.items():
        if package in sys.modules:
            # A version of the package may lack what one of its files is about.
            with contextlib.suppress(ImportError) if "." in package else contextlib.nullcontext():
                importlib.import_module(adapters)

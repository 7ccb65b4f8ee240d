"""Modules of timm whose structure alone does not tell how to shrink them: one file per family."""

from __future__ import annotations

import contextlib
import importlib

FILES = (
    "shared_attention",
    "convolution_sizes",
    "attention_pools",
    "beit",
    "eva",
    "swin",
    "cait",
    "cross_covariance",
    "davit",
    "mvitv2",
    "hiera",
    "subsampled",
    "maxvit",
    "levit",
    "efficientformer",
    "gcvit",
    "plain_attention",
    "volo",
    "convit",
    "coat",
    "relpos",
    "efficientvit",
    "cascaded_heads",
    "bottleneck",
    "parallel",
    "parallel_differential",
)

for _file in FILES:
    with contextlib.suppress(ImportError):  # a family that this version of timm does not have
        importlib.import_module(f"{__name__}.{_file}")

"""Before a training: whether a folder will be able to build the dense model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn

from torch_rsst.masking.names import named_weights, unwrap
from torch_rsst.saving.builders import Build, as_build, build_model, guess_builds, shown_build
from torch_rsst.utils.errors import CompactionWarning, one_line, refuse


def check_build(model: nn.Module, build: Build | None, stacklevel: int = 2) -> None:
    """Try how a dense model is to be built, while there is time to correct it.

    Args:
        model: the dense model, masked or not.
        build: as for :func:`torch_rsst.save_compact`; None tries what its class and configuration suggest.
        stacklevel: of the warning.

    Raises:
        ValueError: for a ``build`` that makes another model.

    Warns:
        CompactionWarning: where what is suggested makes another model: the folder will need ``model=``.
    """
    bare = unwrap(model)
    shapes = {name: weight.shape for name, weight in named_weights(bare).items()}
    builds = list(guess_builds(bare)) if build is None else [as_build(build)]
    reason = "" if builds else _of_parts(bare)
    for each in builds:
        reason = _why_other(each, shapes)
        if not reason:
            return
    if build is not None:
        expected = f"one that makes this {type(bare).__name__}"
        remedy = "Correct it, or leave build out and pass model= to load_compact."
        refuse(ValueError, "build", expected, reason, remedy)
    if reason:
        remedy = "Pass build={'name': …, 'args': […], 'kwargs': {…}} with all arguments that the model was made with."
        text = (
            "The folder will not say how to build the dense model, so that load_compact will need model= "
            f"({reason}). {remedy if builds else 'Pass that name as module=.'}"
        )
        warnings.warn(text, CompactionWarning, stacklevel=stacklevel + 1)


def _of_parts(model: nn.Module) -> str:
    for name, part in model.named_children():
        if any(guess_builds(part)):
            return f"it could build {name!r} alone, a part of {type(model).__name__}"
    return ""


def _why_other(build: Build, shapes: Mapping[str, torch.Size]) -> str:
    """In what a build makes other parameters than these, "" where it makes them."""
    try:
        made = {name: weight.shape for name, weight in named_weights(build_model(build)).items()}
    except Exception as error:  # whatever builders raise
        return one_line(error)
    call = shown_build(as_build(build))
    for name in dict.fromkeys([*shapes, *made]):
        if shapes.get(name) != made.get(name):
            there, here = (tuple(s[name]) if name in s else "none" for s in (made, shapes))
            return f"{call} makes {name} of shape {there}, here it is {here}"
    return ""

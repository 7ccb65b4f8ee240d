"""Models as programs of :mod:`torch.export`, which run without this library."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from torch_rsst.discovery.probe import run_on
from torch_rsst.masking.mask_sets import unwrap
from torch_rsst.saving.receipt import is_rounding
from torch_rsst.utils.errors import message, refuse


def export_program(model: nn.Module, example_inputs: Any) -> bytes:
    """A model in eval mode as an exported program, for batches of any size where that can be.

    A model of transformers is exported without the cache of keys and values that it would return by
    default: a program puts out tensors alone.

    Args:
        model: not changed.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.

    Returns:
        the content of a file for :func:`torch.export.load`.

    Raises:
        ValueError: where the example asks for the cache.
        RuntimeError: where the model cannot be exported, or the program puts out something else.
    """
    if isinstance(example_inputs, Mapping) and example_inputs.get("use_cache"):
        got, remedy = "use_cache=True", "Leave it out, or pass use_cache=False."
        expected = "example_inputs that ask for no cache, which a program cannot return"
        refuse(ValueError, "export", expected, got, remedy)
    model = copy.deepcopy(unwrap(model))
    model.eval()
    _without_cache(model)
    try:
        program = _any_batch(model, example_inputs)
    except Exception:  # of as many kinds as there are reasons why a batch is fixed
        program = None
    if program is None or not _agrees(program, model, example_inputs):
        try:
            program = _export(model, example_inputs, None)
        except Exception as error:  # of as many kinds as there are things that cannot be traced
            raise RuntimeError(_not_exported(error)) from error
    if not _agrees(program, model, example_inputs):
        got, remedy = "others", "Leave export out, and please report the model."
        refuse(RuntimeError, "export", "the same outputs", got, remedy)
    content = io.BytesIO()
    torch.export.save(program, content)
    return content.getvalue()


def _without_cache(model: nn.Module) -> None:
    """Let a copy of a model, or of a part of one, return no keys and values unless it is asked to."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", None) is True:
            config.use_cache = False


def _not_exported(error: Exception) -> str:
    text = " ".join(str(error).split())[:300].rstrip(".")
    remedy = "Leave export out: the folder can be loaded without it."
    expected, got = "a model that torch.export traces", f"{type(error).__name__}: {text}"
    return message("export", expected=expected, got=got, remedy=remedy)


def _any_batch(model: nn.Module, inputs: Any) -> ExportedProgram:
    """Traced with a first dimension of all tensors that is left open."""
    # A size of 1 is taken as fixed.
    twice = tree_map(lambda v: torch.cat([v, v]) if isinstance(v, Tensor) else v, inputs)
    given = twice if isinstance(twice, (tuple, Mapping)) else (twice,)
    open_shapes = tree_map(lambda v: {0: Dim.AUTO} if isinstance(v, Tensor) else None, given)
    return _export(model, twice, open_shapes)


def _export(model: nn.Module, inputs: Any, shapes: Any) -> ExportedProgram:
    with torch.no_grad():
        if isinstance(inputs, Mapping):
            return torch.export.export(model, (), dict(inputs), dynamic_shapes=shapes)
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        return torch.export.export(model, args, dynamic_shapes=shapes)


def _agrees(program: ExportedProgram, model: nn.Module, inputs: Any) -> bool:
    outputs = []
    for run in (model, program.module()):
        copied = tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, inputs)
        with torch.no_grad():
            try:
                leaves = tree_leaves(run_on(run, copied))
            except Exception:  # a program for other batches
                return False
        outputs.append([leaf.double() for leaf in leaves if isinstance(leaf, Tensor)])
    if [tensor.shape for tensor in outputs[0]] != [tensor.shape for tensor in outputs[1]]:
        return False
    pairs = [(a, b) for a, b in zip(*outputs, strict=True) if a.numel()]
    error = max((float((a - b).abs().max()) for a, b in pairs), default=0.0)
    return is_rounding(error, max((float(a.abs().max()) for a, _ in pairs), default=0.0), model)

"""Models as programs of :mod:`torch.export`, which run without this library."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_map

from torch_rsst.compaction.compaction import is_rounding
from torch_rsst.discovery.probe import output_error
from torch_rsst.masking.mask_sets import unwrap
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
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", None) is True:
            config.use_cache = False
    try:
        program = _any_batch(model, example_inputs)
        agrees = _agrees(program, model, example_inputs)
    except Exception:  # of as many kinds as there are reasons why a batch is fixed
        agrees = False
    if not agrees:
        try:
            program = _export(model, example_inputs, None)
        except Exception as error:  # of as many kinds as there are things that cannot be traced
            text = " ".join(str(error).split())[:300].rstrip(".")
            got, remedy = (
                f"{type(error).__name__}: {text}",
                "Leave export out: the folder can be loaded without it.",
            )
            expected = "a model that torch.export traces"
            text = message("export", expected=expected, got=got, remedy=remedy)
            raise RuntimeError(text) from error
        if not _agrees(program, model, example_inputs):
            got, remedy = "others", "Leave export out, and please report the model."
            refuse(RuntimeError, "export", "the same outputs", got, remedy)
    content = io.BytesIO()
    torch.export.save(program, content)
    return content.getvalue()


def _any_batch(model: nn.Module, inputs: Any) -> ExportedProgram:
    """Traced with a first dimension of all tensors that is left open."""
    # A size of 1 is taken as fixed.
    twice = tree_map(lambda v: torch.cat([v, v]) if isinstance(v, Tensor) else v, inputs)
    given = twice if isinstance(twice, (tuple, Mapping)) else (twice,)
    return _export(
        model, twice, tree_map(lambda v: {0: Dim.AUTO} if isinstance(v, Tensor) else None, given)
    )


def _export(model: nn.Module, inputs: Any, shapes: Any) -> ExportedProgram:
    with torch.no_grad():
        if isinstance(inputs, Mapping):
            return torch.export.export(model, (), dict(inputs), dynamic_shapes=shapes)
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        return torch.export.export(model, args, dynamic_shapes=shapes)


def _agrees(program: ExportedProgram, model: nn.Module, inputs: Any) -> bool:
    runner = nn.Module()
    vars(runner)["forward"] = program.module().__call__  # its eval() is an error
    try:
        error, largest = output_error(model, runner, inputs)
    except Exception:  # a program for other batches
        return False
    return is_rounding(error, largest, model)

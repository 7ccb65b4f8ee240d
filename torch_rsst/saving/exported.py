"""Models as files that run without this library: programs of :mod:`torch.export`, and ONNX."""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_map

from torch_rsst.compaction.compaction import is_rounding
from torch_rsst.discovery.probe import output_error
from torch_rsst.masking.names import unwrap
from torch_rsst.masking.removal import remove_all
from torch_rsst.utils.errors import message, one_line, refuse
from torch_rsst.utils.module_state import deep_copy


@dataclass(frozen=True)
class Exported:
    """A file that runs without this library.

    Attributes:
        content: of the file.
        max_error: the largest difference of its outputs from those of the model.
    """

    content: bytes
    max_error: float


def export_program(model: nn.Module, example_inputs: Any) -> Exported:
    """A model in eval mode as an exported program, for batches of any size where that can be.

    A model of transformers is exported without the cache of keys and values that it would return by
    default: a program puts out tensors alone. Masks are made permanent.

    Args:
        model: not changed.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.

    Returns:
        the content of a file for :func:`torch.export.load`.

    Raises:
        ValueError: where the example asks for the cache.
        RuntimeError: where the model cannot be exported, or the program puts out something else.
    """
    model, program = _traced(_plain(model), example_inputs)
    content = io.BytesIO()
    torch.export.save(program, content)
    return Exported(content.getvalue(), _error(_runner(program), model, example_inputs))


def export_onnx(model: nn.Module, example_inputs: Any) -> Exported:
    """A model in eval mode as ONNX, run by ONNX Runtime on the CPU and compared.

    Args:
        model: not changed.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.

    Returns:
        the content of a file.

    Raises:
        ModuleNotFoundError: where a package of the extra ``onnx`` is missing.
        ValueError, RuntimeError: as for :func:`export_program`.
    """
    check_onnx()
    inputs = tree_map(lambda v: v.cpu() if isinstance(v, Tensor) else v, example_inputs)
    model, program = _traced(_plain(model).cpu(), inputs)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter, about its own insides
            converted = torch.onnx.export(program, dynamo=True, verbose=False)
            assert converted is not None
            content: bytes = converted.model_proto.SerializeToString()
            error = _error(converted, model, inputs)
    except Exception as problem:  # of as many kinds as there are operations without a counterpart
        got, remedy = one_line(problem), "Leave onnx out; torch.export (export=True) may work."
        text = message("onnx", expected="a model that ONNX can express", got=got, remedy=remedy)
        raise RuntimeError(text) from problem
    return Exported(content, error)


def check_onnx() -> None:
    """Raise a ModuleNotFoundError where a package is missing that ONNX needs."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            remedy = "pip install 'torch-rsst[onnx]'"
            text = message("onnx", expected=name, got="none", remedy=remedy)
            raise ModuleNotFoundError(text, name=error.name) from error


def _plain(model: nn.Module) -> nn.Module:
    """A copy in eval mode, without masks, that returns no cache."""
    model = remove_all(deep_copy(unwrap(model)), freeze_zeros=False)
    model.eval()
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", None) is True:
            config.use_cache = False
    return model


def _traced(model: nn.Module, inputs: Any) -> tuple[nn.Module, ExportedProgram]:
    """A model with its program, which agree."""
    if isinstance(inputs, Mapping) and inputs.get("use_cache"):
        got, remedy = "use_cache=True", "Leave it out, or pass use_cache=False."
        expected = "example_inputs that ask for no cache, which a program cannot return"
        refuse(ValueError, "export", expected, got, remedy)
    try:
        program = _any_batch(model, inputs)
        _error(_runner(program), model, inputs)
        return model, program
    except Exception:  # of as many kinds as there are reasons why a batch is fixed
        pass
    try:
        program = _export(model, inputs, None)
    except Exception as error:  # of as many kinds as there are things that cannot be traced
        got = f"{type(error).__name__}: {one_line(error)}"
        remedy = "Leave export out: the folder can be loaded without it."
        text = message(
            "export", expected="a model that torch.export traces", got=got, remedy=remedy
        )
        raise RuntimeError(text) from error
    _error(_runner(program), model, inputs)
    return model, program


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


def _runner(program: ExportedProgram) -> Callable[..., Any]:
    module: Callable[..., Any] = program.module().__call__  # its eval() is an error
    return module


def _error(run: Callable[..., Any], model: nn.Module, inputs: Any) -> float:
    """The largest difference of what a file puts out from what the model does; refused where it is more than rounding."""
    runner = nn.Module()
    vars(runner)["forward"] = run
    error, largest = output_error(model, runner, inputs)
    if not is_rounding(error, largest, model):
        got, remedy = f"others, by {error:.3g}", "Leave it out, and please report the model."
        refuse(RuntimeError, "export", "the same outputs", got, remedy)
    return error

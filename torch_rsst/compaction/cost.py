"""What a model costs: parameters, multiply-adds and measured latency of one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from torch_rsst.discovery.examples import guesses
from torch_rsst.discovery.probe import run_example, run_on
from torch_rsst.masking.names import unwrap
from torch_rsst.utils.amounts import check_count
from torch_rsst.utils.errors import check_type
from torch_rsst.utils.module_state import deep_copy, undisturbed


@dataclass(frozen=True)
class Cost:
    """What one run of a model takes.

    Attributes:
        parameters: entries of all parameters, tied ones once; masked entries are stored, so they count.
        multiply_adds: of convolutions, linear layers and matrix products, attention included; half of
            the floating point operations. What works entry by entry (activations, norms) is left out.
    """

    parameters: int
    multiply_adds: int


def count_parameters(model: nn.Module) -> int:
    """The entries of all parameters of a model, each parameter once.

    Example:
        >>> count_parameters(torch.nn.Linear(3, 4))
        16
    """
    return sum(parameter.numel() for parameter in model.parameters())


def measure_cost(model: nn.Module, example_inputs: Any) -> Cost:
    """Parameters and multiply-adds of one run of a model, in eval mode.

    Example:
        >>> measure_cost(torch.nn.Linear(3, 4), torch.randn(2, 3))
        Cost(parameters=16, multiply_adds=24)

    Shapes alone are computed, on a copy without values; a model whose shapes depend on values is run.

    Args:
        model: not changed.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; all of the
            batch counts.

    Raises:
        TypeError: unless given a module.
        Exception: what the model raises when it does not run on these inputs.
    """
    bare = unwrap(model)
    try:
        multiply_adds = _multiply_adds(shapes_of(bare).eval(), shapes_only(example_inputs))
    except Exception:  # some models read values; it raises again if at fault
        with undisturbed(bare):
            multiply_adds = _multiply_adds(bare, example_inputs)
    return Cost(count_parameters(bare), multiply_adds)


def shapes_of(model: nn.Module) -> nn.Module:
    """A copy of a model with shapes and no values: on PyTorch's meta device, taking no memory."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        # What a module keeps beside its parameters and buffers: products of masks, tables.
        held = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        for tensor in held:
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                memo[id(tensor)] = _shape_of(tensor)
    return deep_copy(model, memo)


def shapes_only(inputs: Any) -> Any:
    """Inputs with every tensor replaced by one without values."""
    return tree_map(lambda v: _shape_of(v) if isinstance(v, Tensor) else v, inputs)


def _shape_of(tensor: Tensor) -> Tensor:
    empty = tensor.detach().to("meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


def _multiply_adds(model: nn.Module, inputs: Any) -> int:
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_attention_in_steps())
        if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves(inputs)):
            stack.enter_context(torch.device("meta"))  # for what the model makes on the way
        counter = stack.enter_context(FlopCounterMode(display=False))
        run_on(model, inputs)
    return int(counter.get_total_flops()) // 2


@contextmanager
def _attention_in_steps() -> Iterator[None]:
    """Compute attention by single products: the counter does not know the fused ones of the CPU."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def guess_inputs(model: nn.Module) -> Any:
    """One sample that the model runs on, guessed from what the model says of itself; None if none fits."""
    bare = unwrap(model)
    for guess in guesses(bare):
        sample = tree_map(lambda v: v[:1] if isinstance(v, Tensor) else v, guess)
        try:
            measure_cost(bare, sample)
        except Exception:
            continue
        return sample
    return None


def time_in_turns(
    models: Sequence[nn.Module],
    example_inputs: Any,
    *,
    repeats: int = 20,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """The seconds of each run of several models, in eval mode and without gradients.

    The models take turns, so that other work on the machine slows all of them alike: compare medians.

    Args:
        models: left as they were: mode, buffers and random state are put back.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, on the device
            of the models.
        repeats: timed runs of each.
        warmup: runs of each before them.
        clock: read before and after a run. ``time.process_time`` counts what this process alone
            works, on all its threads, and is steadier where others want the cores.

    Raises:
        TypeError, ValueError: unless given modules, inputs that they run on, ``repeats`` of at least 1
            and ``warmup`` of at least 0.
    """
    check_count(repeats, "repeats", at_least=1)
    check_count(warmup, "warmup", at_least=0)
    for model in models:
        check_type(model, nn.Module, "model", "a module", "Pass the torch.nn.Module to time.")
    devices = {p.device for model in models for p in model.parameters() if p.is_cuda}

    def now() -> float:
        for device in devices:
            torch.cuda.synchronize(device)
        return clock()

    seconds: list[list[float]] = [[] for _ in models]
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(undisturbed(model))
        for _ in range(warmup + repeats):
            for model, timed in zip(models, seconds, strict=True):
                start = now()
                run_example(model, example_inputs)
                timed.append(now() - start)
    return [timed[warmup:] for timed in seconds]

"""Who carries a penalty, and when it gets its turn: around optimizers' steps, or as gradients arrive."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.hooks import RemovableHandle

from torch_rsst.utils.errors import listing, refuse
from torch_rsst.utils.optimizer_hooks import held_by, is_nested

Mode: TypeAlias = Literal["auto", "coupled", "decoupled"]
Optimizers: TypeAlias = Optimizer | Sequence[Optimizer]


@dataclass(frozen=True)
class Share:
    """The penalized parameters that are updated together, and how they are penalized."""

    names: tuple[str, ...]
    coupled: bool


def is_coupled(mode: Mode, optimizer: Optimizer | None) -> bool:
    """What a mode means for an optimizer, or without one."""
    if mode == "auto":
        return optimizer is None or isinstance(optimizer, SGD)
    return mode == "coupled"


def as_optimizers(optimizer: Optimizers, subject: str = "optimizer") -> list[Optimizer]:
    """One optimizer or several as a list, each the one that steps inside its wrappers.

    Args:
        optimizer: one, or a sequence.
        subject: what they are called in an error.

    Raises:
        TypeError: for what is no optimizer.
        ValueError: for an empty sequence.
    """
    given: Iterable[Any] = optimizer if isinstance(optimizer, Sequence) else [optimizer]
    found = [innermost(each, subject) for each in given]
    if not found:
        remedy = "Pass None to call pruner.step() yourself."
        refuse(ValueError, subject, "at least one", "an empty sequence", remedy)
    return found


def innermost(optimizer: Any, subject: str = "optimizer") -> Optimizer:
    """The optimizer inside wrappers such as Accelerate's: its hooks are the ones that run.

    Raises:
        TypeError: for what is no optimizer.
    """
    if isinstance(optimizer, LRScheduler):
        remedy = "Pass its .optimizer."
        got = type(optimizer).__name__
        refuse(TypeError, subject, "a torch optimizer", got, remedy)
    while not hasattr(optimizer, "_optimizer_step_pre_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        got = type(optimizer).__name__
        remedy = "Pass for example torch.optim.AdamW(model.parameters())."
        refuse(TypeError, subject, "a torch optimizer", got, remedy)
    return optimizer


def assign_to_optimizers(
    parameters: Mapping[str, nn.Parameter], optimizers: Sequence[Optimizer], mode: Mode
) -> list[Share]:
    """What each optimizer has to penalize.

    Raises:
        ValueError: where a parameter is in none of them, or in more than one.
    """
    updated = [set(map(id, held_by(optimizer))) for optimizer in optimizers]
    holders = {n: sum(id(p) in ids for ids in updated) for n, p in parameters.items()}
    if missing := [name for name, count in holders.items() if count == 0]:
        refuse(
            ValueError,
            "optimizer",
            "every penalized parameter in its groups",
            f"none of {listing(missing)}",
            "Make it from model.parameters(), before or after pruning; pass several "
            "optimizers as one list.",
        )
    if shared := [name for name, count in holders.items() if count > 1]:
        got = f"several with {listing(shared)}"
        remedy = "Each of them would penalize it: pass only the one that should."
        refuse(ValueError, "optimizer", "every penalized parameter in one optimizer", got, remedy)
    return [
        Share(
            tuple(name for name, p in parameters.items() if id(p) in ids),
            is_coupled(mode, optimizer),
        )
        for ids, optimizer in zip(updated, optimizers, strict=True)
    ]


def expand_step_counts(steps: list[int], optimizers: int) -> list[int]:
    """Step counts for so many optimizers; a single count holds for each.

    Raises:
        ValueError: for the counts of another number of optimizers.
    """
    if len(steps) == 1:
        return steps * optimizers
    if len(steps) != optimizers:
        expected, got = f"one with {optimizers} optimizer(s)", f"one with {len(steps)}"
        remedy = "Attach as many as the saved one had, in the same order."
        refuse(ValueError, "state of RegularizedPruner", expected, got, remedy)
    return steps


def hook_steps(
    optimizer: Optimizer,
    penalize: Callable[[Tensor | None], None],
    finish: Callable[[Tensor | None], None],
) -> list[RemovableHandle]:
    """Run ``penalize(grad_scale)`` on the gradients of each step, ``finish(found_inf)`` after it.

    Both arguments are None but under a GradScaler that leaves scale and skipping to the step. With
    a closure, ``penalize`` runs after each of its evaluations.
    """

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        if is_nested(optimizer, sys._getframe(1)):
            return None
        # PyTorch passes the optimizer itself as args[0]; the closure may follow or be a keyword.
        positional = len(args) > 1
        closure = args[1] if positional else kwargs.get("closure")
        if closure is None:
            penalize(getattr(optimizer, "grad_scale", None))
            return None

        def penalized_closure() -> Any:
            # After the closure's own zero_grad and backward: a penalty added earlier is wiped.
            loss = closure()
            penalize(None)
            return loss

        if positional:
            return (args[0], penalized_closure, *args[2:]), kwargs
        return args, {**kwargs, "closure": penalized_closure}

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # Under a GradScaler a fused optimizer skips a step for inf on the device, where nobody has to
        # wait to know: found_inf tells those that come after.
        if not is_nested(optimizer, sys._getframe(1)):
            finish(getattr(optimizer, "found_inf", None))

    return [
        optimizer.register_step_pre_hook(before),
        optimizer.register_step_post_hook(after),
    ]


def hook_gradients(
    parameters: Mapping[str, nn.Parameter], penalize: Callable[[str], None], *, need_all: bool
) -> list[RemovableHandle]:
    """Run ``penalize(name)`` whenever a backward pass has added to the gradient of a parameter.

    Raises:
        ValueError: where all are needed, and some require no gradient.
    """
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    if need_all and frozen:
        got = f"frozen {listing(frozen)}"
        remedy = "No backward pass reaches them: pass the optimizer, or unfreeze them."
        refuse(ValueError, "model", "penalized parameters that require gradients", got, remedy)

    # Not Tensor.register_hook: torch.autograd.grad would run it, and no step follows there.
    return [
        p.register_post_accumulate_grad_hook(lambda _, name=name: penalize(name))  # type: ignore[no-untyped-call]
        for name, p in parameters.items()
        if p.requires_grad
    ]

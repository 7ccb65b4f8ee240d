"""RegularizedPruner: shrink what is meant to go, step by step. Touches only the penalized set P."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from torch_rsst.budget import check_count
from torch_rsst.errors import (
    InertPenaltyWarning,
    check_keys,
    listing,
    message,
    unknown_choice,
)
from torch_rsst.masks import extract_mask, penalty_mask, unwrap
from torch_rsst.penalized_set import PenalizedSet
from torch_rsst.schedules import Schedule, resolve_schedule, strength_at

Mode: TypeAlias = Literal["auto", "coupled", "decoupled"]
GradScale: TypeAlias = float | Callable[[], float]

# One regularizer a model: two would both shrink what they share.
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[RegularizedPruner]]
_ATTACHED = weakref.WeakKeyDictionary()


class RegularizedPruner:
    """Steer a growing L2 penalty with a refill mask.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> refill_mask = {"weight": torch.tensor([[True, False]])}
        >>> with torch_rsst.RegularizedPruner(
        ...     layer, refill_mask, total_steps=10, optimizer=optimizer
        ... ) as pruner:
        ...     for _ in range(10):
        ...         optimizer.zero_grad()
        ...         layer(torch.randn(4, 2)).square().mean().backward()
        ...         optimizer.step()
        >>> pruner.steps
        10

    P = ``(refill_mask == 0) & (current_mask == 1)`` is fixed at the start; entries outside P are
    never touched, masked latents included. At step k the strength is λ = schedule(k / total_steps).

    *Coupled*: ``grad += λ · weight`` on P, so that the learning rate multiplies it.
    *Decoupled*: after the step, ``weight_orig *= 1 − min(1, λ)`` on P, whatever the learning rate.
    ``mode="auto"`` takes coupled for SGD and without an optimizer, decoupled for all others: Adam's
    denominator cancels a coupled penalty.

    With an ``optimizer``, penalty and step count run inside ``optimizer.step()``, closures,
    gradient scaling and accumulation included. Without one, hooks add the penalty in every
    backward pass and you call :meth:`step` after each ``optimizer.step()``.

    Args:
        model: the model; only its gradients (coupled) or weights (decoupled) on P change.
        refill_mask: dense parameter name → what should be alive.
        current_mask: what is alive now; the model's own masks by default. A parameter without a
            mask counts as wholly alive.
        schedule: a name from :data:`torch_rsst.schedules.SCHEDULES`, or a callable t → λ.
        strength: the λ that a named schedule ends with; a callable returns λ itself.
        total_steps: optimizer steps until t = 1; afterwards t stays 1.
        optimizer: the optimizer that updates the penalized parameters.
        mode: ``"auto"``, ``"coupled"`` or ``"decoupled"``.
        block_loss_grad: also zero the gradient of the loss on P.
        accumulation_steps: backward passes per optimizer step; used without an optimizer only.
        grad_scale: what the loss is multiplied with, a number or a callable such as
            ``scaler.get_scale``; used without an optimizer only.

    Raises:
        KeyError: for a mask of a parameter that the model does not have.
        ValueError: for a mask of the wrong shape, or an optimizer that lacks a penalized parameter.
        RuntimeError: where another regularizer is attached to the model.
    """

    def __init__(
        self,
        model: nn.Module,
        refill_mask: Mapping[str, Tensor],
        *,
        current_mask: Mapping[str, Tensor] | None = None,
        schedule: str | Schedule = "exp_custom_exponents",
        strength: float = 0.5,
        total_steps: int,
        optimizer: Optimizer | None = None,
        mode: Mode = "auto",
        block_loss_grad: bool = False,
        accumulation_steps: int = 1,
        grad_scale: GradScale | None = None,
    ) -> None:
        check_count(total_steps, "total_steps", at_least=1)
        check_count(accumulation_steps, "accumulation_steps", at_least=1)
        if mode not in ("auto", "coupled", "decoupled"):
            raise ValueError(unknown_choice("mode", mode, ("auto", "coupled", "decoupled")))
        self.schedule = resolve_schedule(schedule, strength)
        self.total_steps, self.steps = int(total_steps), 0
        strength_at(self.schedule, 1.0)
        self.block_loss_grad = block_loss_grad
        self.accumulation_steps, self.grad_scale = accumulation_steps, grad_scale
        self._requested_mode: Mode = mode
        self._model = unwrap(model)
        current = extract_mask(model) if current_mask is None else current_mask
        self._penalized = PenalizedSet(self._model, penalty_mask(current, refill_mask))
        self._optimizer: Optimizer | None = None
        self._handles: list[Any] = []
        self._hooks_fired = False
        self._start_norm = self.penalized_norm()
        self._claim()
        try:
            self._attach_hooks() if optimizer is None else self.attach(optimizer)
        except BaseException:
            self._release()
            raise

    @property
    def mode(self) -> Mode:
        """``"coupled"`` or ``"decoupled"``, decided."""
        if self._requested_mode != "auto":
            return self._requested_mode
        return (
            "coupled"
            if self._optimizer is None or isinstance(self._optimizer, SGD)
            else "decoupled"
        )

    @property
    def strength(self) -> float:
        """λ of the step in progress, number ``steps + 1``."""
        return strength_at(self.schedule, min(1.0, (self.steps + 1) / self.total_steps))

    @property
    def attached(self) -> bool:
        """Whether the penalty acts."""
        return bool(self._handles)

    def penalized_norm(self) -> float:
        """The L2 norm of the weights in P, in float64. Synchronizes the device."""
        return self._penalized.norm()

    @property
    def start_norm(self) -> float:
        """The norm of the weights in P when the regularizer was attached."""
        return self._start_norm

    @staticmethod
    def attached_to(model: nn.Module) -> RegularizedPruner | None:
        """The regularizer that is attached to a model, also where nobody holds it any more."""
        found = _ATTACHED.get(unwrap(model))
        return None if found is None else found()

    def attach(self, optimizer: Optimizer) -> None:
        """Let ``optimizer.step()`` run the penalty and count the steps, instead of gradient hooks.

        Raises:
            RuntimeError: where an optimizer is attached already, or the regularizer was removed.
            ValueError: where the optimizer does not update a penalized parameter.
        """
        optimizer = innermost(optimizer)
        if self._optimizer is not None or _ATTACHED.get(self._model) is not self._self_reference:
            got = "a second one" if self._optimizer is not None else "a removed regularizer"
            remedy = "Make a new RegularizedPruner for another optimizer."
            raise RuntimeError(
                message("attach", expected="one optimizer, once", got=got, remedy=remedy)
            )
        updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [n for n in self._penalized if id(self._penalized.parameter(n)) not in updated]
        if missing:
            raise ValueError(
                message(
                    "optimizer",
                    expected="every penalized parameter in its groups",
                    got=f"none of {listing(missing)}",
                    remedy="Make it from model.parameters(), before or after pruning.",
                )
            )
        self._detach_hooks()
        self._optimizer = optimizer
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def add_penalty(self) -> None:
        """Add λ · weight to the gradients on P, once, now.

        For gradients that no backward pass has put there, such as those of
        :func:`torch.autograd.grad`. Regular training never needs it. With ``block_loss_grad`` the
        gradient on P is replaced.

        Raises:
            RuntimeError: in decoupled mode, which leaves gradients alone, or after :meth:`remove`.
        """
        self._require_attached("add_penalty")
        if self.mode == "decoupled" and not self.block_loss_grad:
            remedy = "Call pruner.step() after the update instead, or pass mode='coupled'."
            got = "'decoupled', which shrinks weights and leaves gradients alone"
            raise RuntimeError(
                message("add_penalty: mode", expected="'coupled'", got=got, remedy=remedy)
            )
        self._penalize_gradients(self.strength)

    def step(self) -> None:
        """Count one optimizer step and, decoupled, shrink P. Call it after ``optimizer.step()``.

        Raises:
            RuntimeError: where an optimizer is attached, which does both by itself.
        """
        if self._optimizer is not None:
            remedy = "optimizer.step() counts by itself; drop this call."
            got = "an attached optimizer"
            raise RuntimeError(message("step", expected="no optimizer", got=got, remedy=remedy))
        self._require_attached("step")
        self._finish_step()

    def remove(self) -> None:
        """Detach from model and optimizer; a second call does nothing.

        Warns:
            InertPenaltyWarning: if P is not empty and its norm has not gone down.
        """
        if self._release():
            self._warn_if_inert()

    def detach(self) -> None:
        """Detach like :meth:`remove`, without judging whether the penalty acted."""
        self._release()

    def reset(self) -> None:
        """Start over after the weights were replaced: step 0, the norm of P measured anew."""
        self.steps, self._start_norm = 0, self.penalized_norm()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: steps done, steps in total, the norm of P at the start."""
        return {
            "steps": self.steps,
            "total_steps": self.total_steps,
            "start_norm": self._start_norm,
        }

    @staticmethod
    def check_state(state: Mapping[str, Any], total_steps: int) -> None:
        """Raise a ValueError unless a regularizer of ``total_steps`` can load the state."""
        check_keys(state, ("steps", "total_steps", "start_norm"), "state of RegularizedPruner")
        if state["total_steps"] != total_steps:
            raise ValueError(
                message(
                    "state of RegularizedPruner",
                    expected=f"total_steps={total_steps}",
                    got=state["total_steps"],
                    remedy="Build the regularizer with the same arguments as the saved one.",
                )
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the state was taken.

        Raises:
            ValueError: for no such state, or that of a regularizer with other ``total_steps``.
        """
        self.check_state(state, self.total_steps)
        self.steps, self._start_norm = int(state["steps"]), float(state["start_norm"])

    def __enter__(self) -> RegularizedPruner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.remove()
        else:  # a warning about the penalty would only hide the error
            self.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> RegularizedPruner:
        remedy = "Copy the model, then build a new RegularizedPruner for the copy."
        got = "deepcopy"
        raise TypeError(
            message("RegularizedPruner", expected="to stay with its model", got=got, remedy=remedy)
        )

    # How it is attached

    def _claim(self) -> None:
        if self.attached_to(self._model) is not None:
            remedy = "Remove the first: RegularizedPruner.attached_to(model).remove()."
            got = "a second one"
            raise RuntimeError(
                message("model", expected="one RegularizedPruner", got=got, remedy=remedy)
            )
        self._self_reference = weakref.ref(self)
        _ATTACHED[self._model] = self._self_reference

    def _release(self) -> bool:
        if _ATTACHED.get(self._model) is not self._self_reference:
            return False
        del _ATTACHED[self._model]
        self._detach_hooks()
        return True

    def _require_attached(self, call: str) -> None:
        if _ATTACHED.get(self._model) is not self._self_reference:
            remedy = "Make a new RegularizedPruner."
            got = "a removed one"
            raise RuntimeError(
                message(call, expected="an attached regularizer", got=got, remedy=remedy)
            )

    def _detach_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _attach_hooks(self) -> None:
        def hook_for(name: str) -> Callable[[Tensor], None]:
            def after_accumulation(parameter: Tensor) -> None:
                self._hooks_fired = True
                share = 1 if self.block_loss_grad else self.accumulation_steps
                self._penalize(name, self.strength / share, self._manual_scale())

            return after_accumulation

        parameters = {name: self._penalized.parameter(name) for name in self._penalized}
        frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
        if self.mode == "coupled" and frozen:
            raise ValueError(
                message(
                    "model",
                    expected="penalized parameters that require gradients",
                    got=f"frozen {listing(frozen)}",
                    remedy="No backward pass reaches them: pass the optimizer, or unfreeze them.",
                )
            )
        # Not Tensor.register_hook: torch.autograd.grad would run it, and no step follows there.
        self._handles = [
            p.register_post_accumulate_grad_hook(hook_for(name))  # type: ignore[no-untyped-call]
            for name, p in parameters.items()
            if p.requires_grad
        ]

    # What a step does

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        # PyTorch passes the optimizer itself as args[0]; the closure may follow or be a keyword.
        positional = len(args) > 1
        closure = args[1] if positional else kwargs.get("closure")
        if closure is None:
            self._penalize_gradients(self.strength, getattr(optimizer, "grad_scale", None))
            return None

        def penalized_closure() -> Any:
            # After the closure's own zero_grad and backward: a penalty added earlier is wiped.
            loss = closure()
            self._penalize_gradients(self.strength)
            return loss

        if positional:
            return (args[0], penalized_closure, *args[2:]), kwargs
        return args, {**kwargs, "closure": penalized_closure}

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # Under a GradScaler a fused optimizer skips a step for inf on the device, where nobody has to
        # wait to know: so is the shrinking skipped.
        self._finish_step(getattr(optimizer, "found_inf", None))

    def _finish_step(self, found_inf: Tensor | None = None) -> None:
        if self.mode == "decoupled":
            self._penalized.shrink(self.strength, found_inf)
        self.steps += 1

    def _penalize_gradients(self, strength: float, scale: Tensor | float | None = None) -> None:
        for name in self._penalized:
            self._penalize(name, strength, scale)

    def _penalize(self, name: str, strength: float, scale: Tensor | float | None) -> None:
        if self.block_loss_grad:
            self._penalized.block(name)
        if self.mode == "coupled":
            self._penalized.pull(name, strength, scale)

    def _manual_scale(self) -> float | None:
        return self.grad_scale() if callable(self.grad_scale) else self.grad_scale

    def _warn_if_inert(self) -> None:
        if not len(self._penalized) or not (self.steps or self._hooks_fired):
            return
        norm = self.penalized_norm()
        if self._start_norm > 0.0 and not norm < self._start_norm:  # NaN is not down either
            warnings.warn(
                f"The penalty did not act: the norm of the penalized weights went from "
                f"{self._start_norm:.4g} to {norm:.4g} in {self.steps} of {self.total_steps} steps "
                f"(mode {self.mode!r}, last strength {self.strength:.3g}). Pass the optimizer or "
                f"call pruner.step(), raise the strength, or use mode='decoupled'.",
                InertPenaltyWarning,
                stacklevel=3,
            )


def innermost(optimizer: Any) -> Optimizer:
    """The optimizer that steps, inside wrappers such as Accelerate's: its hooks are the ones that run.

    Raises:
        TypeError: unless there is one.
    """
    while not hasattr(optimizer, "_optimizer_step_pre_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        got, remedy = (
            type(optimizer).__name__,
            "Pass for example torch.optim.AdamW(model.parameters()).",
        )
        raise TypeError(message("optimizer", expected="a torch optimizer", got=got, remedy=remedy))
    return optimizer

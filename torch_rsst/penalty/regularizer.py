"""RegularizedPruner: shrink what is meant to go, step by step. Touches only the penalized set P."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from torch_rsst.masking.dense_scope import check_masks_in_place
from torch_rsst.masking.mask_sets import extract_mask, penalty_mask
from torch_rsst.masking.names import unwrap
from torch_rsst.penalty.hooks import (
    Mode,
    Optimizers,
    Share,
    as_optimizers,
    assign_to_optimizers,
    expand_step_counts,
    hook_gradients,
    hook_steps,
    is_coupled,
)
from torch_rsst.penalty.penalized_set import PenalizedSet
from torch_rsst.penalty.penalty_arguments import STRENGTH, GradScale, Penalty
from torch_rsst.penalty.progress import ShrinkProgress, UncountedSteps
from torch_rsst.schedules import Schedule, strength_at
from torch_rsst.utils.amounts import check_count, check_number
from torch_rsst.utils.errors import InertPenaltyWarning, check_keys, listing, refuse

_DIVERGED = "look for the step at which training diverged"
_ATTACHED: weakref.WeakSet[RegularizedPruner] = weakref.WeakSet()


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
    denominator cancels a coupled penalty. In float16 and bfloat16 a decoupled factor is multiplied up over
    the steps until it can be represented.

    A ``strength`` acts in every step, so that its effect grows with the number of steps. ``shrink_to`` says
    what is to be left of the weights in P, for any number of steps: the schedule is scaled so that the
    product of all factors is ``shrink_to``. It is decoupled.

    With an ``optimizer``, penalty and step count run inside ``optimizer.step()``, closures,
    gradient scaling and accumulation included. Several optimizers each penalize what they update,
    at the λ of their own step count and in the mode of their own. Without one, hooks add the penalty
    in every backward pass and you call :meth:`step` after each ``optimizer.step()``.

    Args:
        model: the model; only its gradients (coupled) or weights (decoupled) on P change.
        refill_mask: dense parameter name → what should be alive.
        current_mask: what is alive now; the model's own masks by default. A parameter without a
            mask counts as wholly alive.
        schedule: a name from :data:`torch_rsst.schedules.SCHEDULES`, or a callable t → λ.
        strength: the λ that a named schedule ends with; a callable returns λ itself. 0.5 by default, unless
            ``shrink_to`` is passed.
        shrink_to: what the penalty multiplies the weights in P with, over all steps until t = ``shrink_by``.
        shrink_by: the t by which it has, between 0 and 1. Afterwards λ = 0.
        total_steps: optimizer steps until t = 1; afterwards t stays 1.
        optimizer: what updates the penalized parameters: one optimizer, or a sequence of several.
        mode: ``"auto"``, ``"coupled"`` or ``"decoupled"``.
        block_loss_grad: also zero the gradient of the loss on P.
        accumulation_steps: backward passes per optimizer step; used without an optimizer only.
        grad_scale: what the loss is multiplied with, a number or a callable such as
            ``scaler.get_scale``; used without an optimizer only.

    Raises:
        KeyError: for a mask of a parameter that the model does not have.
        ValueError: for a mask of the wrong shape; where no optimizer updates a penalized parameter,
            or two do; for ``shrink_to`` with a ``strength``, a callable schedule or ``mode="coupled"``, or
            with a ``shrink_by`` before the first step.
        RuntimeError: where another regularizer is attached to the model, or penalizes one of these
            parameters.

    Warns:
        InertPenaltyWarning: where the penalty did not act by :meth:`remove`; without an optimizer also where
            several backward passes find the weights changed and :meth:`step` was not called.
    """

    def __init__(
        self,
        model: nn.Module,
        refill_mask: Mapping[str, Tensor],
        *,
        current_mask: Mapping[str, Tensor] | None = None,
        schedule: str | Schedule = "late_exponential",
        strength: float | None = STRENGTH,
        shrink_to: float | None = None,
        shrink_by: float = 1.0,
        total_steps: int,
        optimizer: Optimizers | None = None,
        mode: Mode = "auto",
        block_loss_grad: bool = False,
        accumulation_steps: int = 1,
        grad_scale: GradScale | None = None,
    ) -> None:
        penalty = Penalty(
            schedule,
            strength,
            shrink_to,
            shrink_by,
            mode,
            block_loss_grad,
            accumulation_steps,
            grad_scale,
        )
        self.total_steps = check_count(total_steps, "total_steps", at_least=1)
        self.steps_to_shrink = penalty.steps_to_shrink(self.total_steps)
        self.schedule: Schedule = penalty.schedule_of(self.total_steps)
        strength_at(self.schedule, 1.0)
        self.block_loss_grad = penalty.block_loss_grad
        self.accumulation_steps, self.grad_scale = penalty.accumulation_steps, penalty.grad_scale
        self._requested_mode = penalty.effective_mode
        self._model = unwrap(model)
        check_masks_in_place("RegularizedPruner", self._model.modules())
        current = extract_mask(model) if current_mask is None else current_mask
        self._penalized = PenalizedSet(self._model, penalty_mask(current, refill_mask))
        self._followers: list[PenalizedSet] = []
        self._norm_before_step: float | None = None  # noted for followers of a coupled penalty
        self._optimizers: list[Optimizer] = []
        self._steps = [0]  # of each optimizer
        self._shares = [Share(tuple(self._penalized), is_coupled(self._requested_mode, None))]
        self._handles: list[RemovableHandle] = []
        self._hooks_fired = self._stepped = False
        self._progress, self._uncounted = ShrinkProgress(self.total_steps), UncountedSteps()
        self._start_norm = self.penalized_norm()
        self._claim()
        try:
            self._hook() if optimizer is None else self.attach(optimizer)
        except BaseException:
            self._release()
            raise

    @property
    def mode(self) -> Mode:
        """``"coupled"`` or ``"decoupled"``, decided; ``"auto"`` where optimizers differ in it."""
        coupled = {share.coupled for share in self._shares}
        if len(coupled) > 1:
            return "auto"
        return "coupled" if True in coupled else "decoupled"

    @property
    def steps(self) -> int:
        """Steps done; with several optimizers, by the one that is furthest behind."""
        return min(self._steps)

    @property
    def strength(self) -> float:
        """λ of the step in progress, number ``steps + 1``."""
        return self._strength_of(self.steps + 1)

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

    @property
    def fell_below(self) -> int | None:
        """The step at which the norm of P fell below 1 % of ``start_norm``; None while it has not.

        Of more than 100 steps, the first that is seen: every hundredth part is looked at.
        """
        return self._progress.below(self._start_norm)

    @staticmethod
    def attached_to(model: nn.Module) -> RegularizedPruner | None:
        """The regularizer that is attached to a model, also where nobody holds it any more."""
        model = unwrap(model)
        return next((pruner for pruner in _ATTACHED if pruner._model is model), None)

    def attach(self, optimizer: Optimizers, *, replace: bool = False) -> None:
        """Let ``optimizer.step()`` run the penalty and count the steps, instead of gradient hooks.

        Args:
            optimizer: one, or a sequence of all that update penalized parameters.
            replace: take the place of an optimizer that has made no step yet.

        Raises:
            RuntimeError: where an optimizer is attached already, or the regularizer was removed.
            ValueError: where a penalized parameter is in no optimizer, or in two.
        """
        optimizers = as_optimizers(optimizer)
        if self not in _ATTACHED:
            got, remedy = "a removed regularizer", "Make a new RegularizedPruner."
            refuse(RuntimeError, "attach", "one optimizer, once", got, remedy)
        if self._optimizers and not replace:
            remedy = "It acts already: drop this call (several go into one list)."
            refuse(RuntimeError, "attach", "one optimizer, once", "a second one", remedy)
        if self._optimizers and self._stepped:
            expected = "the optimizer before the first step"
            got = f"another one after {self.steps} steps with the first"
            remedy = "Attach it when the round opens; several go into one list."
            refuse(RuntimeError, "attach", expected, got, remedy)
        shares = assign_to_optimizers(
            self._penalized.parameters(), optimizers, self._requested_mode
        )
        steps = expand_step_counts(self._steps if any(self._steps) else [0], len(optimizers))
        self._detach_hooks()
        self._optimizers, self._shares, self._steps = optimizers, shares, steps
        self._hook()

    def follow(self, modules: Iterable[nn.Module]) -> None:
        """Shrink the same weights of other modules with those of the model.

        By the same factors where the penalty is decoupled. Where it is coupled, loss and penalty act in one step:
        then by the factor by which the step has shrunk the norm of P, which waits for the device.

        Args:
            modules: averages of the model, with the same parameters, changed in place at each step.
        """
        self._followers = [self._penalized.in_other(module) for module in modules]

    def add_penalty(self) -> None:
        """Add λ · weight to the gradients on P, once, now.

        For gradients that no backward pass has put there, such as those of
        :func:`torch.autograd.grad`. Regular training never needs it. With ``block_loss_grad`` the
        gradient on P is replaced.

        Raises:
            RuntimeError: where an optimizer is attached, whose step adds it; in decoupled mode, which
                leaves gradients alone; after :meth:`remove`.
        """
        self._require_by_hand("add_penalty", "optimizer.step() adds the penalty; drop this call.")
        if self.mode == "decoupled" and not self.block_loss_grad:
            remedy = "Call pruner.step() after the update instead, or pass mode='coupled'."
            got = "'decoupled', which shrinks weights and leaves gradients alone"
            refuse(RuntimeError, "add_penalty: mode", "'coupled'", got, remedy)
        self._penalize(self._shares[0], self.strength, None)

    def step(self) -> None:
        """Count one optimizer step and, decoupled, shrink P. Call it after ``optimizer.step()``.

        Raises:
            RuntimeError: where an optimizer is attached, which does both by itself.
        """
        self._require_by_hand("step", "optimizer.step() counts by itself; drop this call.")
        self._shrink(self._shares[0], self.strength, None)
        self._steps = [steps + 1 for steps in self._steps]
        self._progress.look(self.steps, self._penalized)

    def remove(self) -> None:
        """Detach from model and optimizer; a second call does nothing.

        Warns:
            InertPenaltyWarning: if P is not empty and its norm has not gone down.
        """
        steps = max(self._steps)
        if self._release() and len(self._penalized) and (steps or self._hooks_fired):
            self._warn_if_inert(steps)

    def detach(self) -> None:
        """Detach like :meth:`remove`, without judging whether the penalty acted."""
        self._release()

    def reattach(self) -> None:
        """Act again after :meth:`detach` or :meth:`remove`, from the step where it was.

        Raises:
            RuntimeError: where another regularizer is attached to the model by now, or this one still is.
        """
        self._claim()
        self._hook()

    def reset(self) -> None:
        """Start over after the weights were replaced: step 0, the norm of P measured anew."""
        self._steps, self._start_norm = [0] * len(self._steps), self.penalized_norm()
        self._penalized.pending.clear()
        self._progress.restart()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: steps done, also of each optimizer; steps in total; the norm of P at the start.

        Also the step at which it fell below 1 %, and the factors that the weights of a half-precision model
        have yet to be multiplied with, by name.
        """
        return {
            "steps": self.steps,
            "optimizer_steps": list(self._steps),
            "total_steps": self.total_steps,
            "start_norm": self._start_norm,
            "fell_below": self.fell_below,
            "pending": dict(self._penalized.pending),
        }

    @staticmethod
    def check_state(
        state: Mapping[str, Any], total_steps: int, *, optimizers: int | None = None
    ) -> None:
        """Raise a ValueError unless a regularizer of ``total_steps`` can load the state.

        ``optimizers`` is how many are attached, None for a regularizer that has none yet.
        """
        keys = ("steps", "optimizer_steps", "total_steps", "start_norm")
        check_keys(state, keys, "state of RegularizedPruner")
        numbers = [state["steps"], *state["optimizer_steps"], state["start_norm"]]
        numbers += [*state.get("pending", {}).values(), state.get("fell_below") or 0]
        if odd := [each for each in numbers if not isinstance(each, (int, float))]:
            remedy = "The file is damaged: load another one."
            refuse(ValueError, "state of RegularizedPruner", "numbers", repr(odd[0]), remedy)
        if state["total_steps"] != total_steps:
            expected, got = f"total_steps={total_steps}", state["total_steps"]
            remedy = "Build the regularizer with the same arguments as the saved one."
            refuse(ValueError, "state of RegularizedPruner", expected, got, remedy)
        if optimizers is not None:
            expand_step_counts(state["optimizer_steps"], optimizers)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the state was taken, before or after :meth:`attach`.

        Raises:
            ValueError: for no such state, or that of a regularizer with other ``total_steps`` or
                another number of optimizers.
        """
        attached = len(self._optimizers) or None
        self.check_state(state, self.total_steps, optimizers=attached)
        steps = [int(each) for each in state["optimizer_steps"]]
        self._steps = steps if attached is None else expand_step_counts(steps, attached)
        self._start_norm = float(state["start_norm"])
        self._progress.restart(state.get("fell_below"))  # older states have neither
        self._penalized.pending = dict(state.get("pending", {}))

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

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles would have neither its hooks nor its optimizer."""
        if self not in _ATTACHED:
            return super().__reduce_ex__(protocol)
        expected, got = "to stay with its model", "a copy or a pickle"
        remedy = "Copy the model, then build a new RegularizedPruner for the copy; of rounds, save state_dict()."
        refuse(TypeError, "RegularizedPruner", expected, got, remedy)

    # How it is attached

    def _claim(self) -> None:
        """Refuse what another regularizer has: two would both shrink it."""
        if self.attached_to(self._model) is not None:
            expected, got = "one RegularizedPruner", "a second one"
            remedy = "Remove the first: RegularizedPruner.attached_to(model).remove()."
            refuse(RuntimeError, "model", expected, got, remedy)
        taken = {id(p) for other in _ATTACHED for p in other._penalized.parameters().values()}
        shared = [name for name, p in self._penalized.parameters().items() if id(p) in taken]
        if shared:
            expected = "parameters that no other RegularizedPruner penalizes"
            got = f"{listing(shared)}, penalized through another module"
            remedy = "Remove that one, or penalize everything with one."
            refuse(RuntimeError, "model", expected, got, remedy)
        _ATTACHED.add(self)

    def _release(self) -> bool:
        if self not in _ATTACHED:
            return False
        _ATTACHED.remove(self)
        self._detach_hooks()
        return True

    def _warn_if_inert(self, steps: int) -> None:
        start, norm = self._start_norm, self.penalized_norm()
        if not start or norm < start:  # NaN is not down either
            return
        counted = self._optimizers or steps == self.total_steps
        ways = [] if counted else ["pass the optimizer or call pruner.step()"]
        ways.append("raise the strength or lower shrink_to")
        if self.mode != "decoupled":
            ways.append("use mode='decoupled'")
        remedy = ", or ".join(ways) if math.isfinite(norm) else _DIVERGED
        text = (
            f"The penalty did not act: the norm of the penalized weights went from {start:.4g} to "
            f"{norm:.4g} in {steps} of {self.total_steps} steps (mode {self.mode!r}, last strength "
            f"{self._strength_of(max(1, steps)):.3g}). {remedy[0].upper()}{remedy[1:]}."
        )
        warnings.warn(text, InertPenaltyWarning, stacklevel=3)  # the caller of remove()

    def _require_by_hand(self, call: str, remedy: str) -> None:
        if self not in _ATTACHED:
            expected, got = "an attached regularizer", "a removed one"
            remedy = "Make a new RegularizedPruner."
        elif self._optimizers:
            expected, got = "no optimizer", "an attached optimizer"
        else:
            return
        refuse(RuntimeError, call, expected, got, remedy)

    def _hook(self) -> None:
        """Act in the steps of the optimizers, without one in backward passes."""
        for index, each in enumerate(self._optimizers):
            before, after = partial(self._before_step, index), partial(self._after_step, index)
            self._handles += hook_steps(each, before, after)
        if not self._optimizers:
            parameters, coupled = self._penalized.parameters(), self.mode == "coupled"
            self._handles = hook_gradients(parameters, self._after_backward, need_all=coupled)

    def _detach_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # What a step does

    def _after_backward(self, name: str) -> None:
        self._hooks_fired = True
        parameter = self._penalized.parameters()[name]
        self._uncounted.after_backward(name, parameter, self.steps, self.total_steps)
        batches = 1 if self.block_loss_grad else self.accumulation_steps
        share = Share((name,), self._shares[0].coupled)
        scale = self._scale() if share.coupled else None
        self._penalize(share, self.strength / batches, scale)

    def _scale(self) -> Tensor | float | None:
        """What the loss was multiplied with."""
        if not callable(self.grad_scale):
            return None if self.grad_scale is None else float(self.grad_scale)
        scale: Any = self.grad_scale()
        if isinstance(scale, Tensor):  # to look at it would be to wait for the device
            return scale
        return check_number(
            scale, "what grad_scale returned", above=0, remedy="Pass scaler.get_scale, for example."
        )

    def _before_step(self, index: int, scale: Tensor | None) -> None:
        if self._followers and self._shares[index].coupled:
            self._norm_before_step = self.penalized_norm()
        self._penalize(self._shares[index], self._strength_of(self._steps[index] + 1), scale)

    def _after_step(self, index: int, found_inf: Tensor | None) -> None:
        self._shrink(self._shares[index], self._strength_of(self._steps[index] + 1), found_inf)
        self._steps[index] += 1
        self._stepped = True
        self._progress.look(self.steps, self._penalized)

    def _strength_of(self, step: int) -> float:
        return strength_at(self.schedule, min(1.0, step / self.total_steps))

    def _penalize(self, share: Share, strength: float, scale: Tensor | float | None) -> None:
        if self.block_loss_grad:
            self._penalized.block(share.names)
        if share.coupled:
            self._penalized.pull(share.names, strength, scale)

    def _shrink(self, share: Share, strength: float, found_inf: Tensor | None) -> None:
        if not share.coupled:
            self._penalized.shrink(share.names, strength, found_inf)
        elif self._followers:
            before, now = self._norm_before_step, self.penalized_norm()
            strength = max(0.0, 1.0 - now / before) if before else 0.0
            self._norm_before_step = now
        for follower in self._followers:
            follower.shrink(share.names, strength, found_inf)

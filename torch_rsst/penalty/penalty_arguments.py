"""The arguments of a penalty: checked once, for the regularizer, for rounds and for their saved state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import torch

from torch_rsst.penalty.hooks import Mode
from torch_rsst.schedules import Schedule, resolve_schedule
from torch_rsst.utils.amounts import check_count, check_flag, check_fraction, check_number
from torch_rsst.utils.errors import check_choice, refuse

GradScale: TypeAlias = float | Callable[[], float]

MODES = ("auto", "coupled", "decoupled")


class Default(float):
    """The number that holds unless another argument replaces it; an equal one that is passed is not one."""


STRENGTH = Default(0.5)
_MOST_POINTS = 1 << 16  # of a schedule that are looked at; as many steps have each their own
SHRINK_TO = Default(0.01)


@dataclass(frozen=True)
class Penalty:
    """How the weights in P are shrunk; see :class:`torch_rsst.RegularizedPruner`.

    After construction either ``strength`` or ``shrink_to`` is set, or neither, for a callable schedule.

    Raises:
        TypeError, ValueError: for values out of range, or for arguments that exclude each other.
    """

    schedule: str | Schedule = "late_exponential"
    strength: float | None = None
    shrink_to: float | None = SHRINK_TO
    shrink_by: float = 1.0
    mode: Mode = "auto"
    block_loss_grad: bool = False
    accumulation_steps: int = 1
    grad_scale: GradScale | None = None

    def __post_init__(self) -> None:
        own, passes = vars(self), self.accumulation_steps
        own["accumulation_steps"] = check_count(passes, "accumulation_steps", at_least=1)
        own["block_loss_grad"] = check_flag(self.block_loss_grad, "block_loss_grad")
        if self.grad_scale is not None and not callable(self.grad_scale):
            own["grad_scale"] = check_number(self.grad_scale, "grad_scale", above=0)
        check_choice("mode", self.mode, MODES)
        strength = STRENGTH if self.strength is None else self.strength
        resolve_schedule(self.schedule, strength)
        own["shrink_by"] = check_fraction(self.shrink_by, "shrink_by")
        if self.shrink_to is not None:
            check_fraction(self.shrink_to, "shrink_to")
        own["shrink_to"] = shrink_to = self._chosen_shrink_to()
        by_name = isinstance(self.schedule, str) and shrink_to is None
        own["strength"] = float(strength) if by_name else None

    def _chosen_shrink_to(self) -> float | None:
        """``shrink_to``, None where another argument says how strong the penalty is."""
        if self.shrink_to is None:
            return None
        if not isinstance(self.strength, Default | None):
            expected = "one argument for the strength"
            got = f"strength={float(self.strength):g} as well"
            remedy = "Pass strength or shrink_to, not both."
        elif not isinstance(self.schedule, str):
            expected = "a named schedule, which it scales"
            got = "a callable, which returns λ itself"
            remedy = "Leave shrink_to out, or pass schedule='linear', for example."
        elif self.mode == "coupled":
            expected, got = "mode='auto' or 'decoupled'", "'coupled', whose effect depends on lr"
            remedy = "Pass strength for a coupled penalty."
        else:
            return float(self.shrink_to)
        if not isinstance(self.shrink_to, Default):
            refuse(ValueError, "shrink_to", expected, got, remedy)
        return None

    @property
    def effective_mode(self) -> Mode:
        """``mode``; ``"decoupled"`` where ``shrink_to`` says by how much weights shrink."""
        return self.mode if self.shrink_to is None else "decoupled"

    @property
    def base_schedule(self) -> Schedule:
        """The schedule before ``shrink_to`` scales it."""
        return resolve_schedule(self.schedule, 1.0 if self.strength is None else self.strength)

    def schedule_of(self, total_steps: int) -> Schedule:
        """The schedule over so many steps.

        Raises:
            ValueError: where no step is early enough for ``shrink_by``.
        """
        if self.shrink_to is None:
            return self.base_schedule
        return scaled(self.base_schedule, self.shrink_to, self.shrink_by, total_steps)

    def steps_to_shrink(self, total_steps: int) -> int:
        """The step by which P is to be shrunk."""
        return total_steps if self.shrink_to is None else round(self.shrink_by * total_steps)


@dataclass(frozen=True)
class ScaledSchedule:
    """λ(t) = scale · schedule(t) while t ≤ until, then 0."""

    schedule: Schedule
    scale: float
    until: float

    def __call__(self, t: float) -> float:
        return min(1.0, self.scale * self.schedule(t)) if t <= self.until else 0.0


@lru_cache(maxsize=64)  # each round asks for the same
def scaled(
    schedule: Schedule, shrink_to: float, shrink_by: float, total_steps: int
) -> ScaledSchedule:
    """Scale a schedule so that Π (1 − λ) over the steps up to t = ``shrink_by`` is ``shrink_to``.

    The scale is found by bisection, to the last bit; of more than 65,536 steps, so many stand for all.

    >>> from torch_rsst.penalty.penalty_arguments import scaled
    >>> from torch_rsst.schedules import Polynomial
    >>> math.prod(1 - scaled(Polynomial(1, 1.0), 0.01, 1.0, 30)(k / 30) for k in range(1, 31))
    0.01...
    """
    steps = _last_step(total_steps, shrink_by)
    points = min(steps, _MOST_POINTS)
    width = steps / max(1, points)  # of the steps that a point stands for, in their middle
    times = [((i + 0.5) * width + 0.5) / total_steps for i in range(points)]
    shape = torch.tensor([schedule(t) for t in times], dtype=torch.float64)
    if not bool((shape > 0).any()):
        expected = f"at least 1, as none of {total_steps} steps ends before shrink_by={shrink_by:g}"
        remedy = f"Raise shrink_by to {1 / total_steps:.3g} or more, or train more steps."
        refuse(ValueError, "shrink_to", expected, f"{shrink_to:g}", remedy)
    low, high = 0.0, 1.0 / max(float(shape.max()), schedule(steps / total_steps))  # λ is 1 at most
    while low < (middle := (low + high) / 2) < high:
        left = width * math.fsum(torch.log1p(-middle * shape).tolist())
        if shrink_to and left <= math.log(shrink_to):
            high = middle
        else:
            low = middle
    return ScaledSchedule(schedule, high, shrink_by)


def _last_step(total_steps: int, until: float) -> int:
    """The last step k with k / total_steps ≤ until, 0 where there is none."""
    step = min(total_steps, int(until * total_steps) + 1)
    while step and step / total_steps > until:
        step -= 1
    return step

"""What a penalty has done so far: when P was small, and whether anyone counts the steps."""

from __future__ import annotations

import math
import warnings

from torch import Tensor

from torch_rsst.penalty.penalized_set import PenalizedSet
from torch_rsst.utils.errors import InertPenaltyWarning

SMALL = 0.01
"""The share of its first norm below which P counts as gone."""

_FORGOTTEN = 3  # fewer passes may be those of an unusual loop


class ShrinkProgress:
    """The step at which the norm of P was first below 1 % of what it was.

    Nothing waits for the device before that step is asked for. Of more than 100 steps it looks at every
    hundredth part.
    """

    def __init__(self, total_steps: int) -> None:
        self._every = max(1, total_steps // 100)
        self._seen: dict[int, list[Tensor]] = {}  # step → squares of the norm
        self._below: int | None = None

    def look(self, step: int, penalized: PenalizedSet) -> None:
        """Measure P after a step."""
        if self._below is None and step % self._every == 0 and step not in self._seen:
            self._seen[step] = penalized.squared_norms()

    def below(self, start_norm: float) -> int | None:
        """The step; None while there is none."""
        for step, squares in self._seen.items():
            if self._below is None and math.sqrt(sum(map(float, squares))) < SMALL * start_norm:
                self._below = step
        self._seen.clear()
        return self._below

    def restart(self, below: int | None = None) -> None:
        """Forget what was seen, or continue with what a state says."""
        self._seen, self._below = {}, below


class UncountedSteps:
    """Training whose steps nobody counts: weights change from one backward pass to the next.

    Passes that only accumulate gradients change no weight.
    """

    def __init__(self) -> None:
        self._name: str | None = None  # of the parameter that is watched: one is enough
        self._last = (0, 0)  # its version and the counted steps, at its latest backward pass
        self._changes = 0

    def after_backward(self, name: str, parameter: Tensor, steps: int, total_steps: int) -> None:
        """Warn after the third pass in a row that finds the weights changed, and no step counted."""
        if self._name is None:
            self._name, self._last = name, (parameter._version, steps)
        if name != self._name:
            return
        (version, counted), self._last = self._last, (parameter._version, steps)
        if steps != counted:
            self._changes = 0
        elif parameter._version != version:
            self._changes += 1
            if self._changes == _FORGOTTEN:
                warnings.warn(
                    f"The penalized weights changed before each of the last {_FORGOTTEN} backward passes, "
                    f"and no step was counted: the penalty stays at step {steps + 1} of {total_steps}. "
                    f"Pass the optimizer, or call pruner.step() after each optimizer.step().",
                    InertPenaltyWarning,
                    stacklevel=3,
                )

"""What rewinding does to optimizers: moments of a training that is thrown away go with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from torch_rsst.utils.errors import check_keys, refuse, unknown_choice

_CHOICES = ("reset", "init", "keep")


@dataclass(frozen=True, eq=False)
class OptimizerRewind:
    """What is done to the optimizers when weights are rewound.

    Attributes:
        choice: ``"reset"``: they start anew; ``"keep"``: nothing is done; ``"states"``: see there.
        states: what each of them is put back to; learning rates and other options stay as they are.
    """

    choice: str = "reset"
    states: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def of(cls, asked: object, optimizers: Sequence[Optimizer]) -> OptimizerRewind:
        """What ``rewind_optimizer`` asks for, checked and copied.

        Raises:
            TypeError, ValueError: for anything else, or states of other optimizers.
        """
        if asked in ("reset", "keep"):
            return cls(str(asked))
        states: Any = [asked] if isinstance(asked, Mapping) else asked
        if asked == "init":
            if not optimizers:
                remedy = "Pass the optimizer to the rounds, or its state dict as rewind_optimizer."
                refuse(ValueError, "rewind_optimizer='init'", "an optimizer", "none", remedy)
            states = [optimizer.state_dict() for optimizer in optimizers]
        elif isinstance(states, str):
            raise ValueError(unknown_choice("rewind_optimizer", asked, _CHOICES))
        if not isinstance(states, Sequence):
            expected, got = "a choice or a state dict of the optimizer", type(asked).__name__
            remedy = "Pass optimizer.state_dict() of an earlier moment."
            refuse(TypeError, "rewind_optimizer", expected, got, remedy)
        for state in states:
            check_keys(state, ("state", "param_groups"), "rewind_optimizer")
        made = cls("states", tuple(copy.deepcopy(list(states))))
        if optimizers:
            made.check(optimizers)
        return made

    def check(self, optimizers: Sequence[Optimizer]) -> None:
        """Raise a ValueError unless the states are those of optimizers like these."""
        if self.choice != "states":
            return
        sizes = [[len(group["params"]) for group in o.param_groups] for o in optimizers]
        saved = [[len(group["params"]) for group in s["param_groups"]] for s in self.states]
        if sizes != saved:
            expected = f"states of optimizers whose groups hold {sizes} parameters"
            remedy = "Pass a state dict for each optimizer, of this very one."
            refuse(ValueError, "rewind_optimizer", expected, f"{saved}", remedy)

    def apply(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Rewind optimizers in place."""
        if self.choice == "states" and optimizers:
            for optimizer, state in zip(optimizers, self.states, strict=True):
                groups = optimizer.state_dict()["param_groups"]
                optimizer.load_state_dict(copy.deepcopy({**state, "param_groups": groups}))
        elif self.choice == "reset":
            for optimizer in optimizers:
                for parameter in model.parameters():
                    optimizer.state.pop(parameter, None)


def restore_callback(optimizer: Optimizer) -> Callable[[], None]:
    """What gives an optimizer the moments and options back that it has now; moments are not copied."""
    state, content, groups = optimizer.state, dict(optimizer.state), optimizer.param_groups

    def restore() -> None:
        state.clear()
        state.update(content)
        optimizer.state, optimizer.param_groups = state, groups

    return restore

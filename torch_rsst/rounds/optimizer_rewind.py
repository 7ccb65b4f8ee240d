"""What rewinding does to optimizers: moments of a training that is thrown away go with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from torch_rsst.masking.names import named_refs
from torch_rsst.utils.errors import check_choice, check_keys, listing, refuse
from torch_rsst.utils.optimizer_hooks import held_by

_CHOICES = ("reset", "init", "keep")


@dataclass(frozen=True, eq=False)
class OptimizerRewind:
    """What is done to the optimizers when weights are rewound.

    Attributes:
        choice: ``"reset"``: they start anew; ``"keep"``: nothing is done; ``"states"``: see there.
        states: what each of them is put back to; learning rates and other options stay as they are.
        names: of the parameters of each state, in its order, None where the model does not have them. Until an
            optimizer is known there are none; a parameter may change its group afterwards.
    """

    choice: str = "reset"
    states: tuple[Mapping[str, Any], ...] = ()
    names: tuple[tuple[str | None, ...], ...] = ()

    @classmethod
    def of(
        cls, asked: object, model: nn.Module, optimizers: Sequence[Optimizer]
    ) -> OptimizerRewind:
        """What ``rewind_optimizer`` asks for, checked and copied.

        Raises:
            TypeError, ValueError: for anything else, or states of other optimizers.
        """
        states = states_in(asked)
        if asked == "init":
            if not optimizers:
                remedy = "Pass the optimizer to the rounds, or its state dict as rewind_optimizer."
                refuse(ValueError, "rewind_optimizer='init'", "an optimizer", "none", remedy)
            states = [_state_of(optimizer, _names_of(model)) for optimizer in optimizers]
        elif isinstance(asked, str):
            return cls(asked)
        return cls("states", tuple(copy.deepcopy(list(states)))).named(model, optimizers)

    def named(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> OptimizerRewind:
        """With the names of the states' parameters: unless they are known, those of the optimizers' at their positions.

        Raises:
            ValueError: where the states are those of other optimizers.
        """
        if self.choice != "states" or self.names or not optimizers:
            return self
        sizes = [[len(group["params"]) for group in o.param_groups] for o in optimizers]
        saved = [[len(group["params"]) for group in s["param_groups"]] for s in self.states]
        if sizes != saved:
            expected = f"states of optimizers whose groups hold {sizes} parameters"
            remedy = "Pass a state dict for each optimizer, of this very one."
            refuse(ValueError, "rewind_optimizer", expected, f"{saved}", remedy)
        names = _names_of(model)
        every = tuple(tuple(names.get(id(p)) for p in held_by(o)) for o in optimizers)
        return replace(self, names=every)

    def check(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Raise a ValueError unless each parameter that optimizers hold is in the state of that very one, or in none."""
        if self.choice != "states" or not optimizers:
            return
        known = self.named(model, optimizers).names
        if len(known) != len(optimizers):
            remedy = "Pass as many optimizers as the rounds were given, in the same order."
            expected, got = f"{len(known)} optimizers", f"{len(optimizers)}"
            refuse(ValueError, "rewind_optimizer", expected, got, remedy)
        names, every = _names_of(model), {name for own in known for name in own}
        moved = [
            name
            for optimizer, own in zip(optimizers, known, strict=True)
            for parameter in held_by(optimizer)
            if (name := names.get(id(parameter))) in every.difference(own) and name is not None
        ]
        if moved:
            expected = "every parameter in the optimizer whose moments of it are put back"
            remedy = "Put it back there, or pass rewind_optimizer='reset'."
            got = f"another with {listing(moved)}"
            refuse(ValueError, "rewind_optimizer", expected, got, remedy)

    def apply(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Rewind in place what optimizers remember of the model's parameters, whatever group they are in."""
        if self.choice == "states" and optimizers:
            known, names = self.named(model, optimizers), _names_of(model)
            parts = zip(optimizers, known.states, known.names, strict=True)
            for optimizer, state, own in parts:
                optimizer.load_state_dict(_put_back(optimizer, state, own, names))
        elif self.choice == "reset":
            for optimizer in optimizers:
                for parameter in model.parameters():
                    optimizer.state.pop(parameter, None)


def states_in(asked: object) -> Sequence[Mapping[str, Any]]:
    """The states that ``rewind_optimizer`` gives; none for a choice.

    Raises:
        TypeError, ValueError: for anything else.
    """
    if isinstance(asked, str):
        check_choice("rewind_optimizer", asked, _CHOICES)
        return []
    states: Any = [asked] if isinstance(asked, Mapping) else asked
    if not isinstance(states, Sequence) or isinstance(states, bytes):
        expected, got = "a choice or a state dict of the optimizer", type(asked).__name__
        remedy = "Pass optimizer.state_dict() of an earlier moment."
        refuse(TypeError, "rewind_optimizer", expected, got, remedy)
    if not states:
        remedy = "Pass a state dict for each optimizer, or 'reset'."
        refuse(ValueError, "rewind_optimizer", "at least one state dict", "an empty list", remedy)
    for state in states:
        check_keys(state, ("state", "param_groups"), "rewind_optimizer")
    return states


def _names_of(model: nn.Module) -> dict[int, str]:
    """The identity of each parameter → its dense name."""
    return {id(places[0].original): name for name, places in named_refs(model).items()}


def _left_over(optimizer: Optimizer) -> list[Any]:
    """The parameters that an optimizer remembers and has in no group any more: a state dict cannot number them."""
    held = {id(parameter) for parameter in held_by(optimizer)}
    return [key for key in optimizer.state if isinstance(key, Tensor) and id(key) not in held]


def _state_of(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    if left := _left_over(optimizer):
        expected = "moments of parameters in the optimizer's groups"
        got = listing([names.get(id(p), "a parameter of another model") for p in left])
        remedy = "Add it to a group, or delete optimizer.state[parameter]."
        refuse(ValueError, "rewind_optimizer='init'", expected, f"those of {got} in none", remedy)
    return optimizer.state_dict()


def _put_back(
    optimizer: Optimizer,
    state: Mapping[str, Any],
    own: Sequence[str | None],
    names: Mapping[int, str],
) -> dict[str, Any]:
    """What an optimizer is to load: moments from a state, whose parameters ``own`` names, all else as it is."""
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    saved = {
        name: state["state"][number]
        for number, name in zip(numbers, own, strict=True)
        if name is not None and number in state["state"]
    }
    moments = {key: value for key, value in state["state"].items() if key not in numbers}
    every: list[tuple[Any, Any]] = list(enumerate(held_by(optimizer)))
    # A parameter that is in no group any more is its own key, which is loaded as it is.
    every += [(parameter, parameter) for parameter in _left_over(optimizer)]
    for key, parameter in every:
        name = names.get(id(parameter))
        kept = optimizer.state.get(parameter) if name is None else copy.deepcopy(saved.get(name))
        if kept is not None:
            moments[key] = kept
    groups, start = [], 0
    for group in optimizer.param_groups:
        stop = start + len(group["params"])
        groups.append({**group, "params": list(range(start, stop))})
        start = stop
    return {**state, "state": moments, "param_groups": groups}


def restore_callback(optimizer: Optimizer) -> Callable[[], None]:
    """What gives an optimizer the moments and options back that it has now; moments are not copied."""
    state, content, groups = optimizer.state, dict(optimizer.state), optimizer.param_groups

    def restore() -> None:
        state.clear()
        state.update(content)
        optimizer.state, optimizer.param_groups = state, groups

    return restore

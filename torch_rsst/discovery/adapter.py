"""The contract of an adapter, and the registry."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from torch_rsst.discovery.families import load_families
from torch_rsst.groups.groups import BLOCKS, KINDS, GroupLayer, Member
from torch_rsst.groups.surgery import Removal
from torch_rsst.masking.parameter_ref import dense_name
from torch_rsst.utils.errors import MissingNameError, refuse, unknown_choice

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a module."""


@dataclass(frozen=True)
class Unsupported:
    """Why the units of a module that looks like a family cannot be offered.

    Attributes:
        reason: as part of a sentence.
        layer: the module, by its name.
        kind: of the units.
        open: whether the module may be of another structure, so that units count which are found in it otherwise.
    """

    reason: str
    layer: str = ""
    kind: str = ""
    open: bool = False

    def __str__(self) -> str:
        return f"{self.layer or 'the model'} ({self.kind}): {self.reason}"


class Adapter:
    """Knows one family of modules: how to find its units, and how to shrink its module.

    A subclass sets ``kind`` and writes :meth:`find`; :meth:`shrink` where the module notes something
    about its units. What is found is checked by :class:`torch_rsst.discovery.Probe`: on a copy of the
    module with random weights, units that are zeroed must make the same output as units that are cut.
    """

    kind: ClassVar[str]
    least: ClassVar[int] = 0
    """How many units must be left for the module to run."""
    whole_model: ClassVar[bool] = False
    """Whether its units spread over the model, so that the model is run to look at them."""
    former_names: ClassVar[tuple[str, ...]] = ()
    """Names of the adapters that it took the place of; saved groups and folders hold them."""
    told_apart: ClassVar[bool] = False
    """Whether its units are known not to mix, so that they can be masked even where they cannot be cut."""

    def find(self, module: nn.Module) -> GroupLayer | Unsupported | None:
        """The units of ``module``, why they cannot be offered, or None for another family.

        Names in the answer are those within ``module``, which is looked at and never changed.
        """
        raise NotImplementedError

    def examples(self, module: nn.Module) -> Iterable[Call]:
        """Arguments that ``module`` runs on by itself, for families that take more than one tensor."""
        return ()

    def shrink(self, module: nn.Module, removal: Removal) -> nn.Module:
        """Make ``module`` run without units that have been cut from its tensors, in place.

        Layers of PyTorch have noted their new sizes already.

        Args:
            module: with the tensors as :func:`torch_rsst.groups.surgery.cut` left them.
            removal: what was cut.

        Returns:
            the module, or what takes its place.
        """
        return module


ADAPTERS: list[Adapter] = []


def register(adapter: Adapter) -> Adapter:
    """Add a family. The latest is asked first; the first that knows a module answers for it.

    Returns:
        the adapter that was given.

    Raises:
        TypeError: unless given an :class:`Adapter`.
        ValueError: for a kind that :func:`torch_rsst.find_groups` does not ask for.
    """
    if not isinstance(adapter, Adapter):
        remedy = "Derive its class from torch_rsst.discovery.Adapter."
        got = repr(adapter)
        refuse(TypeError, "adapter", "an Adapter", got, remedy)
    if adapter.kind not in (known := (*KINDS, BLOCKS)):
        raise ValueError(unknown_choice(f"kind of {type(adapter).__name__}", adapter.kind, known))
    ADAPTERS.insert(0, adapter)
    return adapter


def family(name: str) -> Adapter:
    """The registered adapter of a ``GroupLayer.family``.

    Raises:
        KeyError: where none has this name.
    """
    load_families()
    for adapter in ADAPTERS:
        # Names that a base class had are not its own.
        former = vars(type(adapter)).get("former_names", ())
        if name in (type(adapter).__name__, *former):
            return adapter
    known = (type(adapter).__name__ for adapter in ADAPTERS)
    raise MissingNameError(unknown_choice("family of groups", name, known))


def least_left(layer: GroupLayer) -> int:
    """How many units must be left in a layer, of each stacked weight, for the model to run."""
    return max(layer.least, family(layer.family).least) if layer.family else 1


def rows(path: str, layer: nn.Module, unit_of: Tensor) -> list[Member]:
    """Members of a layer that puts units out: the rows of its weight, and its bias if it has one."""
    members = [Member(f"{path}.weight", 0, unit_of, ranked=True)]
    if holds(layer, "bias"):
        members.append(Member(f"{path}.bias", 0, unit_of, ranked=False))
    return members


def columns(path: str, unit_of: Tensor) -> Member:
    """The member of a layer that takes units in: the columns of its weight."""
    return Member(f"{path}.weight", 1, unit_of, ranked=True, consumes=True)


def holds(module: nn.Module, name: str) -> bool:
    """Whether a module has a parameter of this dense name, not None."""
    return name in own_parameters(module)


def is_of_torch(module: nn.Module) -> bool:
    """Whether a module is one of PyTorch's own, such as a linear layer; subclasses are not."""
    return type(module).__module__.startswith("torch.nn.")


def is_in(name: str, outer: str) -> bool:
    """Whether a dotted name is another one, or leads into it; "" is the model itself."""
    return not outer or name == outer or name.startswith(f"{outer}.")


def own_parameters(module: nn.Module) -> list[str]:
    """The dense names of the parameters that a module holds itself."""
    held = module._parameters.items()
    return [dense_name(module, key) for key, parameter in held if parameter is not None]


__all__ = [
    "ADAPTERS",
    "KINDS",
    "Adapter",
    "Unsupported",
    "columns",
    "family",
    "holds",
    "is_in",
    "least_left",
    "own_parameters",
    "register",
    "rows",
]

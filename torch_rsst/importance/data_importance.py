"""Importances that need data: what an entry of an activation adds to the score of its unit.

The model is run in :mod:`torch_rsst.importance.measuring`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from torch_rsst.groups.groups import GroupLayer
from torch_rsst.utils.errors import refuse


class DataImportance(ABC):
    """An importance read from what units put out while the model runs on data.

    Example:
        >>> class ShareOfZeros(DataImportance):
        ...     '''How often a unit is silent; the most silent go first.'''
        ...     def entries(self, activation, gradient):
        ...         return (activation != 0).float()
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        >>> refill_mask = torch_rsst.regroup(
        ...     mlp, torch_rsst.find_groups(mlp), importance=ShareOfZeros(), batches=[torch.randn(5, 4)]
        ... )

    What a unit puts out is what the layers that take it in get of it: of a head, its output before the
    output projection; of a neuron, that after its activation. The values of all batches, positions,
    features of the unit and layers that take it in are added up as they come; nothing else is kept.

    Instances that are frozen dataclasses can be pickled, and their settings are compared when rounds are
    resumed.
    """

    needs_gradient: ClassVar[bool] = False
    """Whether :meth:`entries` is given the gradient of the loss; a ``loss_fn`` is needed then."""

    @abstractmethod
    def entries(self, activation: Tensor, gradient: Tensor | None) -> Tensor:
        """What each entry adds to the total of its unit.

        Args:
            activation: the input of a layer that takes units in, detached; float32 where the model runs
                in 16 bits.
            gradient: of the loss, with respect to it and through this layer alone; None unless needed.

        Returns:
            a new tensor of the same shape.
        """

    def score(self, total: Tensor, count: Tensor) -> Tensor:
        """The score of each unit; by default the mean of its entries.

        Args:
            total: the sum of each unit's entries, float64.
            count: how many entries each unit had.
        """
        return total / count

    def __call__(
        self, layer: GroupLayer, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> Tensor:
        """Not without data.

        Raises:
            ValueError: always. Once measured, another callable takes its place.
        """
        remedy = "Pass batches, or what torch_rsst.measure_importance(model, groups, …) returns."
        subject = f"importance {type(self).__name__} of {layer}"
        refuse(ValueError, subject, "batches to run on", "none", remedy)


@dataclass(frozen=True)
class ActivationL1(DataImportance):
    """The mean of |a|, where a is what a unit puts out."""

    def entries(self, activation: Tensor, gradient: Tensor | None) -> Tensor:
        """See :class:`DataImportance`."""
        return activation.abs()


@dataclass(frozen=True)
class ActivationL2(DataImportance):
    """The root of the mean of a², where a is what a unit puts out."""

    def entries(self, activation: Tensor, gradient: Tensor | None) -> Tensor:
        """See :class:`DataImportance`."""
        return activation.square()

    def score(self, total: Tensor, count: Tensor) -> Tensor:
        """See :class:`DataImportance`."""
        return (total / count).sqrt()


@dataclass(frozen=True)
class Taylor(DataImportance):
    """The sum of |a · ∂L/∂a|, where a is what a unit puts out and L the loss of its batch."""

    needs_gradient: ClassVar[bool] = True

    def entries(self, activation: Tensor, gradient: Tensor | None) -> Tensor:
        """See :class:`DataImportance`."""
        assert gradient is not None, "it is asked for"
        return (activation * gradient).abs()

    def score(self, total: Tensor, count: Tensor) -> Tensor:
        """See :class:`DataImportance`."""
        return total

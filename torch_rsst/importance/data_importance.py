"""Importances that need data: what the entries of an activation add to the score of their unit.

The model is run in :mod:`torch_rsst.importance.measuring`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from torch_rsst.groups.groups import GroupLayer
from torch_rsst.utils.errors import refuse


@dataclass(frozen=True, eq=False)
class FeatureSums:
    """What one consumer of a layer's units has received, summed for each of its input features.

    Attributes:
        unit: the unit of each feature, int64 of shape (features,).
        sums: the sums of what :meth:`DataImportance.entries` returns, over all batches and
            positions: float64 of shape (terms, features).
        count: how many entries of each feature were summed.
        weight_norms: Σ w² over the alive weights that read each feature: float64 of shape (features,).
        moments: Σ a·aᵀ over the same entries, shape (features, features); None unless
            :attr:`DataImportance.moments`. Then also
        weight: the weights that read the features, 0 where masked, shape (outputs, features); of a convolution
            with a row for each output and position of the kernel.
    """

    unit: Tensor
    sums: Tensor
    count: float
    weight_norms: Tensor
    moments: Tensor | None = None
    weight: Tensor | None = None


class DataImportance(ABC):
    """An importance computed from the outputs of units while the model runs on data.

    Example:
        >>> class ShareOfZeros(DataImportance):
        ...     '''How often a unit is active; the least active go first.'''
        ...     def entries(self, activation, gradient):
        ...         return (activation != 0).float()
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        >>> refill_mask = torch_rsst.regroup(
        ...     mlp, torch_rsst.find_groups(mlp), importance=ShareOfZeros(), batches=[torch.randn(5, 4)]
        ... )

    The output of a unit is read at the inputs of the layers that consume it: of a head, the input of the
    output projection; of a neuron, its value after the activation function. Only sums are kept: for each
    input feature of each of these layers, over all batches and positions.

    Instances that are frozen dataclasses can be pickled, and their settings are compared when rounds are
    resumed.
    """

    needs_gradient: ClassVar[bool] = False
    """Whether :meth:`entries` is given the gradient of the loss; a ``loss_fn`` is needed then."""
    terms: ClassVar[int] = 1
    """How many tensors :meth:`entries` returns, in a tuple if there are several."""
    moments: ClassVar[bool] = False
    """Whether :meth:`unit_scores` is given products of features, features² numbers for each consumer."""
    relative: ClassVar[bool] = False
    """Whether the scores of a layer are divided by their sum where they compete with those of others."""
    across_layers: ClassVar[bool] = False
    """Whether scores of different layers compare. If so, ``scope="auto"`` lets heads and neurons of all layers compete."""

    @abstractmethod
    def entries(self, activation: Tensor, gradient: Tensor | None) -> Tensor | tuple[Tensor, ...]:
        """What each entry of an activation adds to the sum of its feature.

        Args:
            activation: the input of a layer that consumes units, detached; float32 where the model runs
                in 16 bits.
            gradient: of the loss, with respect to it and through this layer alone; None unless needed.

        Returns:
            a new tensor of the same shape, or :attr:`terms` of them.
        """

    def score(self, total: Tensor, count: Tensor) -> Tensor:
        """The score of each unit; by default the mean of its entries.

        Args:
            total: the sum of each unit's entries, float64.
            count: how many entries each unit had.
        """
        return total / count

    def unit_scores(self, inputs: Sequence[FeatureSums], units: int) -> Tensor:
        """The score of each unit, from the sums of its features; by default :meth:`score` of their sum.

        Args:
            inputs: the sums at each layer that consumes the units.
            units: how many units there are.
        """
        total, count = torch.zeros(2, units, dtype=torch.float64)
        for each in inputs:
            total.index_add_(0, each.unit, each.sums[0])
            count.index_add_(0, each.unit, torch.full_like(each.sums[0], each.count))
        return self.score(total, count)

    def before_reconstruction(self) -> DataImportance:
        """The importance to use where consumers are refitted afterwards; by default the same."""
        return self

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
    """The mean of |a|, where a is the output of a unit."""

    def entries(self, activation: Tensor, gradient: Tensor | None) -> Tensor:
        """See :class:`DataImportance`."""
        return activation.abs()


@dataclass(frozen=True)
class ActivationL2(DataImportance):
    """The root of the mean of a², where a is the output of a unit."""

    def entries(self, activation: Tensor, gradient: Tensor | None) -> Tensor:
        """See :class:`DataImportance`."""
        return activation.square()

    def score(self, total: Tensor, count: Tensor) -> Tensor:
        """See :class:`DataImportance`."""
        return (total / count).sqrt()


@dataclass(frozen=True)
class Taylor(DataImportance):
    """The sum of |a · ∂L/∂a|, where a is the output of a unit and L the loss of its batch."""

    needs_gradient: ClassVar[bool] = True

    def entries(self, activation: Tensor, gradient: Tensor | None) -> Tensor:
        """See :class:`DataImportance`."""
        assert gradient is not None, "it is asked for"
        return (activation * gradient).abs()

    def score(self, total: Tensor, count: Tensor) -> Tensor:
        """See :class:`DataImportance`."""
        return total


@dataclass(frozen=True)
class Variance(DataImportance):
    """The expected squared change that removing a unit makes in the outputs of its consumers.

    The score is the sum, over consumers and the features d that the unit gives them, of

        Var(a_d) · ‖w_d‖²    if consumers are refitted afterwards (``reconstruct``),

        E[a_d²] · ‖w_d‖²     otherwise,

    where w_d are the alive weights by which the consumer reads feature d (of a convolution, the whole
    kernel). Features are taken as uncorrelated. Refitting a consumer restores the mean of what is removed,
    so that the variance alone is lost; without it the mean is lost as well. Scores of different
    layers are compared after each layer's are divided by their sum.

    The weighted variance of input features is the fluctuation metric of FLAP (An et al., "Fluctuation-based
    Adaptive Structured Pruning for Large Language Models", AAAI 2024), which also restores the mean in the
    bias; VBP ("Variance-Based Pruning for Accelerating and Compressing Trained Networks", ICCV 2025) removes
    neurons of vision transformers by the variance of their activations and does the same.

    Args:
        reconstruct: whether consumers are refitted once units are masked; None leaves that to
            the caller: rounds with ``reconstruct=`` take the variance, all others E[a²].
    """

    terms: ClassVar[int] = 2
    relative: ClassVar[bool] = True

    reconstruct: bool | None = None

    def entries(self, activation: Tensor, gradient: Tensor | None) -> tuple[Tensor, Tensor]:
        """See :class:`DataImportance`."""
        # In float64, or the variance of features with a large mean is lost; MPS has none.
        wide = activation if activation.device.type == "mps" else activation.double()
        return wide, wide.square()

    def unit_scores(self, inputs: Sequence[FeatureSums], units: int) -> Tensor:
        """See :class:`DataImportance`."""
        scores = torch.zeros(units, dtype=torch.float64)
        for each in (each for each in inputs if each.count):
            mean, lost = each.sums / each.count
            if self.reconstruct:
                lost = (lost - mean.square()).clamp_min(0.0)  # below 0 by rounding alone
            scores.index_add_(0, each.unit, lost * each.weight_norms)
        return scores

    def before_reconstruction(self) -> Variance:
        """See :class:`DataImportance`."""
        return replace(self, reconstruct=True) if self.reconstruct is None else self

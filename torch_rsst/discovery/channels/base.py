"""The contract of adapters that look at a whole model at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from torch_rsst.discovery.adapter import Adapter, Unsupported
from torch_rsst.discovery.probe import Probe
from torch_rsst.groups.groups import GroupLayer

Place = tuple[str, int]
"""The dense name of a parameter and one of its dimensions."""


@dataclass(frozen=True)
class Survey:
    """What was found in a model: layers that have been checked, and what cannot be offered.

    Attributes:
        layers: all of whose units can be cut.
        refused: modules whose units cannot be offered, and why.
        reasons: dense name of a parameter → why what it puts out, or takes in, stays.
        not_run: why the model was not followed, "" where it was.
    """

    layers: tuple[GroupLayer, ...] = ()
    refused: tuple[Unsupported, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)
    not_run: str = ""


class WholeModelAdapter(Adapter):
    """Knows units that spread over a model. It is asked once, after all adapters of single modules.

    It checks by itself what it finds: units that are zeroed must make the same output as units that
    are cut.
    """

    whole_model: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("channels", "neurons")
    """What its units may be."""

    def find(self, module: nn.Module) -> None:
        """No single module holds such units."""
        return

    def survey(
        self,
        probe: Probe,
        taken: Collection[Place],
        kinds: Collection[str],
        refused: Collection[Unsupported],
    ) -> Survey:
        """All units of a model, which is left as it was.

        Args:
            probe: of the model, without wrappers around it.
            taken: what units of other kinds hold; left to these.
            kinds: that are asked for.
            refused: what adapters of single modules know no units of, or were mistaken in.
        """
        raise NotImplementedError

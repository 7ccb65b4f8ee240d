"""The options of each command: frozen dataclasses, which are the command line and ``config.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro
import yaml

from torch_rsst.budget import check_count, check_fraction
from torch_rsst.errors import listing, message, unknown_choice
from torch_rsst.schedules import resolve_schedule

# What a resumed run may change: where it runs, not what it computes.
_FREE_ON_RESUME = ("output", "resume", "device")

_LARGEST_SEED = 2**31 - 1  # seeds of epochs are made from it


@dataclass(frozen=True)
class RunConfig:
    """Train a small vision transformer, prune it over rounds, and report.

    The default trains a timm ViT on scikit-learn's handwritten digits and removes half of its
    heads and MLP neurons with RSST.
    """

    method: Literal["rsst", "refill"] = "rsst"
    """rsst: a growing penalty, then a cut that costs nothing. refill: mask at once, train on."""
    rounds: int = 4
    """Rounds of rank, regroup, train."""
    amount: float = 0.2
    """Share of the weights still alive that each ranking prunes."""
    regroup_amount: float = 0.5
    """Share of all heads and neurons that is to go."""
    importance: Literal["magnitude", "remain"] = "magnitude"
    """How heads and neurons are scored."""
    scope: Literal["layer", "type", "global"] = "layer"
    """What they compete with: their layer, their type, or everything."""
    schedule: str = "exp_custom_exponents"
    """How the penalty grows over a round: linear, quadratic, cubic, exponential, exp_custom or
    exp_custom_exponents (RSST)."""
    strength: float = 0.5
    """Strength of the penalty at the end of a round (RSST)."""
    mode: Literal["auto", "coupled", "decoupled"] = "auto"
    """Whether the penalty goes through the gradient (RSST); auto: only for plain SGD."""
    fillback_rate: float = 0.0
    """Share of what would go that is given back (Refill)."""
    rewind: Literal["none", "init"] = "none"
    """Put surviving weights back to those of the dense model after each choice of a mask."""
    dense_epochs: int = 40
    """Epochs before the first round."""
    epochs: int = 12
    """Epochs of each round."""
    finetune_epochs: int = 10
    """Epochs after the cut."""
    batch_size: int = 32
    """Images per step."""
    learning_rate: float = 3e-3
    """Peak learning rate of AdamW in the dense stage; rounds and fine-tuning use a part of it."""
    seed: int = 0
    """Seed of weights, data order and augmentation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU if there is one."""
    output: Path = field(default=Path("runs/latest"))
    """Folder for config, metrics, weights, report and pictures; must not hold another run."""
    resume: bool = False
    """Continue the run in the output folder where it stopped, with its own options."""

    def check(self) -> None:
        """Raise unless every option is in its range.

        Not at construction, so that the command line can say it in its own words.

        Raises:
            TypeError, ValueError: with the option, what is expected and the remedy.
        """
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise ValueError(unknown_choice(name, getattr(self, name), get_args(kind)))
        check_count(self.rounds, "rounds", at_least=1)
        check_fraction(self.amount, "amount")
        check_fraction(self.regroup_amount, "regroup_amount")
        check_fraction(self.fillback_rate, "fillback_rate")
        resolve_schedule(self.schedule, self.strength)
        check_count(self.dense_epochs, "dense_epochs", at_least=0)
        check_count(self.epochs, "epochs", at_least=1)
        check_count(self.finetune_epochs, "finetune_epochs", at_least=0)
        check_count(self.batch_size, "batch_size", at_least=1)
        check_count(self.seed, "seed", at_least=0)
        if self.seed > _LARGEST_SEED:
            remedy = "Pass a smaller one."
            expected = f"at most {_LARGEST_SEED}"
            raise ValueError(message("seed", expected=expected, got=self.seed, remedy=remedy))
        rate = self.learning_rate
        if not (isinstance(rate, (int, float)) and 0.0 < rate < float("inf")):
            remedy = "Try 0.003."
            got = repr(rate)
            raise ValueError(
                message("learning_rate", expected="a number > 0", got=got, remedy=remedy)
            )

    def without_effect(self) -> list[str]:
        """Options that differ from their defaults but act in the other method only."""
        other = ("fillback_rate",) if self.method == "rsst" else ("schedule", "strength", "mode")
        defaults = {f.name: f.default for f in fields(self)}
        return [name for name in other if getattr(self, name) != defaults[name]]

    def to_yaml(self) -> str:
        """The options that make the run what it is, as YAML."""
        options = {key: value for key, value in asdict(self).items() if key != "resume"}
        options["output"] = str(self.output)
        return yaml.safe_dump(options, sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str, source: Path) -> RunConfig:
        """Read options back.

        Raises:
            ValueError: for a file that is no mapping of known options.
        """
        try:
            options: Any = yaml.safe_load(text)
        except yaml.YAMLError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(_bad_file(source, reason)) from error
        if not isinstance(options, Mapping):
            raise ValueError(_bad_file(source, f"a {type(options).__name__}"))
        known = {f.name for f in fields(cls)}
        if unknown := [str(key) for key in options if key not in known]:
            raise ValueError(_bad_file(source, f"unknown {listing(unknown)}"))
        try:
            config = cls(**{**options, "output": Path(options.get("output", "runs/latest"))})
            config.check()
        except (TypeError, ValueError) as error:
            raise ValueError(_bad_file(source, str(error))) from error
        return config

    def differences(self, other: RunConfig) -> dict[str, tuple[object, object]]:
        """Option → (own, other's) value, where a resumed run may not differ."""
        return {
            f.name: (getattr(self, f.name), getattr(other, f.name))
            for f in fields(self)
            if f.name not in _FREE_ON_RESUME and getattr(self, f.name) != getattr(other, f.name)
        }


@dataclass(frozen=True)
class ReportConfig:
    """Show the results of a finished run."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The run's output folder."""


@dataclass(frozen=True)
class CompactConfig:
    """Cut what is gone out of the model of a finished run, and measure what that saves."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The run's output folder."""
    output: Path | None = None
    """Folder for the smaller model; by default the folder "compact" in that of the run."""
    round_to: int = 1
    """Leave heads and neurons of each layer such that its width is a multiple of this."""
    export: bool = False
    """Also write a torch.export program, which runs without this library."""


def _bad_file(source: Path, got: str) -> str:
    return message(
        str(source),
        expected="the options of a run",
        got=got,
        remedy="Restore the file or start anew.",
    )

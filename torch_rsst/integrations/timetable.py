"""When rounds begin and how long they are: epochs or steps → optimizer steps."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch_rsst.utils.amounts import check_count, check_number
from torch_rsst.utils.errors import RoundWarning, refuse


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a trainer knows of its training, in optimizer steps; None where it does not."""

    steps_per_epoch: int | None
    total_steps: int | None


@dataclass(frozen=True, kw_only=True)
class Timetable:
    """Rounds in optimizer steps.

    Attributes:
        start_step: of the training: when the first round opens.
        steps_per_round: how long each is.
        rounds: how many.
    """

    start_step: int
    steps_per_round: int
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Rounds in epochs or steps, as the arguments of a callback say.

    Attributes:
        steps_per_round: how long a round is; this or ``epochs_per_round``.
        epochs_per_round: the same in epochs; may be a fraction.
        start_step: how many optimizer steps go before the first round; this or ``start_epoch``.
        start_epoch: the same in epochs.
        rounds: how many; None for as many as fit into the training.
    """

    steps_per_round: int | None = None
    epochs_per_round: float | None = None
    start_step: int | None = None
    start_epoch: float | None = None
    rounds: int | None = None

    def __post_init__(self) -> None:
        given = (self.steps_per_round is not None) + (self.epochs_per_round is not None)
        if given != 1:
            expected = "the length of a round, in epochs or in steps"
            remedy = "Pass epochs_per_round= or steps_per_round=."
            got = "both" if given else "neither"
            refuse(ValueError, "steps_per_round", expected, got, remedy)
        if self.start_step is not None and self.start_epoch is not None:
            remedy = "Pass start_epoch= or start_step=."
            refuse(ValueError, "start_step", "the start in epochs or in steps", "both", remedy)
        for name, least in (("steps_per_round", 1), ("start_step", 0), ("rounds", 1)):
            if (count := getattr(self, name)) is not None:
                check_count(count, name, at_least=least)
        if self.epochs_per_round is not None:
            remedy = "Pass 1 for an epoch, 0.5 for half of one."
            check_number(self.epochs_per_round, "epochs_per_round", above=0, remedy=remedy)
        if self.start_epoch:  # 0 is the default
            remedy = "Pass the number of epochs before the first round."
            check_number(self.start_epoch, "start_epoch", above=0, remedy=remedy)

    def timetable(self, training: Training, rounds: int | None = None) -> Timetable:
        """In optimizer steps of a training.

        Args:
            training: its steps.
            rounds: how many, where ``self.rounds`` does not say; None for as many as fit.

        Raises:
            ValueError: where the length of an epoch is needed and not known, or no round fits.

        Warns:
            RoundWarning: where the training ends before the last round.
        """
        start = self._steps("start_epoch", self.start_step, self.start_epoch, training)
        length = self._steps(
            "epochs_per_round", self.steps_per_round, self.epochs_per_round, training
        )
        length, total = max(1, length), training.total_steps
        if (rounds := self.rounds or rounds) is None:
            if total is None:
                expected, remedy = "a number: the training has no end", "Pass rounds=."
                refuse(ValueError, "rounds", expected, "none", remedy)
            rounds = (total - start) // length
            if rounds < 1:
                expected = f"a round of {length} steps to fit into the training"
                got = f"{total} steps, of which {start} go before"
                refuse(ValueError, "rounds", expected, got, "Train longer, or shorten the rounds.")
        elif total is not None and start + rounds * length > total:
            warnings.warn(
                f"The training ends after {total} optimizer steps, before the last of {rounds} rounds of "
                f"{length} that begin at step {start}. Train longer, or resume from its checkpoint.",
                RoundWarning,
                stacklevel=3,
            )
        return Timetable(start_step=start, steps_per_round=length, rounds=rounds)

    @staticmethod
    def _steps(name: str, steps: int | None, epochs: float | None, training: Training) -> int:
        if not epochs:
            return steps or 0
        if training.steps_per_epoch is None:
            expected = "a training whose epochs have a known number of optimizer steps"
            refuse(ValueError, name, expected, "another one", "Count in steps instead.")
        return round(epochs * training.steps_per_epoch)

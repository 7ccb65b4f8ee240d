"""The data that importances need: batches, how the model is run on one, and its loss."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from torch_rsst.importance.data_importance import DataImportance
from torch_rsst.utils.errors import message, refuse
from torch_rsst.utils.iterables import iterates

Batches: TypeAlias = Iterable[Any] | Callable[[], Iterable[Any]]
"""Batches, or a callable without arguments that returns them."""
Forward: TypeAlias = Callable[[nn.Module, Any], Any]
"""``(model, batch) → output``."""
LossFn: TypeAlias = Callable[[Any, Any], Tensor]
"""``(output, batch) → loss``."""


@dataclass(frozen=True, eq=False)
class DataSource:
    """Batches, how the model is run on one (``forward``), and its loss (``loss_fn``)."""

    batches: Batches | None = None
    forward: Forward | None = None
    loss_fn: LossFn | None = None

    def check(self, name: str, statistics: Collection[DataImportance], rounds: int = 1) -> None:
        """Raise unless an importance finds what it needs here, and nothing else; no batch is drawn.

        Args:
            name: of the importance.
            statistics: what is to be measured for it.
            rounds: how often.
        """
        if not statistics:
            given = {"batches": self.batches, "forward": self.forward, "loss_fn": self.loss_fn}
            for argument, value in given.items():
                if value is not None:
                    remedy = "Leave it out, or pass an importance such as 'activation_l1'."
                    expected = f"none: importance {name!r} looks at no data"
                    refuse(ValueError, argument, expected, "some", remedy)
            return
        self.check_batches(
            f"importance {name!r}", f"in each of {rounds} rounds" if rounds > 1 else ""
        )
        if self.loss_fn is None and any(s.needs_gradient for s in statistics):
            remedy = "Pass loss_fn=lambda output, batch: …, which returns the loss of a batch."
            expected = f"a function, for importance {name!r}"
            refuse(ValueError, "loss_fn", expected, "none", remedy)

    def check_batches(self, purpose: str, again: str = "") -> None:
        """Raise unless there are batches, and calls to run them; no batch is drawn.

        Args:
            purpose: what they are for, in messages.
            again: how often they are drawn, in messages; "" for once, which an iterator allows.
        """
        expected, got = "an iterable of batches", type(self.batches).__name__
        remedy = "Pass a DataLoader, a list of batches, or a function that returns one; with forward= for batches of inputs and labels."
        if self.batches is None:
            expected = f"batches to run on, for {purpose}"
            refuse(ValueError, "batches", expected, "none", remedy)
        if isinstance(self.batches, (Tensor, Mapping, str)):
            remedy = "For a single batch, pass [batch]."
            refuse(TypeError, "batches", expected, f"one {got}", remedy)
        if isinstance(self.batches, Iterator) and again:
            expected = f"batches that can be drawn {again}"
            refuse(TypeError, "batches", expected, f"a {got}", remedy)
        if not iterates(self.batches) and not callable(self.batches):
            refuse(TypeError, "batches", expected, f"a {got}", remedy)
        for argument, call in (("forward", self.forward), ("loss_fn", self.loss_fn)):
            if call is not None and not callable(call):
                remedy = "It takes (model, batch), a loss_fn (output, batch)."
                refuse(TypeError, argument, "a function", type(call).__name__, remedy)

    def draw(self) -> Iterator[Any]:
        """The batches, once through."""
        source: Any = self.batches
        drawn = source if iterates(source) else source()
        if not iterates(drawn) or isinstance(drawn, (Tensor, Mapping, str)):
            remedy = "For a single batch, return [batch]."
            expected, got = "a function that returns batches", f"one {type(drawn).__name__}"
            refuse(TypeError, "batches", expected, got, remedy)
        return iter(drawn)

    def output(self, model: nn.Module, batch: Any) -> Any:
        """The output of the model for a batch."""
        if self.forward is not None:
            return self.forward(model, batch)
        if isinstance(batch, Tensor):
            return model(batch)
        try:
            return model(batch)
        except Exception as error:
            got = f"a {type(batch).__name__} ({type(error).__name__}: {error})"
            remedy = "Pass forward=lambda model, batch: model(batch[0]), or what fits your batches."
            expected = "what model(batch) takes"
            text = message("batches", expected=expected, got=got, remedy=remedy)
            raise TypeError(text) from error

    def loss(self, output: Any, batch: Any, number: int) -> Tensor:
        """The loss of a batch, fit for gradients."""
        assert self.loss_fn is not None, "it has been checked"
        loss = self.loss_fn(output, batch)
        subject, expected = f"loss_fn, batch {number}", "a loss: a tensor with one number"
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shaped = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
            got, remedy = shaped or type(loss).__name__, "Return loss.sum() or loss.mean()."
            refuse(ValueError, subject, expected, got, remedy)
        if not bool(loss.isfinite().all()):
            expected, remedy = "a finite loss", "Look at this batch, or where training diverged."
            refuse(ValueError, subject, expected, loss.item(), remedy)
        if not loss.requires_grad:
            expected, got = "a loss that depends on the model", "one without a gradient"
            remedy = "Do not detach the output, nor run the model under torch.no_grad()."
            refuse(ValueError, subject, expected, got, remedy)
        return loss

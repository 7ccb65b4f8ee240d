"""RSST and Refill as callbacks of Lightning."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from torch.utils.hooks import RemovableHandle

from torch_rsst.groups.groups import KINDS, Groups
from torch_rsst.integrations.batch import example_batch
from torch_rsst.integrations.driver import Outcome, RoundsDriver, Units
from torch_rsst.integrations.masks_first import masks_first
from torch_rsst.integrations.timetable import Asked, Training
from torch_rsst.masking.mask_sets import extract_mask
from torch_rsst.rounds.engine import Rounds
from torch_rsst.rounds.refill import Refill
from torch_rsst.rounds.rsst import RSST
from torch_rsst.saving.builders import Build
from torch_rsst.saving.info import CompactInfo
from torch_rsst.utils.errors import listing, refuse

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    from pytorch_lightning import Callback

__all__ = ["RSSTCallback", "RefillCallback"]


class RoundsCallback(Callback):  # type: ignore[misc] # untyped
    """What both callbacks share.

    Args:
        steps_per_round: optimizer steps of a round; this or ``epochs_per_round``.
        epochs_per_round: the same in epochs; may be a fraction.
        rounds: how many; None for as many as fit into the training.
        start_step: how many optimizer steps go before the first round; this or ``start_epoch``.
        start_epoch: the same in epochs.
        module: dotted name of the part of the LightningModule that is pruned and compacted, ``"model"`` for ``self.model``;
            all of it by default.
        groups: of that part, from :func:`torch_rsst.find_groups`; None finds them.
        kinds: of units to find.
        example_inputs: for :func:`torch_rsst.find_groups` and :func:`torch_rsst.compact`; by default a
            batch of the training data: a mapping is passed as keyword arguments, of a sequence the first.
        force: cut even where the penalty has left much of the weights that go.
        compact_to: a folder; when training ends the model is compacted and saved to it, by rank 0.
        build: how the dense model is built, see :func:`torch_rsst.save_compact`.
        info: classes, images and metrics for that folder, a :class:`torch_rsst.CompactInfo`.
        arguments: those of the rounds, ``amount=``, ``regroup_amount=``, ``batches=``, ``reconstruct=`` …
            ``batches`` may be those of a training loader: ``forward`` runs on them as on the example.

    Raises:
        TypeError, ValueError: for arguments that are unknown or out of range.
            When training begins: for strategies that load weights after sharding the model (FSDP, DeepSpeed), for
            checkpoints that hold masks and no state of this callback, and what the rounds raise.
        OSError: where ``compact_to`` cannot be written to; nothing has been trained then.
    """

    _method: ClassVar[Callable[..., Rounds]]

    def __init__(
        self,
        *,
        steps_per_round: int | None = None,
        epochs_per_round: float | None = None,
        rounds: int | None = None,
        start_step: int | None = None,
        start_epoch: float | None = None,
        module: str = "",
        groups: Groups | None = None,
        kinds: Sequence[str] = KINDS,
        example_inputs: Any = None,
        force: bool = False,
        compact_to: str | Path | None = None,
        build: Build | None = None,
        info: CompactInfo | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__()
        if not isinstance(module, str):
            remedy = "Pass module='model' for self.model, or leave it out for all."
            refuse(TypeError, "module", "a dotted name", repr(module), remedy)
        self.module = module
        self.driver = RoundsDriver(
            type(self)._method,
            asked=Asked(
                steps_per_round=steps_per_round,
                epochs_per_round=epochs_per_round,
                rounds=rounds,
                start_step=start_step,
                start_epoch=start_epoch,
            ),
            units=Units(groups=groups, kinds=kinds, example_inputs=example_inputs),
            outcome=Outcome(force=force, compact_to=compact_to, build=build, info=info),
            arguments=arguments,
        )
        self._hook: RemovableHandle | None = None

    @property
    def rounds(self) -> Rounds | None:
        """The rounds; None before training."""
        return self.driver.rounds

    @property
    def compacted(self) -> nn.Module | None:
        """The compacted model, on rank 0, where ``compact_to`` is given and training has ended."""
        return self.driver.compacted

    # Before training: setup → the model's weights are loaded → our state is loaded → on_fit_start

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let masked weights find their masks."""
        if stage == "fit" and trainer.strategy.restore_checkpoint_after_setup:
            expected = "a strategy that loads weights before the model is sharded"
            got = type(trainer.strategy).__name__
            remedy = "Use one device or DDP; a loop of your own takes FSDP2."
            refuse(ValueError, type(self).__name__, expected, got, remedy)
        self._hook = masks_first(pl_module)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of rounds that some other callback has made."""
        fitting = getattr(trainer.state.fn, "value", None) == "fit"
        ours = checkpoint.get("callbacks", {}).get(self.state_key)
        if fitting and not ours and extract_mask(checkpoint["state_dict"]):
            expected = "the state of this callback for its masked weights"
            remedy = "Resume with the callback of the checkpoint, or load its weights only."
            refuse(ValueError, "checkpoint", expected, "none", remedy)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the rounds; open the first, or the one that a checkpoint has left open."""
        self._remove_hook()
        trainer.fit_loop.setup_data()
        batches = trainer.num_training_batches
        known = pl_module.automatic_optimization and math.isfinite(batches)
        total = trainer.estimated_stepping_batches if pl_module.automatic_optimization else -1
        training = Training(
            steps_per_epoch=math.ceil(batches / trainer.accumulate_grad_batches) if known else None,
            total_steps=int(total) if 0 <= total < math.inf else None,
        )
        model = _part_of(pl_module, self.module)
        self.driver.begin(
            model,
            trainer.optimizers,
            training,
            lambda: example_batch(trainer.train_dataloader, model),
            steps=trainer.global_step,
        )

    # During training

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, then open the next round or finalize where it is time."""
        every, step = trainer.log_every_n_steps, trainer.global_step
        if trainer.loggers and every and step and step % every == 0 and step != self._logged:
            self._logged = step
            metrics = self.driver.metrics()
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)
        self.driver.advance(step)

    _logged = 0

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Compact and save, or warn that the last round was not done."""
        self.driver.finish(save=trainer.is_global_zero)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave model and optimizers without hooks, for the next try."""
        self._remove_hook()
        self.driver.abandon()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the model without a hook."""
        self._remove_hook()

    # State

    def state_dict(self) -> dict[str, Any]:
        """For the trainer's checkpoint."""
        return self.driver.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """From the trainer's checkpoint."""
        self.driver.load_state_dict(state_dict)

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _part_of(pl_module: Any, name: str) -> nn.Module:
    try:
        part: nn.Module = pl_module.get_submodule(name)
    except AttributeError:
        expected = f"a part of {type(pl_module).__name__}"
        remedy = f"It has {listing(key for key, _ in pl_module.named_modules() if key)}."
        refuse(ValueError, "module", expected, repr(name), remedy)
    return part


class RSSTCallback(RoundsCallback):
    """:class:`torch_rsst.RSST` in a Lightning trainer.

    Example:
        >>> import lightning
        >>> from torch_rsst.integrations.lightning import RSSTCallback
        >>> prune = RSSTCallback(epochs_per_round=1, rounds=3, compact_to="small")
        >>> trainer = lightning.Trainer(max_epochs=4, callbacks=[prune], accelerator="cpu")

    Rounds follow each other by optimizer steps, whatever accumulation and precision. After the last one
    the rounds are finalized, and what is left of the training goes on under the final masks. λ
    (``rsst/strength``), ``rsst/penalized_norm_ratio``, the share of units that are gone and the sparsity go
    to the trainer's loggers. Checkpoints hold the state: ``trainer.fit(model, ckpt_path=…)`` resumes in the
    middle of a round, with the masks made before the weights are loaded.

    Arguments and errors are those of :class:`RoundsCallback`.
    """

    _method = RSST


class RefillCallback(RoundsCallback):
    """:class:`torch_rsst.Refill` in a Lightning trainer; see :class:`RSSTCallback`."""

    _method = Refill

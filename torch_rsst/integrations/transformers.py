"""RSST and Refill as callbacks of Hugging Face's Trainer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DefaultFlowCallback, TrainerCallback
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from torch_rsst.groups.groups import KINDS, Groups
from torch_rsst.integrations.batch import example_batch
from torch_rsst.integrations.driver import Outcome, RoundsDriver, Units
from torch_rsst.integrations.masks_first import masks_first
from torch_rsst.integrations.timetable import Asked, Training
from torch_rsst.rounds.engine import Rounds
from torch_rsst.rounds.refill import Refill
from torch_rsst.rounds.rsst import RSST
from torch_rsst.saving.builders import Build
from torch_rsst.saving.info import CompactInfo
from torch_rsst.utils.errors import refuse
from torch_rsst.utils.files import write_atomically

__all__ = ["RSSTCallback", "RefillCallback"]

STATE = "torch_rsst.pt"
"""The file with the state of the rounds in a checkpoint's folder."""


class RoundsCallback(TrainerCallback):
    """What both callbacks share.

    Args:
        steps_per_round: optimizer steps of a round; this or ``epochs_per_round``.
        epochs_per_round: the same in epochs; may be a fraction.
        rounds: how many; None for as many as fit into the training.
        start_step: how many optimizer steps go before the first round; this or ``start_epoch``.
        start_epoch: the same in epochs.
        groups: of the model, from :func:`torch_rsst.find_groups`; None finds them.
        kinds: of units to find.
        example_inputs: for :func:`torch_rsst.find_groups` and :func:`torch_rsst.compact`; by default a
            batch of the training data.
        force: cut even where the penalty has left much of the weights that go.
        compact_to: a folder; when training ends the model is compacted and saved to it, by rank 0.
        build: how the dense model is built, see :func:`torch_rsst.save_compact`.
        info: classes, images and metrics for that folder, a :class:`torch_rsst.CompactInfo`.
        resume_from: the folder of the checkpoint that training resumes from, where it is not
            ``checkpoint-<step>`` in the trainer's ``output_dir``.
        arguments: those of the rounds, ``amount=``, ``regroup_amount=``, ``batches=``, ``reconstruct=`` …
            ``batches`` may be those of a training loader.

    Raises:
        TypeError, ValueError: for arguments that are unknown or out of range. When the trainer is made or
            training begins: for FSDP, DeepSpeed, ``load_best_model_at_end`` and searches of hyperparameters, and what
            the rounds raise.
        OSError: where ``compact_to`` cannot be written to; nothing has been trained then.
        FileNotFoundError: when training resumes from a checkpoint without the state of the rounds.
        RuntimeError: when training resumes and the weights were loaded without their masks.
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
        groups: Groups | None = None,
        kinds: Sequence[str] = KINDS,
        example_inputs: Any = None,
        force: bool = False,
        compact_to: str | Path | None = None,
        build: Build | None = None,
        info: CompactInfo | None = None,
        resume_from: str | Path | None = None,
        **arguments: Any,
    ) -> None:
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
        self.resume_from = resume_from
        self._hook: RemovableHandle | None = None
        self._adds_cache = False

    @property
    def rounds(self) -> Rounds | None:
        """The rounds; None before training."""
        return self.driver.rounds

    @property
    def compacted(self) -> nn.Module | None:
        """The compacted model, on rank 0, where ``compact_to`` is given and training has ended."""
        return self.driver.compacted

    def log_through(self, trainer: Any) -> None:
        """Let the trackers of ``report_to`` log the rounds too.

        The trainer tells its callbacks of a log one after the other, trackers first: this puts the callback before
        them. Without it, the rounds' values are in ``trainer.state.log_history`` and on the console.

        Raises:
            ValueError: for a trainer without this callback.
        """
        callbacks = trainer.callback_handler.callbacks
        if self not in callbacks:
            remedy = "Pass the callback in callbacks= when the trainer is made."
            refuse(ValueError, "trainer", "one with this callback", "another one", remedy)
        callbacks.remove(self)
        # Behind the one that decides when to log: on_step_end asks.
        flow = [isinstance(callback, DefaultFlowCallback) for callback in callbacks]
        callbacks.insert(flow.index(True) + 1 if True in flow else 0, self)

    # Before training: on_init_end → the model's weights are loaded → on_train_begin

    def on_init_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Let masked weights find their masks: a trainer loads them before it calls anyone."""
        sharding = next((n for n in ("fsdp", "deepspeed") if getattr(args, n, None)), None)
        if sharding:
            remedy = "Use one device or DDP; a loop of your own takes FSDP2."
            refuse(ValueError, sharding, "a model that is not sharded", "a sharded one", remedy)
        self._hook = masks_first(parts["model"])
        # The trainer is about to set it on any configuration, also on one that has none.
        self._adds_cache = not hasattr(getattr(parts["model"], "config", None), "use_cache")

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Make the rounds; open the first, or the one that a checkpoint has left open."""
        self._remove_hook()
        model, loader = parts["model"], parts["train_dataloader"]
        if args.load_best_model_at_end:
            expected, got = "False: the best model so far has other masks", "True"
            remedy = (
                "Load the checkpoint that you want after training, with the masks that it holds."
            )
            refuse(ValueError, "load_best_model_at_end", expected, got, remedy)
        if state.is_hyper_param_search:
            remedy = "Search first, then prune."
            refuse(ValueError, "trainer", "a training", "a search of hyperparameters", remedy)
        if state.global_step > 0:
            self._load(args, state)
        self.driver.begin(
            model,
            [parts["optimizer"]],
            Training(
                steps_per_epoch=_steps_per_epoch(loader, args.gradient_accumulation_steps),
                total_steps=state.max_steps,
            ),
            lambda: example_batch(loader, model),
            steps=state.global_step,
        )

    # During training

    def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Open the next round or finalize where it is time, before the trainer saves."""
        self._metrics = self.driver.metrics() if control.should_log else {}
        self.driver.advance(state.global_step)

    _metrics: dict[str, float] = {}  # noqa: RUF012 # replaced, never changed

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **parts: Any) -> None:
        """Add the rounds' values to what is logged of training."""
        if logs is not None and "loss" in logs:
            metrics = self._metrics or self.driver.metrics()
            logs.update(metrics)
            state.log_history[-1].update(metrics)

    def on_save(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Put the state of the rounds into the checkpoint's folder."""
        if args.should_save:
            folder, model = _folder(args, state), parts["model"]
            saved = {**self.driver.state_dict(), "weights": _not_reloaded(folder, model)}
            write_atomically(folder / STATE, lambda file: torch.save(saved, file))

    def on_train_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Compact and save, or warn that the last round was not done."""
        config: Any = getattr(parts["model"], "config", None)
        if self._adds_cache and hasattr(config, "use_cache"):
            del config.use_cache  # no model can be built with it
        self.driver.finish(save=args.should_save)

    def _load(self, args: Any, state: Any) -> None:
        path = Path(self.resume_from or _folder(args, state)) / STATE
        if not path.is_file():
            expected = f"{STATE} in the folder of the checkpoint, step {state.global_step}"
            remedy = (
                "Pass resume_from= to the callback where the checkpoint is elsewhere; one that was not "
                "written to its end, or without the callback, cannot be resumed from."
            )
            refuse(FileNotFoundError, "checkpoint", expected, f"none at {path}", remedy)
        self.driver.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _not_reloaded(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint does not hold under the model's own names: trainers load no other ones.

    Many models are saved under the names that an older version of transformers gave to their weights.
    """
    single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    held: set[str] = set()
    if single.is_file():
        with safe_open(single, framework="pt") as file:
            held = set(file.keys())
    elif index.is_file():
        held = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    state: dict[str, Tensor] = model.state_dict()
    return {key: value for key, value in state.items() if key not in held}


def _steps_per_epoch(loader: Any, accumulation: int) -> int | None:
    try:
        return max(1, -(-len(loader) // accumulation))
    except TypeError:  # an iterable without a length
        return None


class RSSTCallback(RoundsCallback):
    """:class:`torch_rsst.RSST` in a ``transformers.Trainer``.

    Example:
        >>> from torch_rsst.integrations.transformers import RSSTCallback
        >>> prune = RSSTCallback(epochs_per_round=1, rounds=3, compact_to="small")

    Then ``Trainer(model, args, train_dataset=data, callbacks=[prune])``.

    Rounds follow each other by optimizer steps, whatever accumulation and precision. After the last one
    the rounds are finalized, and what is left of the training goes on under the final masks. λ
    (``rsst/strength``), ``rsst/penalized_norm_ratio``, the share of units that are gone and the sparsity
    are logged with the loss. Checkpoints hold the state: ``trainer.train(resume_from_checkpoint=True)``
    resumes in the middle of a round, with the masks made before the weights are loaded. Pass the callback
    when the trainer is made, not later.

    Arguments and errors are those of :class:`RoundsCallback`.
    """

    _method = RSST


class RefillCallback(RoundsCallback):
    """:class:`torch_rsst.Refill` in a ``transformers.Trainer``; see :class:`RSSTCallback`."""

    _method = Refill

"""The run: train dense, prune over rounds, cut, fine-tune, report; resumable after any step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from accelerate.utils import broadcast_object_list
from torch import nn

import torch_rsst
from torch_rsst.compaction.cost import measure_cost
from torch_rsst.recipes.advice import warn_near_chance, warn_of_costly_cut, warn_of_rounding
from torch_rsst.recipes.config import RunConfig
from torch_rsst.recipes.images import BadImages
from torch_rsst.recipes.run_folder import RunFolder
from torch_rsst.recipes.run_rounds import find_units, make_rounds, plan_target
from torch_rsst.recipes.teacher import read_teacher, write_teacher
from torch_rsst.recipes.training import Epoch, Interrupted, Stage, StoppedElsewhere, Trainer
from torch_rsst.report.sparsity import SparsityReport
from torch_rsst.rounds.engine import Round, Rounds
from torch_rsst.utils.errors import listing, refuse

# "First zero": the penalized norm fell below this share of its value at the start of the round.
_ZERO = 0.01


class Observer(Protocol):
    """Gets the progress of a run, to show it."""

    def stage(self, stage: Stage, steps: int, done: int) -> None:
        """A stage of ``steps`` steps begins; ``done`` of them were made before."""

    def step(self) -> None:
        """One optimizer step was made."""

    def record(self, record: dict[str, Any]) -> None:
        """An epoch or a round ended."""


@dataclass
class Progress:
    """The progress of a run: what a checkpoint holds beside model, optimizer and rounds."""

    stage: str = "dense"
    step: int = 0
    seconds: float = 0.0
    dense_accuracy: float = 0.0
    accuracy_before_cut: float = 0.0
    accuracy_after_cut: float = 0.0
    accuracy_first_zero: float | None = None
    plan: dict[str, Any] | None = None


class Experiment:
    """One run in its folder.

    Example:
        >>> from torch_rsst.recipes.config import RunConfig
        >>> results = Experiment(RunConfig(output=path)).run()  # doctest: +SKIP
    """

    def __init__(
        self, config: RunConfig, observer: Observer, should_stop: Callable[[], bool] = lambda: False
    ) -> None:
        config.check()
        self.config, self.observer, self._should_stop = config, observer, should_stop
        self.folder = RunFolder(config.output)
        self.trainer = Trainer(config)
        self.model: nn.Module = self.trainer.bare
        self.writes = self.trainer.accelerator.is_main_process
        self.groups = find_units(config, self.trainer)
        warn_of_rounding(config, self.model, self.groups)
        # Tried now, so that a target out of reach ends the run before its training.
        plan = None if config.resume else plan_target(config, self.trainer, self.groups)
        self.progress = Progress(plan=plan)
        self.records: list[dict[str, Any]] = []
        self.rounds: Rounds | None = None
        self._started = time.monotonic()
        self._claim_folder()
        try:
            if config.log:
                self.trainer.accelerator.init_trackers(self.folder.log.name)
            if config.resume:
                self._resume()
        except BaseException:
            self._close()
            raise

    def _claim_folder(self) -> None:
        """Open the folder on the process that writes; the others continue or stop with it."""
        problem: Exception | None = None
        if self.writes:
            try:
                self.folder.open(self.config)
            except Exception as error:
                problem = error
        (failed,) = broadcast_object_list([problem is not None])
        if problem is not None:
            raise problem
        if failed:
            raise StoppedElsewhere

    def _resume(self) -> None:
        try:
            state = self.folder.read_checkpoint()
        except Exception as error:  # of many kinds, for a damaged file
            raise self.folder.bad_checkpoint(error) from error
        if state is None:
            return
        before, now = state.get("images"), self.trainer.images.contents
        if isinstance(before, dict) and before != now:
            remedy = "Put the images back as they were, or start a new run."
            expected = f"the images that the run began with, {_described(before)}"
            refuse(ValueError, "images", expected, _described(now), remedy)
        try:
            self._restore(state)
        except Exception as error:  # of many kinds, for a checkpoint of something else
            raise self.folder.bad_checkpoint(error) from error

    @property
    def steps_done(self) -> int:
        """Optimizer steps made before, of the whole run."""
        config = self.config
        epochs = {
            "dense": 0,
            "rounds": config.dense_epochs,
            "finetune": config.dense_epochs + config.rounds * config.epochs,
        }[self.progress.stage]
        if self.rounds is not None and self.progress.stage == "rounds" and self.rounds.round:
            epochs += self.rounds.round.index * config.epochs
        return epochs * self.trainer.steps_per_epoch + self.progress.step

    def run(self) -> dict[str, Any]:
        """Train the stages that are left, then unlock the folder.

        Returns:
            the results, as in ``report.json``.

        Raises:
            Interrupted: when asked to stop; the checkpoint is written.
            Diverged: when the loss is not finite.
            BadImages: for images that cannot be read, or have no class.
            OSError: where the folder cannot be written.
        """
        failed_early = in_step = False
        try:
            results = self._run()
            in_step = True
            return results
        except Interrupted:
            in_step = True  # all processes stop at the same step
            raise
        except BadImages:
            # Found only when they were read. A corrected command needs an empty folder.
            failed_early = not self.records and not self.config.resume
            raise
        finally:
            self._close(withdraw=failed_early, in_step=in_step)

    def _close(self, *, withdraw: bool = False, in_step: bool = False) -> None:
        if in_step:  # gloo may abort where a process ends while another still works
            self.trainer.accelerator.wait_for_everyone()
        if in_step or self.config.log:
            self.trainer.accelerator.end_training()
        if self.writes:
            if withdraw:
                self.folder.withdraw()
            self.folder.close()

    def _run(self) -> dict[str, Any]:
        if self.progress.stage == "dense":
            self._train(self._dense_stage())
            self.progress.dense_accuracy = self.trainer.evaluate()
            classes, distilled = self.trainer.images.classes, bool(self.config.distill)
            warn_near_chance(self.progress.dense_accuracy, classes, distilled=distilled)
            if distilled:
                write_teacher(self.folder, self.trainer)
            self.progress.plan = plan_target(self.config, self.trainer, self.groups)
            self.rounds = self._make_rounds()
            self._advance("rounds")
        assert self.rounds is not None, "the checkpoint of a later stage holds them"
        if self.progress.stage == "rounds":
            self._prune(self.rounds)
            self._advance("finetune")
        first = self.config.dense_epochs + self.config.rounds * self.config.epochs
        peak = self.config.finetune_learning_rate
        self._train(Stage("finetune", self.config.finetune_epochs, first, peak))
        return self._finish()

    # The stages

    def _dense_stage(self) -> Stage:
        epochs = self.config.dense_epochs
        return Stage("dense", epochs, 0, 1.0, min(self.config.warmup_epochs, epochs / 2))

    def _make_rounds(self) -> Rounds:
        plan = self.progress.plan
        config = replace(self.config, regroup_amount=plan["amount"]) if plan else self.config
        return make_rounds(config, self.trainer, self.groups)

    def _prune(self, rounds: Rounds) -> None:
        epochs, peak = self.config.epochs, self.config.round_learning_rate
        for rnd in rounds:
            first = self.config.dense_epochs + rnd.index * epochs
            self.progress.step = rnd.start_step
            self._train(Stage(f"round {rnd.index}", epochs, first, peak), rnd)
            self._record_round(rnd)
        self.progress.accuracy_before_cut = self.trainer.evaluate()
        if self.config.reconstruction is None:
            warn_of_costly_cut(rounds)
        rounds.finalize(force=True)
        self.progress.accuracy_after_cut = self.trainer.evaluate()

    def _train(self, stage: Stage, rnd: Round | None = None) -> None:
        steps = stage.epochs * self.trainer.steps_per_epoch
        self.observer.stage(stage, steps, self.progress.step)
        for epoch in self.trainer.run(stage, self.progress.step, self._after_step):
            self._record_epoch(stage, epoch, rnd)
            self._save()
            self._stop_if_asked()

    def _after_step(self, done: int) -> None:
        self.progress.step = done
        self.observer.step()
        if done % self.trainer.steps_per_epoch:  # at the end of an epoch it is recorded first
            self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        if self.trainer.any_process(self._should_stop()):
            self._save()
            raise Interrupted

    def _advance(self, stage: str) -> None:
        self.progress.stage, self.progress.step = stage, 0
        self._save()

    # Records and results

    def _record_epoch(self, stage: Stage, epoch: Epoch, rnd: Round | None) -> None:
        record: dict[str, Any] = {
            "event": "epoch",
            "stage": stage.name,
            "epoch": stage.first_epoch + epoch.number,
            "loss": epoch.loss,
            "accuracy": epoch.accuracy,
            "learning_rate": epoch.learning_rate,
        }
        if rnd is not None and self.config.method == "rsst":
            norm, start = rnd.pruner.penalized_norm(), rnd.pruner.start_norm
            record |= {"strength": rnd.pruner.strength, "penalized_norm": norm}
            if self.progress.accuracy_first_zero is None and start and norm < _ZERO * start:
                self.progress.accuracy_first_zero = epoch.accuracy
        self._record(record)

    def _record_round(self, rnd: Round) -> None:
        report = rnd.report()
        self._record(
            {
                "event": "round",
                "round": rnd.index,
                "accuracy": self.trainer.evaluate(),
                "element_sparsity": report.element_sparsity,
                "share_gone": {kind: report.unit_sparsity(kind) for kind in report.kinds},
                "share_to_go": {kind: _share_to_go(report, kind) for kind in report.kinds},
                "strength": rnd.pruner.strength if self.config.method == "rsst" else 0.0,
                "penalized_norm_start": rnd.pruner.start_norm,
                "penalized_norm": report.penalized_norm,
                "penalized_norm_ratio": report.to_dict()["penalized_norm_ratio"],
                "free_share": self.rounds.free_share if self.rounds else 0.0,
            }
        )

    def _record(self, record: dict[str, Any]) -> None:
        self.records.append(record | {"seconds": round(self._seconds(), 3)})
        if self.writes:
            self.folder.write_metrics(self.records)
        if self.config.log:
            numbers = {k: v for k, v in record.items() if isinstance(v, (int, float))}
            self.trainer.accelerator.log(
                {f"{record['event']}/{key}": value for key, value in numbers.items()},
                step=len(self.records),
            )
        self.observer.record(self.records[-1])

    def _seconds(self) -> float:
        return self.progress.seconds + time.monotonic() - self._started

    def _finish(self) -> dict[str, Any]:
        outcome = self.trainer.outcome
        report = torch_rsst.sparsity_report(outcome, self.groups)
        image = self.trainer.example[:1].to(self.trainer.accelerator.device)
        cost = measure_cost(outcome, image)
        results = {
            "method": self.config.method,
            "model": self.trainer.name,
            "build": self.trainer.build,
            "input_size": list(self.trainer.example.shape[1:]),
            "classes": self.trainer.images.labels,
            "chance": 100.0 / self.trainer.images.classes,
            "dense_accuracy": self.progress.dense_accuracy,
            "accuracy_before_cut": self.progress.accuracy_before_cut,
            "accuracy_after_cut": self.progress.accuracy_after_cut,
            "accuracy_first_zero": self.progress.accuracy_first_zero,
            "accuracy": self.trainer.evaluate(),
            "plan": self.progress.plan,
            "element_sparsity": report.element_sparsity,
            **{sparsity_of(kind): report.unit_sparsity(kind) for kind in report.kinds},
            "parameters": cost.parameters,
            "multiply_adds": cost.multiply_adds,
            "seconds": round(self._seconds(), 1),
            "sparsity": report.to_dict(),
        }
        if self.writes:
            self._write(report, results)
        return results

    def _write(self, report: SparsityReport, results: dict[str, Any]) -> None:
        self.folder.write_tensors(self.folder.weights, self.trainer.outcome)
        self._present(report, results)
        self.folder.write_report(results)  # last: it marks the run as finished
        self.folder.checkpoint.unlink(missing_ok=True)
        self.folder.teacher.unlink(missing_ok=True)

    def _present(self, report: SparsityReport, results: dict[str, Any]) -> None:
        from torch_rsst.recipes.pictures import draw_all  # matplotlib is slow to import
        from torch_rsst.recipes.report_page import write_page

        draw_all(
            self.folder,
            self.config,
            self.records,
            report,
            self.trainer.outcome,
            self.groups,
            steps_per_round=self.config.epochs * self.trainer.steps_per_epoch,
        )
        write_page(self.folder, self.config, results, self.records)

    # Checkpoints

    def _save(self) -> None:
        losses = self.trainer.losses
        if not self.writes:
            return
        average, scaler = self.trainer.average, self.trainer.accelerator.scaler
        self.folder.write_checkpoint(
            {
                **vars(self.progress),
                "seconds": self._seconds(),
                "records": self.records,
                "losses": losses,
                "images": self.trainer.images.contents,
                "rounds": None if self.rounds is None else self.rounds.state_dict(),
                "model": self.model.state_dict(),
                "average": None if average is None else average.state_dict(),
                "optimizer": self.trainer.optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
            }
        )

    def _restore(self, state: dict[str, Any]) -> None:
        if state["stage"] not in ("dense", "rounds", "finetune") or not 0 <= state["step"] < 10**9:
            raise ValueError(f"stage {state['stage']!r}, step {state['step']!r}")
        if (state["rounds"] is None) != (state["stage"] == "dense"):
            raise ValueError("no rounds in a stage that has them, or the reverse")
        list(map(dict, state["records"]))
        if state["rounds"] is not None:
            self.progress.plan = state.get("plan")
            self.rounds = self._make_rounds()
            self.rounds.load_state_dict(state["rounds"])
            if self.config.distill:
                read_teacher(self.folder, self.trainer)
        self.model.load_state_dict(state["model"])
        if self.trainer.average is not None:
            self.trainer.average.load_state_dict(state["average"])
        self.trainer.optimizer.load_state_dict(state["optimizer"])
        if self.trainer.accelerator.scaler is not None:
            self.trainer.accelerator.scaler.load_state_dict(state["scaler"])
        self.trainer.losses = state["losses"]
        self.records = state["records"]
        state = {"plan": None, **state}  # which earlier versions did not have
        self.progress = Progress(**{key: state[key] for key in vars(self.progress)})


def _described(contents: dict[str, Any]) -> str:
    parts = {key: value for key, value in contents.items() if key != "classes"}
    classes = contents["classes"]
    named = f"classes {listing(classes)}" if isinstance(classes, list) else f"{classes} classes"
    return ", ".join(
        [*(f"{count:,} {key.replace('_', ' ')}" for key, count in parts.items()), named]
    )


def sparsity_of(kind: str) -> str:
    """The key in the results of the share of a kind of units that is gone."""
    return f"{kind.removesuffix('s')}_sparsity"


def _share_to_go(report: SparsityReport, kind: str) -> float:
    dropped = sum(layer.dropped or 0 for layer in report.layers if layer.kind == kind)
    return dropped / report.units(kind)

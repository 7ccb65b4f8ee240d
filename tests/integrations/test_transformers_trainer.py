"""The callbacks in real Hugging Face trainers: counting, logs, resuming, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import run_until_killed
from torch import nn

import torch_rsst

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import (  # noqa: E402
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from torch_rsst.integrations.transformers import RefillCallback, RSSTCallback  # noqa: E402

pytestmark = pytest.mark.needs_timm  # the Trainer imports torchvision where it is installed


def vit() -> Any:
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=10,
        hidden_dropout_prob=0.1,
    )
    torch.manual_seed(0)
    return ViTForImageClassification(config)


class Classifier(nn.Module):
    """Saved under its own names, as most models are."""

    _keys_to_ignore_on_save = None  # the Trainer looks at it when it warns

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.fc1, self.act, self.fc2 = nn.Linear(64, 24), nn.GELU(), nn.Linear(24, 10)
        self.dropout = nn.Dropout(0.1)

    def forward(self, pixel_values: torch.Tensor, labels: Any = None) -> dict[str, Any]:
        logits = self.fc2(self.dropout(self.act(self.fc1(pixel_values.flatten(1)))))
        found = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**found, "logits": logits}


def data() -> list[dict[str, Any]]:
    images = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": image, "labels": i % 10} for i, image in enumerate(images)]


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Any:
    settings = {
        "max_steps": 20,
        "per_device_train_batch_size": 8,
        "save_steps": 3,
        "logging_steps": 4,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    model = options.pop("model", None) or Classifier()
    args = TrainingArguments(output_dir=str(folder), **{**settings, **options})
    parts = {"train_dataset": data(), "eval_dataset": data(), "callbacks": list(callbacks)}
    return Trainer(model, args, **parts)


class GoesDown(TrainerCallback):  # type: ignore[misc]
    """Fails after a step, before a checkpoint of it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        if state.global_step == self.step:
            raise RuntimeError("the machine went down")


def assert_equal_bits(model: nn.Module, other: nn.Module) -> None:
    one, two = model.state_dict(), other.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_rounds_end_with_a_folder_that_loads_by_itself(tmp_path: Path) -> None:
    callback = RSSTCallback(epochs_per_round=2, rounds=2, compact_to=tmp_path / "small")
    trained = trainer(tmp_path, callback, save_strategy="no", model=vit())
    trained.train()
    report = callback.rounds.report()
    assert callback.rounds.steps_per_round == 8
    assert (report.gone("heads"), report.gone("neurons")) == (2, 12)
    loaded, x = torch_rsst.load_compact(tmp_path / "small"), torch.randn(2, 1, 8, 8)
    trained.model.eval()
    torch.testing.assert_close(loaded.eval()(x).logits, trained.model(x).logits)
    assert not trained.model._load_state_dict_pre_hooks


@pytest.mark.parametrize(("accumulated", "steps"), [(1, 4), (2, 2), (3, 2)])
def test_an_epoch_is_counted_in_optimizer_steps(
    tmp_path: Path, accumulated: int, steps: int
) -> None:
    callback = RSSTCallback(epochs_per_round=1)
    options = {"gradient_accumulation_steps": accumulated, "max_steps": -1, "num_train_epochs": 3}
    trainer(tmp_path, callback, save_strategy="no", **options).train()
    assert (callback.rounds.steps_per_round, callback.rounds.rounds) == (steps, 3)
    assert callback.rounds.round.pruner.steps == steps
    assert callback.driver.finalized


def test_mixed_precision_counts_its_steps(tmp_path: Path) -> None:
    callback = RSSTCallback(steps_per_round=5, rounds=4)
    trainer(tmp_path, callback, bf16=True, save_strategy="no").train()
    assert callback.driver.finalized
    assert callback.rounds.report().gone("neurons") == 12


@pytest.mark.parametrize("kind", [RSSTCallback, RefillCallback])
@pytest.mark.parametrize("down_at", [5, 10, 16])
def test_a_run_that_is_killed_resumes_to_the_same_bits(
    tmp_path: Path, kind: Any, down_at: int
) -> None:
    """The checkpoint is three steps old or less: before the first round ends, in the second, at the end."""

    def callback() -> Any:
        return kind(steps_per_round=6, rounds=2, start_step=2, regroup_amount=0.5)

    check_resume(tmp_path, callback, down_at, Classifier)


def check_resume(tmp_path: Path, callback: Any, down_at: int, model: Any) -> None:
    whole = trainer(tmp_path / "whole", first := callback(), model=model(), save_strategy="no")
    whole.train()
    with pytest.raises(RuntimeError, match="went down"):
        trainer(tmp_path / "run", callback(), GoesDown(down_at), model=model()).train()
    resumed = trainer(tmp_path / "run", second := callback(), model=model())
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 20
    assert second.rounds.report().gone("neurons") > 0
    assert_equal_bits(resumed.model, whole.model)
    assert second.rounds.report().to_dict() == first.rounds.report().to_dict()


KILLED = """
import os, signal, sys
from pathlib import Path
from test_transformers_trainer import RSSTCallback, TrainerCallback, trainer, vit

class Killed(TrainerCallback):
    def on_step_end(self, args, state, control, **parts):
        if state.global_step == 11:
            os.kill(os.getpid(), signal.SIGKILL)

callback = RSSTCallback(steps_per_round=6, rounds=2, start_step=2)
trainer(Path(sys.argv[1]), callback, Killed(), model=vit()).train()
"""


def test_a_run_that_kill_9_has_ended_resumes_to_the_same_masks_and_weights(tmp_path: Path) -> None:
    """In the second round, two steps behind its checkpoint, with dropout and images in random order."""
    run_until_killed(KILLED, tmp_path)
    second = RSSTCallback(steps_per_round=6, rounds=2, start_step=2)
    resumed = trainer(tmp_path, second, model=vit())
    resumed.train(resume_from_checkpoint=True)
    first = RSSTCallback(steps_per_round=6, rounds=2, start_step=2)
    whole = trainer(tmp_path / "whole", first, model=vit(), save_strategy="no")
    whole.train()
    assert second.rounds.round.start_step == 1
    assert first.rounds.report().gone("heads") == 2
    assert_equal_bits(resumed.model, whole.model)


def test_a_model_that_is_saved_under_other_names_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """The trainer alone would only warn of most of these weights, and go on with random ones."""
    check_resume(tmp_path, lambda: RSSTCallback(steps_per_round=6, rounds=2), 10, vit)
    names = torch.load(tmp_path / "run/checkpoint-9/torch_rsst.pt")["weights"].keys()
    assert "vit.layers.0.mlp.fc1.weight_orig" in names
    assert "classifier.weight" not in names


def test_the_logs_of_training_hold_the_rounds(tmp_path: Path) -> None:
    callback = RSSTCallback(steps_per_round=8, rounds=2)
    trained = trainer(tmp_path, callback, save_strategy="no")
    seen: list[dict[str, float]] = []

    class Tracker(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **parts: Any) -> None:
            seen.append(dict(logs))

    trained.callback_handler.callbacks.insert(1, Tracker())  # where report_to has them
    callback.log_through(trained)
    trained.train()
    logged = {row["step"]: row for row in trained.state.log_history if "loss" in row}
    assert [row["rsst/round"] for row in logged.values()] == [0, 0, 1, 1, 1]
    assert logged[8]["rsst/penalized_norm_ratio"] < logged[4]["rsst/penalized_norm_ratio"]
    assert logged[4]["rsst/strength"] > 0.0
    assert logged[20]["rsst/strength"] == 0.0
    assert logged[20]["rsst/neurons_gone"] == logged[20]["rsst/sparsity"] == 0.5
    assert [row["rsst/sparsity"] for row in seen if "loss" in row] == [
        row["rsst/sparsity"] for row in logged.values()
    ]


def test_a_callback_that_came_too_late_refuses_to_resume(tmp_path: Path) -> None:
    """The trainer itself would only warn, and train on with random weights."""
    with pytest.raises(RuntimeError, match="went down"):
        trainer(tmp_path, RSSTCallback(steps_per_round=8, rounds=2), GoesDown(8)).train()
    late = trainer(tmp_path)
    late.add_callback(RSSTCallback(steps_per_round=8, rounds=2))
    with pytest.raises(RuntimeError, match="expected the masks of its rounds to be loaded"):
        late.train(resume_from_checkpoint=True)


def test_a_checkpoint_that_was_moved_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="went down"):
        trainer(tmp_path / "a", RSSTCallback(steps_per_round=8, rounds=2), GoesDown(8)).train()
    shutil.move(tmp_path / "a" / "checkpoint-6", tmp_path / "kept")
    kept = str(tmp_path / "kept")
    with pytest.raises(FileNotFoundError, match="Pass resume_from= to the callback"):
        trainer(tmp_path / "b", RSSTCallback(steps_per_round=8, rounds=2)).train(
            resume_from_checkpoint=kept
        )
    callback = RSSTCallback(steps_per_round=8, rounds=2, resume_from=kept)
    trainer(tmp_path / "b", callback).train(resume_from_checkpoint=kept)
    assert callback.driver.finalized


def test_the_folder_serves_with_the_info_that_the_callback_was_given(tmp_path: Path) -> None:
    info = torch_rsst.CompactInfo(
        classes=tuple("abcdefghij"), input_size=(1, 8, 8), mean=(0.5,), std=(0.25,)
    )
    callback = RSSTCallback(steps_per_round=8, rounds=2, compact_to=tmp_path / "small", info=info)
    trainer(tmp_path, callback, save_strategy="no", model=vit()).train()
    assert torch_rsst.load_compact(tmp_path / "small").compact_info == info


def test_what_cannot_work_is_refused_before_training(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3}
    with pytest.raises(ValueError, match="load_best_model_at_end: expected False"):
        trainer(tmp_path, RSSTCallback(steps_per_round=8), **best).train()
    with pytest.raises(ValueError, match="expected one with this callback"):
        RSSTCallback(steps_per_round=8).log_through(trainer(tmp_path))
    with pytest.raises(ValueError, match="a round of 30 steps to fit into the training, got 20"):
        trainer(tmp_path, RSSTCallback(steps_per_round=30)).train()

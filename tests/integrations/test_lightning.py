"""The callbacks in real Lightning trainers: rounds by epochs and steps, logs, resuming, compaction."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import run_until_killed
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torch_rsst
from torch_rsst.masking.mask_sets import extract_mask

lightning = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402

from torch_rsst.integrations.lightning import RefillCallback, RSSTCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:lightning",
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:.*LeafSpec.*",
)


class Net(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """8 hidden neurons; fails at a step where it is told to."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
        self.fail_at = fail_at

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> Tensor:
        if self.global_step == self.fail_at:
            raise RuntimeError("the machine went down")
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def data() -> DataLoader[Any]:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :2]), batch_size=8)  # 4 batches


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Any:
    settings = {
        "max_epochs": 5,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "default_root_dir": folder,
    }
    return lightning.Trainer(callbacks=list(callbacks), **{**settings, **options})


def assert_equal_bits(model: nn.Module, other: nn.Module) -> None:
    one, two = model.state_dict(), other.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("length", [{"epochs_per_round": 2}, {"steps_per_round": 8}])
def test_rounds_in_epochs_or_steps_end_with_a_compacted_folder(
    tmp_path: Path, length: dict[str, int]
) -> None:
    callback = RSSTCallback(rounds=2, compact_to=tmp_path / "small", module="net", **length)
    model = Net()
    trainer(tmp_path, callback).fit(model, data())
    report = callback.rounds.report()
    assert callback.rounds.steps_per_round == 8
    assert report.gone("neurons") == 4
    assert callback.compacted[0].weight.shape == (4, 4)
    loaded = torch_rsst.load_compact(tmp_path / "small", model=Net().net)
    x = torch.randn(3, 4)
    torch.testing.assert_close(loaded(x), model.net(x))
    assert not model._load_state_dict_pre_hooks


def test_as_many_rounds_as_fit_are_taken_after_the_start(tmp_path: Path) -> None:
    callback = RSSTCallback(epochs_per_round=1.5, start_epoch=1)
    trainer(tmp_path, callback).fit(Net(), data())
    assert (callback.rounds.steps_per_round, callback.rounds.rounds) == (6, 2)
    assert callback.driver.finalized


@pytest.mark.parametrize(("accumulated", "steps"), [(1, 4), (2, 2), (3, 2)])
def test_an_epoch_is_counted_in_optimizer_steps(
    tmp_path: Path, accumulated: int, steps: int
) -> None:
    callback = RefillCallback(epochs_per_round=1, rounds=2, regroup_amount=0.5, fillback_rate=0.0)
    trainer(tmp_path, callback, accumulate_grad_batches=accumulated, max_epochs=2).fit(
        Net(), data()
    )
    assert callback.rounds.steps_per_round == steps
    assert callback.rounds.round.pruner.steps == steps
    assert callback.driver.finalized


def test_mixed_precision_counts_its_steps(tmp_path: Path) -> None:
    callback = RSSTCallback(steps_per_round=5, rounds=4)
    trainer(tmp_path, callback, precision="bf16-mixed").fit(Net(), data())
    assert callback.driver.finalized
    assert callback.rounds.report().gone("neurons") == 4


@pytest.mark.parametrize("kind", [RSSTCallback, RefillCallback])
@pytest.mark.parametrize("fail_at", [7, 14, 18])
def test_a_run_that_is_killed_resumes_to_the_same_bits(
    tmp_path: Path, kind: Any, fail_at: int
) -> None:
    """A checkpoint at every epoch; rounds of 6 steps, so that most of them are in the middle of one."""

    def callback() -> Any:
        return kind(steps_per_round=6, rounds=2, start_step=2, regroup_amount=0.5)

    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_epochs=1)

    whole, model = callback(), Net()
    trainer(tmp_path / "whole", whole).fit(model, data())
    with pytest.raises(RuntimeError, match="went down"):
        trainer(tmp_path, callback(), saver()).fit(Net(fail_at), data())
    stored = max(tmp_path.glob("*.ckpt"), key=lambda p: p.stat().st_mtime, default=None)
    resumed, again = callback(), Net()
    trainer(tmp_path, resumed).fit(again, data(), ckpt_path=stored)
    assert_equal_bits(again, model)
    assert resumed.rounds.report().to_dict() == whole.rounds.report().to_dict()
    assert resumed.driver.finalized


KILLED = """
import os, signal, sys
from pathlib import Path
from test_lightning import ModelCheckpoint, Net, RSSTCallback, data, trainer

class Killed(Net):
    def training_step(self, batch, index):
        if self.global_step == 14:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, index)

folder = Path(sys.argv[1])
saver = ModelCheckpoint(folder, save_last=True)
trainer(folder, RSSTCallback(steps_per_round=6, rounds=2, start_step=2), saver).fit(Killed(), data())
"""


def test_a_run_that_kill_9_has_ended_resumes_to_the_same_masks_and_weights(tmp_path: Path) -> None:
    """In the second round, two steps behind its checkpoint; the rest is trained by another process."""
    run_until_killed(KILLED, tmp_path)
    resumed, again = RSSTCallback(steps_per_round=6, rounds=2, start_step=2), Net()
    trainer(tmp_path, resumed).fit(again, data(), ckpt_path=tmp_path / "last.ckpt")
    whole, model = RSSTCallback(steps_per_round=6, rounds=2, start_step=2), Net()
    trainer(tmp_path / "whole", whole).fit(model, data())
    assert resumed.rounds.round.start_step == 4
    assert whole.rounds.report().gone("neurons") == 4
    assert_equal_bits(again, model)


def test_a_failed_run_leaves_no_hooks_and_can_be_tried_again(tmp_path: Path) -> None:
    model, saver = Net(fail_at=6), ModelCheckpoint(tmp_path, save_last=True)
    with pytest.raises(RuntimeError, match="went down"):
        trainer(tmp_path, RSSTCallback(steps_per_round=10, rounds=2), saver).fit(model, data())
    assert not model._load_state_dict_pre_hooks
    model.fail_at = None
    callback = RSSTCallback(steps_per_round=10, rounds=2)
    trainer(tmp_path, callback).fit(model, data(), ckpt_path=tmp_path / "last.ckpt")
    whole = Net()
    trainer(tmp_path, RSSTCallback(steps_per_round=10, rounds=2)).fit(whole, data())
    assert_equal_bits(model, whole)


@pytest.mark.filterwarnings("ignore:The training ends after:torch_rsst.RoundWarning")
def test_a_training_that_ends_too_soon_finalizes_nothing_and_says_so(tmp_path: Path) -> None:
    callback = RSSTCallback(steps_per_round=8, rounds=2, compact_to=tmp_path / "small")
    saver = ModelCheckpoint(tmp_path, save_last=True)
    with pytest.warns(torch_rsst.RoundWarning, match=r"within round 1 of 2 rounds: nothing was"):
        trainer(tmp_path, callback, saver, max_epochs=3).fit(Net(), data())
    assert not (tmp_path / "small").exists()
    model, whole = Net(), Net()
    trainer(tmp_path, RSSTCallback(steps_per_round=8, rounds=2)).fit(
        model, data(), ckpt_path=tmp_path / "last.ckpt"
    )
    trainer(tmp_path, RSSTCallback(steps_per_round=8, rounds=2)).fit(whole, data())
    assert_equal_bits(model, whole)


def test_rounds_that_do_not_fit_are_told_before_training(tmp_path: Path) -> None:
    callback = RSSTCallback(steps_per_round=8, rounds=3)
    with pytest.warns(torch_rsst.RoundWarning) as told:
        trainer(tmp_path, callback).fit(Net(), data())
    ours = [str(w.message) for w in told if issubclass(w.category, torch_rsst.RoundWarning)]
    assert "before the last of 3 rounds of 8 that begin at step 0" in ours[0]
    assert "within round 2 of 3 rounds" in ours[1]


def test_the_loggers_get_strength_norms_and_what_is_gone(tmp_path: Path) -> None:
    callback = RSSTCallback(steps_per_round=8, rounds=2)
    loggers = CSVLogger(tmp_path)
    trainer(tmp_path, callback, logger=loggers, log_every_n_steps=4).fit(Net(), data())
    with open(Path(loggers.log_dir) / "metrics.csv", encoding="utf-8") as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file)}
    assert list(rows) == [4, 8, 12, 16, 20]
    assert float(rows[4]["rsst/strength"]) > 0.0
    assert float(rows[8]["rsst/penalized_norm_ratio"]) < float(rows[4]["rsst/penalized_norm_ratio"])
    assert [float(row["rsst/round"]) for row in rows.values()] == [0, 0, 1, 1, 1]
    assert float(rows[20]["rsst/neurons_gone"]) == float(rows[20]["rsst/sparsity"]) == 0.5
    assert float(rows[20]["rsst/strength"]) == 0.0


def test_units_are_scored_on_batches_and_consumers_refitted(tmp_path: Path) -> None:
    batches = list(data())
    callback = RSSTCallback(
        steps_per_round=8, rounds=2, batches=batches, reconstruct="least_squares"
    )
    trainer(tmp_path, callback).fit(Net(), data())
    assert str(callback.rounds.regrouping.importance) == "OBS(damping=0.001)"
    assert callback.rounds.course.reconstruct == "least_squares"
    assert callback.rounds.report().gone("neurons") == 4


def test_a_pruned_checkpoint_is_tested_with_its_masks(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True)
    model = Net()
    trainer(tmp_path, RSSTCallback(steps_per_round=8, rounds=2), saver).fit(model, data())

    class Tested(Net):
        def test_step(self, batch: Any, index: int) -> None:
            self.log("loss", self.training_step(batch, index))

    fresh = Tested()
    trainer(tmp_path, RSSTCallback(steps_per_round=8)).test(
        fresh, data(), ckpt_path=tmp_path / "last.ckpt", verbose=False
    )
    assert extract_mask(fresh).keys() == extract_mask(model).keys()
    assert_equal_bits(fresh, model)


def test_other_callbacks_and_settings_are_refused(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, RSSTCallback(steps_per_round=8, rounds=2), saver).fit(Net(), data())
    checkpoint = tmp_path / "last.ckpt"
    with pytest.raises(ValueError, match="expected the state of this callback for its masked"):
        trainer(tmp_path, RefillCallback(steps_per_round=8), max_epochs=9).fit(
            Net(), data(), ckpt_path=checkpoint
        )
    with pytest.raises(ValueError, match=r"amount=0\.3, got amount=0\.2"):
        trainer(tmp_path, RSSTCallback(steps_per_round=8, amount=0.3), max_epochs=9).fit(
            Net(), data(), ckpt_path=checkpoint
        )
    with pytest.raises(TypeError, match=r"got 'regroup_amont'. Did you mean 'regroup_amount'"):
        RSSTCallback(steps_per_round=8, regroup_amont=0.5)
    with pytest.raises(ValueError, match="in epochs or in steps, got neither"):
        RSSTCallback()
    with pytest.raises(TypeError, match=r"module: expected a dotted name, got None"):
        RSSTCallback(steps_per_round=8, module=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"module: expected a part of Net, got 'model'.*'net'"):
        trainer(tmp_path, RSSTCallback(steps_per_round=8, module="model")).fit(Net(), data())


def test_the_callback_works_in_the_trainer_of_the_older_package(tmp_path: Path) -> None:
    older = pytest.importorskip("pytorch_lightning")

    class Older(older.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = Net().net

        training_step = Net.training_step
        configure_optimizers = Net.configure_optimizers
        forward = Net.forward
        fail_at = None

    callback = RSSTCallback(epochs_per_round=1, rounds=2)
    older.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    ).fit(Older(), data())
    assert callback.rounds.report().gone("neurons") == 4

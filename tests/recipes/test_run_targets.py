"""Runs with a target, and what is told of a run before it begins."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
from runs import TINY, exit_code, interrupted, same, settings_restored
from torch import nn

import torch_rsst

pytestmark = pytest.mark.needs_timm

QUICK = [
    "--dense-epochs", 1, "--epochs", 1, "--rounds", 1, "--finetune-epochs", 0, "--batch-size", 256,
    "--device", "cpu",
]  # fmt: skip


@pytest.fixture(autouse=True)
def restored():
    with settings_restored():
        yield


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def said(capsys):
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("option", "cost", "words", "more"),
    [
        ("--target-parameters", "parameters", "55.0% of the parameters", ["--method", "refill"]),
        ("--target-macs", "multiply_adds", "55.0% of the multiply-adds", ["--scope", "type"]),
    ],
)
def test_a_target_is_met_by_the_compacted_model(option, cost, words, more, tmp_path, capsys):
    folder = tmp_path / "run"
    assert exit_code("run", "--output", folder, *QUICK, *more, option, 0.55) == 0
    plan = report_of(folder)["plan"]
    assert re.search(rf"Target: {words} of the dense model; planned: 5\d\.\d%", said(capsys))
    assert exit_code("compact", folder) == 0
    receipt = json.loads((folder / "compact" / "compact.json").read_text())["receipt"][cost]
    assert receipt["after"] <= 0.55 * receipt["before"]
    if cost == "parameters":  # in each layer the same number goes, whatever the scores
        assert receipt == plan[cost]
    capsys.readouterr()
    assert exit_code("report", folder) == 0
    assert f"Target: {words}" in said(capsys)
    for file in ("report.html", "compact/README.md"):
        assert f"Target: {words}" in (folder / file).read_text()


def test_a_target_of_latency_is_measured_and_kept(tmp_path, monkeypatch, capsys):
    """What was measured before a stop decides after it, too."""
    from torch_rsst.recipes import run_rounds as pruning
    from torch_rsst.recipes import training_text

    plans = []

    def plan(*args, budget, **options):
        assert budget == {"latency": 0.7}
        assert options["example_inputs"].shape == (256, 1, 8, 8)
        plans.append(genuine(*args, budget={"params": 0.6 - 0.1 * len(plans)}, **options))
        return plans[-1]

    genuine = pruning.torch_rsst.plan
    monkeypatch.setattr(pruning.torch_rsst, "plan", plan)
    # The sentence would need measured times.
    monkeypatch.setattr(training_text, "_COSTS", {"params": "parameters"})
    args = ["--output", tmp_path / "run", *QUICK, "--rounds", 2, "--target-latency", 0.7]
    assert interrupted(args, 10, monkeypatch) == 130  # in the first round
    assert len(plans) == 2  # before the dense stage, and after it
    with settings_restored():
        assert exit_code("run", "--resume", "--output", tmp_path / "run") == 0
    assert len(plans) == 2
    assert report_of(tmp_path / "run")["plan"]["amount"] == plans[1].amount
    plans.clear()
    with settings_restored():
        args[1] = tmp_path / "whole"
        assert exit_code("run", *args) == 0
    assert same(tmp_path / "run", tmp_path / "whole")


def test_a_target_out_of_reach_ends_the_run_before_its_training(tmp_path, capsys):
    args = ["--output", tmp_path / "run", *QUICK, "--target-macs", 0.01]
    assert exit_code("run", *args) == 2
    error = capsys.readouterr().err
    assert "budget['macs']: expected at least 0.0953" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--target-macs", 0.5, "--target-latency", 0.5], "got target_macs and target_latency. Pass"),
        (["--target-macs", 0], "target_macs: expected a number > 0, got 0"),
        (["--target-parameters", 50], "expected a share of the dense model, at most 1, got 50.0. Pass"),
        (["--target-macs", 0.5, "--method", "refill", "--fillback-rate", 0.1],
         "fillback_rate: expected 0, so that the target is met, got 0.1, beside --target-macs. Leave"),
    ],
)  # fmt: skip
def test_mistakes_about_targets_are_told(args, words, tmp_path, capsys):
    assert exit_code("run", "--output", tmp_path / "run", *args, "--dry-run") == 2
    assert words in capsys.readouterr().err


def test_a_dry_run_tells_of_target_teacher_and_reconstruction(tmp_path, capsys):
    args = ["--distill", 0.25, "--reconstruct", "mean", "--target-parameters", 0.4]
    idle = ["--regroup-amount", 0.75]
    assert exit_code("run", "--output", tmp_path / "run", *args, *idle, "--dry-run") == 0
    out = said(capsys)
    assert "what the dense model predicts has the weight 0.25 in the loss, at temperature 2." in out
    assert "consume them are refitted on 8 batches of training images (mean)." in out
    assert re.search(
        r"Target: 40\.0% of the parameters of the dense model; planned: (39|40)\.\d%", out
    )
    assert "Note: --regroup-amount has no effect with a target." in out
    small = int(re.search(r"parameters │ 114,778 │ ([\d,]+)", out)[1].replace(",", ""))
    assert small <= 0.4 * 114_778
    capsys.readouterr()
    plain = ["--distill", 0, "--reconstruct", "none", "--dry-run"]
    assert exit_code("run", "--output", tmp_path / "run", *plain) == 0
    assert not re.search("Target|istilled|econstructed|Warning", said(capsys))


class Attention(nn.Module):
    """A model of 4 layers of 3 heads."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.MultiheadAttention(12, 3, batch_first=True) for _ in range(4)
        )


LAYER = {"scope": "layer"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, None),
        (LAYER, r"8 of 12 heads will go \(67%\), where 50% was asked .*--scope type counts .*: 6 would go"),
        ({**LAYER, "regroup_amount": 0.3}, None),  # 1 of 3
        ({**LAYER, "regroup_amount": 0.1}, r"0 of 12 heads will go \(0%\), where 10% .* layers: 1 would go"),
        ({"regroup_amount": 0.9}, r"8 of 12 heads will go \(67%\), where 90% .* Pass another"),
        ({**LAYER, "regroup_amount": 0.0}, None),
        ({**LAYER, "target_macs": 0.5}, None),
        ({"round_to": 3}, r"0 of 12 heads will go .*Pass another --regroup-amount\."),
        ({**LAYER, "method": "refill", "fillback_rate": 0.5}, r"4 of 12 heads will go \(33%\), where 25%"),
    ],
)  # fmt: skip
def test_a_rounding_that_changes_much_is_told_with_the_alternative(options, words):
    from torch_rsst.recipes.advice import warn_of_rounding
    from torch_rsst.recipes.config import RunConfig

    torch.manual_seed(0)
    model = Attention()
    groups = torch_rsst.find_groups(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_rounding(RunConfig(**options), model, groups)
    assert len(caught) == (words is not None)
    if words is not None:
        assert re.search(words, str(caught[0].message))


def test_half_of_three_heads_is_told_before_it_happens(tmp_path, capsys):
    args = ["--output", tmp_path / "run", *TINY, "--batch-size", 64, "--regroup-amount", 0.3]
    with warnings.catch_warnings():
        warnings.simplefilter("always", torch_rsst.RSSTWarning)
        assert exit_code("run", *args, "--dry-run", "--scope", "layer") == 0
    out = said(capsys)
    assert "Warning: 6 of 12 heads will go (50%), where 30% was asked for" in out
    assert "--scope type counts over all layers: 4 would go." in out
    with warnings.catch_warnings():
        warnings.simplefilter("always", torch_rsst.RSSTWarning)
        assert exit_code("run", *args, "--dry-run") == 0
    assert "will go" not in said(capsys)

"""A criterion, a schedule and a family of a file of one's own: accepted wherever a shipped one is."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import registry_tables
import torch

import torch_rsst
from torch_rsst import discovery
from torch_rsst.importance import IMPORTANCES, importance_names
from torch_rsst.schedules import SCHEDULES, name_of, resolve_schedule

# What a user writes, in one file: each of the three is registered by one line.
SOURCE = '''
from dataclasses import dataclass

import torch
from torch import nn

from torch_rsst import GroupLayer
from torch_rsst.discovery import Adapter, columns, register, rows
from torch_rsst.importance import IMPORTANCES, DataImportance
from torch_rsst.schedules import SCHEDULES


@dataclass(frozen=True)
class Steepness(DataImportance):
    """The mean of |∂L/∂a|, where a is the output of a unit."""

    needs_gradient = True

    def entries(self, activation, gradient):
        return gradient.abs()


@dataclass(frozen=True)
class SecondHalf:
    """λ(t) = strength · max(0, 2 · t − 1): 0 in the first half."""

    strength: float = 0.5

    def __call__(self, t):
        return self.strength * max(0.0, 2.0 * t - 1.0)


class ThreeTimes(nn.Module):
    """An MLP with three first layers, which no family of the package knows."""

    def __init__(self, width, hidden):
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(width, hidden) for _ in range(3))
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        return self.down(self.one(x) * self.two(x) * self.three(x))


class ThreeTimesMLP(Adapter):
    kind = "neurons"

    def find(self, module):
        if not isinstance(module, ThreeTimes):
            return None
        unit = torch.arange(module.down.in_features)
        first = [row for name in ("one", "two", "three") for row in rows(name, module.get_submodule(name), unit)]
        return GroupLayer("", self.kind, len(unit), (*first, columns("down", unit)))


IMPORTANCES["steepness"] = Steepness()
SCHEDULES["second_half"] = SecondHalf
register(ThreeTimesMLP())
'''  # noqa: RUF001 - as in formulas
TIMM_MODEL = """
from timm.models import register_model


@register_model
def three_times_net(pretrained=False, num_classes=10, in_chans=1, **options):
    body = [nn.Flatten(), ThreeTimes(64 * in_chans, 16), nn.Linear(64 * in_chans, num_classes)]
    return nn.Sequential(*body)
"""


def imported(source: str, folder: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    (folder / "own_units.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "own_units", raising=False)
    return importlib.import_module("own_units")


@pytest.fixture(autouse=True)
def unregistered() -> Iterator[None]:
    yield
    IMPORTANCES.pop("steepness", None)
    SCHEDULES.pop("second_half", None)
    # One by one: families of other packages may have been registered in the meantime.
    discovery.ADAPTERS[:] = [a for a in discovery.ADAPTERS if type(a).__module__ != "own_units"]
    sys.modules.pop("own_units", None)


def test_the_library_takes_what_is_registered(tmp_path, monkeypatch):
    own = imported(SOURCE, tmp_path, monkeypatch)
    layers = (own.ThreeTimes(3, 6), torch.nn.Softmax(dim=-1), torch.nn.Linear(3, 2))
    model = torch.nn.Sequential(*layers)
    groups = torch_rsst.find_groups(model, "neurons")
    assert [(layer.family, layer.units) for layer in groups.layers] == [("ThreeTimesMLP", 6)]
    data = {"batches": [torch.randn(5, 3)], "loss_fn": lambda output, batch: output.square().sum()}
    refill = torch_rsst.regroup(model, groups, amount=0.5, importance="steepness", **data)
    assert refill["0.one.weight"].any(1).sum() == 3
    optimizer = torch.optim.AdamW(model.parameters())
    rsst = torch_rsst.RSST(
        model, groups, optimizer=optimizer, rounds=1, steps_per_round=4, importance="steepness",
        schedule="second_half", strength=0.5, **data,
    )  # fmt: skip
    for rnd in rsst:
        strengths = []
        for _ in range(4):
            strengths.append(rnd.pruner.strength)
            model(torch.randn(5, 3)).square().sum().backward()
            optimizer.step()
        assert strengths == [resolve_schedule("second_half")(t) for t in (0.25, 0.5, 0.75, 1.0)]
    rsst.finalize(force=True)  # a schedule by strength leaves much after four steps
    small = torch_rsst.compact(model, groups)
    assert small[0].down.in_features == 3
    discovery.ADAPTERS.remove(discovery.family("ThreeTimesMLP"))
    rest = torch_rsst.find_groups(model, on_unsupported="ignore").layers
    assert "ThreeTimesMLP" not in [layer.family for layer in rest]


def test_messages_and_tables_name_what_is_registered(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="importance: expected one of") as before:
        torch_rsst.importance.resolve_importance("steepnes")
    assert "'steepness'" not in str(before.value)
    own = imported(SOURCE, tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="Did you mean 'steepness'"):
        torch_rsst.importance.resolve_importance("steepnes")
    with pytest.raises(ValueError, match="Did you mean 'second_half'"):
        resolve_schedule("second_halb")
    with pytest.raises(KeyError, match="'ThreeTimesMLP'"):
        discovery.family("ThreeTimesML")
    assert name_of(own.SecondHalf(0.3)) == "second_half"
    row = "| `steepness` |  | The mean of \\|∂L/∂a\\|, where a is the output of a unit. | `batches`, `loss_fn` |"
    assert row in registry_tables.importances().splitlines()
    row = "| `second_half` |  | s · max(0, 2 · t − 1) | 0.000 | 0.000 | 0.500 | 1.000 |"  # noqa: RUF001
    assert row in registry_tables.schedules().splitlines()


@pytest.mark.needs_timm
def test_the_command_line_takes_what_is_registered(tmp_path, monkeypatch, capsys):
    from runs import exit_code, settings_restored

    imported(SOURCE + TIMM_MODEL, tmp_path, monkeypatch)
    assert exit_code("run", "--help") == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"(one of: {', '.join(importance_names())}; default" in shown
    assert f"(one of: {', '.join(SCHEDULES)}; default" in shown
    assert "steepness" in shown
    assert "second_half" in shown
    options = [
        "--importance", "steepness", "--importance-batches", 1, "--schedule", "second_half",
        "--model", "three_times_net", "--image-size", 8, "--output", tmp_path / "run", "--device", "cpu",
        "--dense-epochs", 1, "--epochs", 1, "--rounds", 1, "--finetune-epochs", 0, "--batch-size", 256,
    ]  # fmt: skip
    with settings_restored():
        assert exit_code("run", *options) == 0, capsys.readouterr().err
    out = " ".join(capsys.readouterr().out.split())
    assert "80 neurons in 2 layers" in out
    assert "neuron sparsity │ 50.0%" in out
    written = (tmp_path / "run" / "config.yaml").read_text()
    assert "importance: steepness\n" in written
    assert "schedule: second_half\n" in written
    assert exit_code("run", "--importance", "steepnes") == 2
    assert "Did you mean 'steepness'?" in capsys.readouterr().err

"""The pattern for loops with accelerate that docs/integrations.md shows, stopped and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torch_rsst

accelerate = pytest.importorskip("accelerate")

ACCUMULATED = 2


class PowerCutError(Exception):
    pass


def train(folder: Path, *, down_at: int | None = None) -> nn.Module:
    """Two rounds of 3 steps of 2 batches; a checkpoint after every second step."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    x = torch.randn(48, 4)
    data = DataLoader(TensorDataset(x, x[:, :2]), batch_size=8)  # 6 batches

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
    optimizer: Any = torch.optim.AdamW(net.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(net, optimizer, data)
    groups, steps = torch_rsst.find_groups(model), len(loader) // ACCUMULATED
    rsst = torch_rsst.RSST(model, groups, optimizer=optimizer, rounds=2, steps_per_round=steps)
    accelerator.register_for_checkpointing(rsst)
    if folder.exists():
        rsst.load_state_dict(torch.load(folder / "custom_checkpoint_0.pkl"))  # masks come first
        accelerator.load_state(folder)
    for rnd in rsst:
        skipped = rnd.start_step * ACCUMULATED
        for inputs, targets in accelerator.skip_first_batches(loader, skipped):
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.mse_loss(model(inputs), targets))
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients and rnd.pruner.steps == 2:
                accelerator.save_state(folder)
                if down_at == rnd.index:
                    raise PowerCutError
    rsst.finalize()
    return net


@pytest.mark.parametrize("down_at", [0, 1])
def test_the_loop_resumes_in_the_middle_of_a_round_to_the_same_bits(
    tmp_path: Path, down_at: int
) -> None:
    whole = train(tmp_path / "whole")
    with pytest.raises(PowerCutError):
        train(tmp_path / "run", down_at=down_at)
    resumed = train(tmp_path / "run")
    one, two = whole.state_dict(), resumed.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    report = torch_rsst.sparsity_report(resumed, torch_rsst.find_groups(resumed))
    assert report.gone("neurons") == 4

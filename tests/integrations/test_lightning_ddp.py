"""Two ranks under Lightning's DDP: the same masks on both, and the folder written once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytest.importorskip("lightning.pytorch")

SCRIPT = """
import sys, torch
from pathlib import Path
sys.path[:0] = [{here!r}, {helpers!r}]
from test_lightning import Net, RSSTCallback, data, lightning, trainer
from torch_rsst.masking.mask_sets import extract_mask

folder = sys.argv[1]
callback = RSSTCallback(epochs_per_round=2, rounds=2, compact_to=folder + "/small", module="net")
model = Net()
run = trainer(folder, callback, strategy="ddp", devices=2)
run.fit(model, data())
assert callback.rounds.steps_per_round == 4, callback.rounds.steps_per_round
assert callback.driver.finalized
assert (callback.compacted is not None) == run.is_global_zero
masks = torch.cat([mask.flatten() for mask in extract_mask(model).values()]).float()
summed = masks.clone()
torch.distributed.all_reduce(summed)
assert torch.equal(summed, 2 * masks)
Path(folder, f"rank_{{run.global_rank}}_is_done").touch()
# Lightning leaves a gloo group open, and its threads sometimes abort the interpreter's exit.
torch.distributed.destroy_process_group()
"""


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_two_ranks_prune_the_same_units(tmp_path: Path) -> None:
    script = tmp_path / "ddp.py"
    here = Path(__file__).parent
    text = SCRIPT.format(here=str(here), helpers=str(here.parent / "helpers"))
    script.write_text(text, encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert {path.name for path in tmp_path.glob("rank_*")} == {"rank_0_is_done", "rank_1_is_done"}
    assert (tmp_path / "small" / "compact.json").is_file()

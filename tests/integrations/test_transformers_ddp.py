"""Two ranks under Hugging Face's Trainer with DDP: the same masks and weights on both, the folder written once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.needs_timm  # the Trainer imports torchvision where it is installed

SCRIPT = """
import sys, torch
from pathlib import Path
sys.path[:0] = [{here!r}, {helpers!r}]
from test_transformers_trainer import RSSTCallback, trainer, vit

folder = Path(sys.argv[1])
callback = RSSTCallback(epochs_per_round=2, rounds=2, compact_to=folder / "small")
run = trainer(
    folder, callback, model=vit(), max_steps=12, save_strategy="no", ddp_backend="gloo"
)
assert run.args.world_size == 2
run.train()
assert isinstance(run.model_wrapped, torch.nn.parallel.DistributedDataParallel)
assert callback.rounds.steps_per_round == 4, callback.rounds.steps_per_round
assert callback.driver.finalized
assert (callback.compacted is not None) == run.is_world_process_zero()
torch.save(run.model.state_dict(), folder / f"rank_{{run.args.process_index}}.pt")
"""


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_two_ranks_prune_the_same_units_and_end_with_the_same_weights(tmp_path: Path) -> None:
    script, here = tmp_path / "ddp.py", Path(__file__).parent
    text = SCRIPT.format(here=str(here), helpers=str(here.parent / "helpers"))
    script.write_text(text, encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run(
        [sys.executable, *launch, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"rank_{rank}.pt") for rank in (0, 1))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    masks = {name: mask for name, mask in one.items() if name.endswith("_mask")}
    assert masks
    assert not all(mask.all() for mask in masks.values())
    assert (tmp_path / "small" / "compact.json").is_file()

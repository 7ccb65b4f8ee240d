"""The dense model as a teacher: in a file beside the checkpoint, which a resumed run reads again."""

from __future__ import annotations

from safetensors.torch import load_file

from torch_rsst.recipes.run_folder import RunFolder
from torch_rsst.recipes.training import Trainer
from torch_rsst.saving.builders import build_model


def write_teacher(folder: RunFolder, trainer: Trainer) -> None:
    """Make the model as it is now the teacher of a run. A collective call."""
    if trainer.accelerator.is_main_process:
        folder.write_tensors(folder.teacher, trainer.outcome)
    trainer.accelerator.wait_for_everyone()
    read_teacher(folder, trainer)


def read_teacher(folder: RunFolder, trainer: Trainer) -> None:
    """Give a run its teacher."""
    teacher = build_model(trainer.build)
    teacher.load_state_dict(load_file(folder.teacher))
    trainer.teacher = teacher.eval().requires_grad_(False).to(trainer.accelerator.device)

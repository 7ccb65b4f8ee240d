"""The options for the model and its training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch_rsst.utils.amounts import check_count, check_fraction, check_number
from torch_rsst.utils.errors import refuse

_LARGEST_SEED = 2**31 - 1  # seeds of steps are calculated from it


@dataclass(frozen=True)
class TrainingOptions:
    """Model and training."""

    model: str = "auto"
    """A model of timm by name. auto: vit_digits, a small one for the digits."""
    pretrained: bool = False
    """Start from timm's pretrained weights, which are downloaded."""
    drop_path: float = 0.0
    """Rate of stochastic depth, for models that have it."""
    dense_epochs: int = 40
    """Epochs before the first round."""
    epochs: int = 12
    """Epochs of each round."""
    finetune_epochs: int = 10
    """Epochs after the cut."""
    batch_size: int = 32
    """Images of a batch, over all processes."""
    accumulation: int = 1
    """Batches whose gradients are accumulated for one step."""
    optimizer: str = "adamw"
    """An optimizer of timm by name: adamw, sgd, lamb, lion, …"""
    learning_rate: float = 3e-3
    """Peak learning rate of the dense stage; rounds and fine-tuning use a share of it."""
    round_learning_rate: float = 0.7
    """Peak learning rate of the rounds, as a share of that of the dense stage."""
    finetune_learning_rate: float = 0.15
    """Peak learning rate of fine-tuning, as a share of that of the dense stage."""
    weight_decay: float = 0.05
    """Weight decay; biases and norms have none."""
    momentum: float = 0.9
    """Momentum, for optimizers that have one."""
    lr_schedule: Literal["cosine", "tanh", "poly", "step", "multistep", "none"] = "cosine"
    """Learning-rate schedule of each stage; none: constant."""
    warmup_epochs: float = 1.0
    """Epochs of warmup in the dense stage, at most half of its epochs."""
    distill: float = 0.5
    """Weight in the loss of what the dense model predicts, from 0 to 1, in rounds and fine-tuning; 0: off."""
    distill_temperature: float = 2.0
    """Temperature of these predictions; higher ones say more about unlikely classes."""
    clip_grad: float | None = None
    """Clip the norm of the gradients at this."""
    ema: float = 0.0
    """Decay of a moving average of the weights, which is then evaluated and saved; 0: off."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of the computation; fp16 scales the loss and needs a GPU."""
    compile: bool = False
    """Train through torch.compile."""
    deterministic: bool = False
    """Use deterministic algorithms only."""
    seed: int = 0
    """Seed of weights, data order and augmentation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; auto: a GPU if there is one."""

    def check(self) -> None:
        """Raise unless every option is in its range; whether the model exists is checked later."""
        for name, least in (("dense_epochs", 0), ("epochs", 1), ("finetune_epochs", 0)):
            check_count(getattr(self, name), name, at_least=least)
        check_count(self.batch_size, "batch_size", at_least=1)
        check_count(self.accumulation, "accumulation", at_least=1)
        check_count(self.seed, "seed", at_least=0)
        if self.seed > _LARGEST_SEED:
            refuse(ValueError, "seed", f"at most {_LARGEST_SEED}", self.seed, "Pass a smaller one.")
        for name in ("learning_rate", "round_learning_rate", "finetune_learning_rate"):
            check_number(getattr(self, name), name, above=0.0)
        for name in ("weight_decay", "warmup_epochs"):
            check_number(getattr(self, name), name, above=0.0, or_equal=True)
        if self.clip_grad is not None:
            check_number(self.clip_grad, "clip_grad", above=0.0)
        check_number(self.distill_temperature, "distill_temperature", above=0.0)
        for name in ("distill", "drop_path", "momentum", "ema"):
            check_fraction(getattr(self, name), name)
        if self.ema == 1.0:
            expected, remedy = "less than 1", "1 would keep the first weights: try 0.999."
            refuse(ValueError, "ema", expected, self.ema, remedy)

"""timm's train.py in short, on scikit-learn's digits, with the lines that prune: those under "# torch_rsst".

Run it: ``python examples/timm_script.py [folder] [epochs]``. Interrupted, it goes on after the last epoch that was
saved.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import create_loader
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler
from torch.utils.data import Dataset

import torch_rsst

NAME = "vit_tiny_patch16_224"
SHAPE = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10}
SHAPE |= {"embed_dim": 64, "depth": 2, "num_heads": 4}


class Digits(Dataset):
    transform = None  # set by create_loader

    def __init__(self, split: slice) -> None:
        digits = load_digits()
        self.images = (digits.images[split] * 15.9).astype(np.uint8)
        self.labels = digits.target[split]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def loader(split: slice, *, train: bool):
    return create_loader(
        Digits(split),
        input_size=(1, 8, 8),
        batch_size=50,
        is_training=train,
        no_aug=True,
        use_prefetcher=False,
        num_workers=0,
        mean=(0.5,),
        std=(0.5,),
        crop_pct=1.0,
        pin_memory=False,
        persistent_workers=False,
    )


def main(folder: Path, epochs: int = 24) -> float:
    folder.mkdir(parents=True, exist_ok=True)
    last = folder / "last.pth.tar"
    torch.manual_seed(0)
    model = timm.create_model(NAME, **SHAPE)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.05)
    loss_scaler = NativeScaler(device="cpu")
    start_epoch = 0
    if resume := last.exists():
        # torch_rsst: masks come before masked weights
        saved = torch.load(last, map_location="cpu", weights_only=True)
        torch_rsst.prepare_from_state_dict(model, saved["state_dict"])
        start_epoch = resume_checkpoint(model, str(last), optimizer, loss_scaler, log_info=False)
    model_ema = ModelEmaV3(model, decay=0.95)
    if resume:
        load_checkpoint(model_ema.module, str(last), use_ema=True)
    train, test = loader(slice(1400), train=True), loader(slice(1400, None), train=False)
    lr_scheduler, num_epochs = create_scheduler_v2(
        optimizer, num_epochs=epochs, warmup_epochs=1, warmup_lr=1e-4, updates_per_epoch=len(train)
    )
    if start_epoch:
        lr_scheduler.step(start_epoch)
    saver = CheckpointSaver(
        model, optimizer, model_ema=model_ema, amp_scaler=loss_scaler, checkpoint_dir=str(folder)
    )
    loss_fn = torch.nn.CrossEntropyLoss()

    # torch_rsst: two rounds of a quarter of the training, the first and the last quarter without
    length, groups = epochs // 4, torch_rsst.find_groups(model)
    rsst = torch_rsst.RSST(
        model,
        groups,
        optimizer=optimizer,
        rounds=2,
        steps_per_round=length * len(train),
        follow=[model_ema],
    )
    if resume:
        rsst.load_state_dict(torch.load(folder / f"rsst-{start_epoch - 1}.pt"))
        if rsst.round is not None:
            next(rsst)  # the round that was open
    for epoch in range(start_epoch, num_epochs):
        # torch_rsst
        if epoch in (length, 2 * length):
            next(rsst)
        model.train()
        torch.manual_seed(epoch)  # the order of images
        for images, labels in train:
            loss = loss_fn(model(images), labels)
            optimizer.zero_grad()
            loss_scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
            model_ema.update(model)
        lr_scheduler.step(epoch + 1)
        # torch_rsst
        torch.save(rsst.state_dict(), folder / f"rsst-{epoch}.pt")
        saver.save_checkpoint(epoch)
    # torch_rsst
    rsst.finalize()

    print(rsst.report())
    small = torch_rsst.compact(model_ema.module, groups, example_inputs=torch.randn(2, 1, 8, 8))
    build = {"name": "timm.create_model", "args": [NAME], "kwargs": SHAPE}
    torch_rsst.save_compact(small, folder / "small", build=build)
    small = torch_rsst.load_compact(folder / "small").eval()
    with torch.no_grad():
        right = sum(int((small(x).argmax(1) == y).sum()) for x, y in test)
    print(f"{right / 397:.1%} of 397 images")
    return right / 397


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/timm"), *map(int, sys.argv[2:]))

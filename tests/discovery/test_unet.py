"""A diffusion U-Net, written as people write it: GroupNorm, a time embedding, skips that are concatenated."""

from __future__ import annotations

import torch
from contract import assert_contract
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

import torch_rsst


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(embedding, outputs)
        self.norm2 = nn.GroupNorm(8, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(y)))


class UNet(nn.Module):
    def __init__(self, widths: tuple[int, ...] = (16, 32, 64), embedding: int = 16) -> None:
        super().__init__()
        self.time = nn.Sequential(
            nn.Linear(8, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        inputs = [widths[0], *widths[:-1]]
        sizes = zip(inputs, widths, strict=True)
        self.down = nn.ModuleList(ResidualBlock(a, b, embedding) for a, b in sizes)
        self.halve = nn.ModuleList(nn.Conv2d(w, w, 3, 2, 1) for w in widths[:-1])
        self.middle = ResidualBlock(widths[-1], widths[-1], embedding)
        below = [widths[-1], *widths[:0:-1]]
        sizes = zip(below, reversed(widths), strict=True)
        self.up = nn.ModuleList(ResidualBlock(a + b, b, embedding) for a, b in sizes)
        self.norm, self.head = nn.GroupNorm(8, widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        time, y, skips = self.time(time), self.stem(x), []
        for block, halve in zip(self.down, [*self.halve, nn.Identity()], strict=True):
            y = block(y, time)
            skips.append(y)
            y = halve(y)
        y = self.middle(y, time)
        for number, block in enumerate(self.up):
            y = F.interpolate(y, scale_factor=2) if number else y
            y = block(torch.cat([y, skips.pop()], 1), time)
        return self.head(F.silu(self.norm(y)))


def images_and_times(model: nn.Module) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    like = next(model.parameters())
    return tuple(
        torch.randn(shape, generator=generator).to(like) for shape in ((2, 3, 16, 16), (2, 8))
    )


def test_a_diffusion_unet_loses_most_of_its_parameters_and_no_output() -> None:
    torch.manual_seed(0)
    model = UNet().double()
    inputs = images_and_times(model)
    assert_contract(model, inputs, kinds=["neurons", "channels"], example_inputs=True)


def test_half_of_its_units_hold_more_than_three_fifths_of_it() -> None:
    torch.manual_seed(0)
    model = UNet()
    inputs = images_and_times(model)
    groups = torch_rsst.find_groups(model, example_inputs=inputs, on_unsupported="ignore")
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=0.5))
    small = torch_rsst.compact(model, groups, example_inputs=inputs)
    dense, left = (sum(p.numel() for p in each.parameters()) for each in (UNet(), small))
    assert left < 0.4 * dense

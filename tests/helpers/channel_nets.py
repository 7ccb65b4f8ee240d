"""Small nets of convolutions, one for each way in which channels go; none of them begins with a stem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from torch_rsst import find_groups
from torch_rsst.discovery import survey
from torch_rsst.groups.groups import GroupLayer


def images(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(shape or (3, 3, 8, 8), generator=generator, dtype=torch.float64)


def conv(inputs: int, outputs: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def norm_conv(inputs: int, outputs: int, **options: Any) -> nn.Sequential:
    return nn.Sequential(
        conv(inputs, outputs, bias=False, **options), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def behind_stem(net: nn.Module, stem: nn.Module | None = None) -> nn.Sequential:
    """A net whose first convolution is not the model's; its path is ``1``."""
    return nn.Sequential(nn.Conv2d(3, 3, 1) if stem is None else stem, net)


class Net(nn.Module):
    """Any layers, and what to do with them."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def table(layer: GroupLayer) -> dict[tuple[str, int], list[int]]:
    return {(m.parameter, m.dim): m.unit_of.tolist() for m in layer.members}


def layers_of(model: nn.Module) -> dict[str, int]:
    groups = find_groups(model, ["channels"], on_unsupported="ignore")
    return {layer.name: layer.units for layer in groups.layers}


def reasons(model: nn.Module) -> dict[str, str]:
    _, refused = survey(model, ["channels"])
    return {item.layer: item.reason for item in refused}


# What runs have in common: a first layer, something in between, a last layer.


def add(net: Any, x: Tensor) -> Tensor:
    x = net.first(x)
    return net.last(x + net.inner(x))


def concatenate(net: Any, x: Tensor) -> Tensor:
    x = net.first(x)
    return net.last(torch.cat([x, net.inner(x), x[:, :0]], 1))


def squeeze_excite(net: Any, x: Tensor) -> Tensor:
    x = net.first(x)
    gate = net.expand(F.relu(net.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()
    return net.last(x * gate)


def linear_gate(net: Any, x: Tensor) -> Tensor:
    x = net.first(x)
    gate = net.expand(F.silu(net.reduce(F.adaptive_avg_pool2d(x, 1).flatten(1)))).sigmoid()
    return net.last(x * gate[:, :, None, None])


def flatten(net: Any, x: Tensor) -> Tensor:
    return net.last(F.adaptive_max_pool2d(net.first(x), 2).flatten(1))


def twice(net: Any, x: Tensor) -> Tensor:
    return net.last(net.inner(net.inner(net.first(x))))


def gated(net: Any, x: Tensor) -> Tensor:
    return net.last(F.glu(net.first(x), 1) if net.fused else torch.mul(*net.first(x).chunk(2, 1)))


def shuffle(net: Any, x: Tensor) -> Tensor:
    x = torch.cat([net.first(x), net.inner(x)], 1)
    x = x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
    return net.last(x)


def pixel_shuffle(net: Any, x: Tensor) -> Tensor:
    return net.last(F.pixel_shuffle(net.first(x), 2))


def resized(net: Any, x: Tensor) -> Tensor:
    x = F.max_pool2d(F.pad(net.first(x), (1, 1, 1, 1), mode="reflect"), 2)
    return net.last(F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="bilinear"))


def channels_last(net: Any, x: Tensor) -> Tensor:
    x = net.first(x).permute(0, 2, 3, 1)
    return net.last(net.inner(x).permute(0, 3, 1, 2))


def scaled(net: Any, x: Tensor) -> Tensor:
    x = net.first(x)
    x = torch.where(x > 0, x, x * net.scale.weight[None, :, None, None])
    return net.last(torch.stack([x, net.inner(x)], 1).sum(1))


def gated_net(fused: bool) -> Net:
    net = Net(gated, first=conv(3, 8), last=conv(4, 2))
    net.fused = fused
    return net


def separable() -> nn.Sequential:
    return nn.Sequential(
        norm_conv(3, 6), norm_conv(6, 6, groups=6), norm_conv(6, 12, groups=6), nn.Conv2d(12, 5, 1)
    )


NETS = {
    "plain": lambda: nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 2)),
    "norm": lambda: nn.Sequential(norm_conv(3, 6), nn.Dropout2d(0.0), conv(6, 2)),
    "residual": lambda: Net(add, first=norm_conv(3, 6), inner=norm_conv(6, 6), last=conv(6, 2)),
    "concatenated": lambda: Net(
        concatenate, first=norm_conv(3, 6), inner=norm_conv(6, 4), last=conv(10, 2)
    ),
    "separable": separable,
    "grouped": lambda: nn.Sequential(norm_conv(3, 8), norm_conv(8, 12, groups=4), conv(12, 2)),
    "squeeze-excite": lambda: Net(
        squeeze_excite,
        first=norm_conv(3, 6),
        reduce=nn.Conv2d(6, 4, 1),
        expand=nn.Conv2d(4, 6, 1),
        last=conv(6, 2),
    ),
    "linear gate": lambda: Net(
        linear_gate,
        first=norm_conv(3, 6),
        reduce=nn.Linear(6, 4),
        expand=nn.Linear(4, 6),
        last=conv(6, 2),
    ),
    "flattened": lambda: Net(flatten, first=norm_conv(3, 6), last=nn.Linear(24, 2)),
    "used twice": lambda: Net(twice, first=norm_conv(3, 6), inner=norm_conv(6, 6), last=conv(6, 2)),
    "chunked": lambda: gated_net(False),
    "glu": lambda: gated_net(True),
    "shuffled": lambda: Net(
        shuffle, first=norm_conv(3, 6), inner=norm_conv(3, 6), last=conv(12, 2)
    ),
    "pixel-shuffled": lambda: Net(pixel_shuffle, first=norm_conv(3, 16), last=conv(4, 2)),
    "resized": lambda: Net(resized, first=norm_conv(3, 6), last=conv(6, 2)),
    "transposed": lambda: nn.Sequential(
        norm_conv(3, 6), nn.ConvTranspose2d(6, 4, 2, stride=2), nn.BatchNorm2d(4), conv(4, 2)
    ),
    "transposed groups": lambda: nn.Sequential(
        norm_conv(3, 6), nn.ConvTranspose2d(6, 12, 2, stride=2, groups=3), conv(12, 2)
    ),
    "channels last": lambda: Net(
        channels_last, first=norm_conv(3, 6), inner=nn.Linear(6, 4), last=conv(4, 2)
    ),
    "scaled and stacked": lambda: Net(
        scaled, first=conv(3, 6), inner=conv(6, 6), scale=nn.PReLU(6), last=conv(6, 2)
    ),
    "prelu": lambda: nn.Sequential(
        conv(3, 6), nn.PReLU(6), nn.InstanceNorm2d(6, affine=True), conv(6, 2)
    ),
}


class Both(nn.Module):
    """An MLP on the channels of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = norm_conv(3, 6), conv(6, 2)
        self.mlp = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + self.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

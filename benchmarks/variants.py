"""One model at equal shapes by different hands: dense, masked, compacted, built anew, torch-pruning."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch_pruning
from torch import Tensor, nn

import torch_rsst
from torch_rsst.groups.groups import Groups

SLACK = (
    1e-6  # torch-pruning rounds up what a ratio means: just below, it is the count that was meant
)


@dataclass(frozen=True)
class Subject:
    """A model that is compared, and which units of it go."""

    name: str
    kinds: tuple[str, ...]

    def build(self) -> nn.Module:
        """The same weights every time, in eval mode."""
        torch.manual_seed(0)
        model: nn.Module = timm.create_model(self.name)
        return model.eval()

    def groups(self, model: nn.Module) -> Groups:
        """The units; a warning for what is not understood is not part of a measurement."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch_rsst.UnsupportedModuleWarning)
            return torch_rsst.find_groups(model, kinds=self.kinds)


SUBJECTS = {
    "deit-s": Subject("deit_small_patch16_224", ("heads", "neurons")),
    "vit-b": Subject("vit_base_patch16_224", ("heads", "neurons")),
    "swin-t": Subject("swin_tiny_patch4_window7_224", ("heads", "neurons")),
    "resnet-50": Subject("resnet50", ("channels",)),
}


def masked(model: nn.Module, groups: Groups, amount: float) -> nn.Module:
    """A masked copy; each layer loses this share of its units."""
    model = copy.deepcopy(model)
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=amount))
    return model


def ours(model: nn.Module, subject: Subject, amount: float) -> nn.Module:
    """Find, regroup and compact, as a user would; the model given is masked."""
    groups = subject.groups(model)
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=amount))
    return torch_rsst.compact(model, groups)


def built_anew(subject: Subject, small: nn.Module) -> nn.Module:
    """Timm's own modules, with new layers of the shapes that ``small`` has."""
    fresh = subject.build()
    twins = dict(fresh.named_modules())
    for path, module in small.named_modules():
        twin = twins.get(path)
        if twin is None:
            raise ValueError(f"{path}: timm's model has no such module")
        if _shapes(module) != _shapes(twin):
            new = _new_layer(module)
            if new is not None:
                fresh.set_submodule(path, new.eval())
                continue
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    twin._parameters[name] = nn.Parameter(torch.randn_like(parameter))
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    twin._buffers[name] = buffer.clone()
        for name, value in vars(module).items():  # num_heads, attn_dim …
            if isinstance(value, (int, tuple)) and vars(twin).get(name, value) != value:
                setattr(twin, name, value)
    return fresh


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    held = {**module._parameters, **module._buffers}
    return {name: tuple(tensor.shape) for name, tensor in held.items() if tensor is not None}


def _new_layer(module: nn.Module) -> nn.Module | None:
    """A new layer as large as this one; None where it is not one of PyTorch's."""
    if type(module) is nn.Linear:
        return nn.Linear(module.in_features, module.out_features, module.bias is not None)
    if type(module) is nn.Conv2d:
        return nn.Conv2d(
            module.in_channels,
            module.out_channels,
            module.kernel_size,  # type: ignore[arg-type]
            module.stride,  # type: ignore[arg-type]
            module.padding,  # type: ignore[arg-type]
            module.dilation,  # type: ignore[arg-type]
            module.groups,
            module.bias is not None,
        )
    if type(module) is nn.BatchNorm2d:
        return nn.BatchNorm2d(module.num_features, module.eps, module.momentum)
    return None


def by_torch_pruning(model: nn.Module, example: Tensor, small: nn.Module) -> nn.Module:
    """Cut in place by torch-pruning: of each layer as much as is missing in ``small``."""
    left = {path: _outputs(module) for path, module in small.named_modules()}
    ratios, stay, attentions = {}, [], []
    heads, head_ratios = {}, {}
    for path, module in model.named_modules():
        if {"qkv", "proj", "num_heads"} <= {*module._modules, *vars(module)}:
            attentions.append(module)
            number = int(module.num_heads)
            missing = number - int(small.get_submodule(path).num_heads)  # type: ignore[arg-type]
            heads[module.qkv], head_ratios[module.qkv] = number, missing / number - SLACK
        if total := _outputs(module):
            ratios[module] = 1 - left[path] / total - SLACK
            if left[path] == total:
                stay.append(module)
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(p=1),
        pruning_ratio_dict=ratios,
        ignored_layers=stay,
        num_heads=dict(heads),
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=max(head_ratios.values(), default=0.0),
        head_pruning_ratio_dict=head_ratios,
    )
    pruner.step()
    for attention in attentions:  # without these, the forward of timm fails
        attention.num_heads = int(pruner.num_heads[attention.qkv])
        attention.attn_dim = attention.qkv.out_features // 3
    return model


def _outputs(module: nn.Module) -> int:
    """How many features or channels a linear layer or a convolution puts out; 0 for other modules."""
    return len(module.weight) if isinstance(module, (nn.Linear, nn.Conv2d)) else 0


def equal_shapes(one: nn.Module, other: nn.Module) -> bool:
    """Whether all parameters of two models have the same names and shapes."""
    a, b = ({n: p.shape for n, p in m.named_parameters()} for m in (one, other))
    return a == b


def runs(model: nn.Module, example: Any) -> None:
    """Raise what the model raises on an example."""
    with torch.no_grad():
        model(example)

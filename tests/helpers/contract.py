"""What every adapter must pass: groups that partition, and a compacted model that equals the masked one."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import torch_rsst
from torch_rsst.groups.groups import NO_UNIT, Groups
from torch_rsst.masking.names import named_weights


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move weights, biases and norms away from where they begin; dropout and drop path off."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    with torch.no_grad():
        for parameter in dict.fromkeys(model.parameters()):
            if parameter.is_floating_point() and parameter.numel():
                spread = parameter.std(correction=0).clamp(0.05, 0.5)
                parameter.add_(noise(parameter) * spread)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
                module.running_mean.add_(noise(module.running_mean) * 0.1)
                module.running_var.mul_(1 + 0.2 * noise(module.running_var).abs())
            for name in ("p", "drop_prob"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
    return model


def outputs_of(model: nn.Module, inputs: Any) -> list[Tensor]:
    """All tensors of floats that a model puts out, but for empty ones, as of a detector that finds nothing."""
    inputs = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, inputs)
    if isinstance(inputs, Mapping):
        out = model(**inputs)
    else:
        out = model(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    tensors = (t for t in tree_leaves(out) if isinstance(t, Tensor) and t.numel())
    return [t for t in tensors if t.is_floating_point()]


def difference(one: nn.Module, other: nn.Module, inputs: Any) -> float:
    """The largest difference between the outputs of two models, relative to outputs above 1."""
    with torch.no_grad():
        a, b = outputs_of(one, inputs), outputs_of(other, inputs)
    assert [t.shape for t in a] == [t.shape for t in b]
    assert all(bool(t.isfinite().all()) for t in a), "pick other weights: outputs are not finite"
    scale = max(1.0, *(float(t.abs().max()) for t in a))
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)) / scale


def assert_partition(model: nn.Module, groups: Groups) -> None:
    """Members fit their parameters, and no entry along a dimension belongs to two layers of one kind."""
    weights, seen = named_weights(model), {}
    for layer in groups.layers:
        for member in layer.members:
            assert member.fits(weights[member.parameter].shape)
            assert member.unit_of.min() >= NO_UNIT
            assert member.unit_of.max() < layer.units
            owned = member.unit_of != NO_UNIT
            key = (member.parameter, member.dim)
            before = seen.get(key, torch.zeros_like(owned))
            assert not bool((before & owned).any()), f"{key} is dealt out twice"
            seen[key] = before | owned
        for unit in range(layer.units):
            assert any(bool((m.unit_of == unit).any()) for m in layer.ranked)
        assert any(m.consumes for m in layer.ranked)


def assert_compacts(
    model: nn.Module, groups: Groups, inputs: Any, *, tolerance: float, train: bool = False
) -> nn.Module:
    """Compact a masked model and compare outputs and gradients; returns the smaller one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch_rsst.CompactionWarning)
        warnings.filterwarnings("ignore", "Nothing was cut")  # of a layer that keeps its only unit
        small = torch_rsst.compact(model, groups, keep_masks=True)
    assert small.training == model.training
    for mode in (False, True) if train else (False,):
        error = difference(model.train(mode), small.train(mode), inputs)
        assert error <= tolerance, f"outputs differ by {error:.3g}"
    assert_same_gradients(model.eval(), small.eval(), inputs, tolerance=100 * tolerance)
    return small


def assert_same_gradients(
    one: nn.Module, other: nn.Module, inputs: Any, *, tolerance: float
) -> None:
    """Parameters that were not cut have the same gradient in both."""
    gradients = []
    for model in (one, other):
        model.zero_grad()
        sum(t.square().mean() for t in outputs_of(model, inputs)).backward()
        gradients.append(
            {
                name.removesuffix("_orig"): (p.grad, p.shape)
                for name, p in model.named_parameters()
                if p.grad is not None
            }
        )
    for name, (gradient, shape) in gradients[1].items():
        reference = gradients[0].get(name)
        if reference is not None and reference[1] == shape and gradient.numel():
            scale = max(1.0, float(reference[0].abs().max()))
            assert float((gradient - reference[0]).abs().max()) <= tolerance * scale, name


def assert_contract(
    model: nn.Module,
    inputs: Any,
    *,
    kinds: Sequence[str],
    amounts: Sequence[Any] = (0.5,),
    example_inputs: bool = False,
    train: bool = True,
) -> Groups:
    """The whole contract on a fresh model in float64: see the module's docstring.

    Args:
        model: changed.
        inputs: that it runs on, float64 where floating.
        kinds: that must be found in it.
        amounts: of :func:`torch_rsst.regroup`, one masked copy each.
        example_inputs: whether discovery needs ``inputs``.
        train: whether outputs in training mode are compared, too.
    """
    model = randomize(model.double().eval())
    found = torch_rsst.find_groups(
        model, kinds, example_inputs=inputs if example_inputs else None, on_unsupported="ignore"
    )
    assert {layer.kind for layer in found.layers} == set(kinds)
    assert all(not layer.fixed for layer in found.layers), [la.fixed for la in found.layers]
    assert_partition(model, found)
    for amount in amounts:
        masked = copy.deepcopy(model)
        refill = torch_rsst.regroup(
            masked, found, amount=amount, importance="magnitude", min_keep=0
        )
        torch_rsst.apply_mask(masked, refill)
        small = assert_compacts(masked, found, inputs, tolerance=1e-10, train=train)
        fresh = copy.deepcopy(small)
        fresh.load_state_dict(small.state_dict())
        assert difference(small, fresh, inputs) == 0.0
        again = pickle.loads(pickle.dumps(small))
        assert difference(small, again, inputs) == 0.0
        assert isinstance(small, type(model))
        try:
            left = torch_rsst.find_groups(
                small, example_inputs=inputs if example_inputs else None, on_unsupported="ignore"
            ).of_kind(*kinds)
        except ValueError:  # nothing is left
            left = Groups()
        if len(left):
            refill = torch_rsst.regroup(small, left, amount=0.5)
            torch_rsst.apply_mask(small, refill)
            assert_compacts(small, left, inputs, tolerance=1e-10)
    return found

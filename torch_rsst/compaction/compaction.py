"""Compact: a masked model → a smaller one with the same outputs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_rsst.compaction.cut_record import (
    Stage,
    bare_biases,
    new_biases_of,
    recorded_module,
    remember,
    removals_of,
    stage_of,
    stages_of,
)
from torch_rsst.compaction.failed_run import HAND_MADE, why_not_run
from torch_rsst.compaction.folding import Constants, measure_constants
from torch_rsst.compaction.moved_freeze import heirs_of
from torch_rsst.compaction.moved_optimizer import move_optimizer
from torch_rsst.compaction.plain import check_keep_masks, warn_of_held, warn_of_zeros
from torch_rsst.discovery import Probe, family
from torch_rsst.discovery.adapter import least_left
from torch_rsst.discovery.cutting import cut_out
from torch_rsst.discovery.examples import small_guesses
from torch_rsst.discovery.probe import output_error, run_example, run_on
from torch_rsst.distributed.dtensor import is_sharded
from torch_rsst.groups.dead_units import dead_units
from torch_rsst.groups.groups import NO_UNIT, Group, GroupLayer, Groups, as_groups, check_groups
from torch_rsst.groups.surgery import (
    Removal,
    Shortened,
    buffer_shape,
    kept_indices,
    module_at,
    select,
)
from torch_rsst.masking.dense_scope import check_masks_in_place
from torch_rsst.masking.freezing import hold
from torch_rsst.masking.live_weight import product
from torch_rsst.masking.mask_sets import ModelMasks
from torch_rsst.masking.mask_values import is_full
from torch_rsst.masking.masked_parameter import restore
from torch_rsst.masking.names import named_refs, named_weights, unwrap, without_wrappers
from torch_rsst.masking.parameter_ref import ParameterRef, masked_refs
from torch_rsst.utils.amounts import check_count
from torch_rsst.utils.errors import CompactionWarning, MissingNameError, refuse
from torch_rsst.utils.module_state import deep_copy, undisturbed


def compact(
    model: nn.Module,
    groups: Groups | Iterable[Group] | Iterable[GroupLayer],
    *,
    example_inputs: Any = None,
    optimizer: Optimizer | None = None,
    round_to: int = 1,
    keep_masks: bool | None = None,
) -> nn.Module:
    """Cut the dead units out of a masked model: a smaller model with the same outputs.

    Example:
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
        >>> groups = torch_rsst.find_groups(mlp)
        >>> torch_rsst.apply_mask(mlp, torch_rsst.regroup(mlp, groups, amount=0.5))
        >>> small = torch_rsst.compact(mlp, groups)
        >>> small[0], small[2]
        (Linear(in_features=4, out_features=4, bias=True), Linear(in_features=4, out_features=4, bias=True))

    A unit is dead where all its entries are masked or exactly 0, or all entries that compute it. The
    constant output of a unit without inputs (the activation of its bias, the shift of a batch norm) is
    added to the bias of the next layer; where that is not exact the unit stays, and a
    :class:`torch_rsst.CompactionWarning` names it. The result has plain parameters: masked weights of
    units that stay become zeros. Call :func:`find_groups` again for the groups of the result.

    Args:
        model: masked; not changed. Wrappers (data parallel, compiled) are left out of the result.
        groups: from :func:`find_groups` for this very model.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments for the model.
            Given, the outputs of the result are compared with the model's before it is returned; so they
            are on inputs that are guessed where groups were made by hand.
        optimizer: of the model's parameters; changed in place: it goes on with those of the result,
            and the surviving part of its state (momentum, second moments …). What is frozen stays so.
        round_to: leave the units of each layer a multiple of this, padded with dead ones.
        keep_masks: True keeps masks that still have zeros, and what is frozen, so that these stay 0 in training; False
            makes all masks permanent, which is faster and half as large; None keeps them where an
            ``optimizer`` is passed.

    Returns:
        a model of the same class, in the mode (training or eval) of ``model``. Modules whose forward
        fixes their width become a subclass of themselves; those without units a
        :class:`torch_rsst.discovery.BiasOnly`.

    Raises:
        TypeError: unless given a module and groups; for another ``keep_masks``.
        KeyError, ValueError: for groups of another model, tied or sharded parameters, groups made by
            hand that cannot be verified, inputs that the model does not run on.
        RuntimeError: where the outputs on the inputs differ.

    Warns:
        UnfrozenZerosWarning: for ``keep_masks=None``, where masked weights became zeros, or
            ``freeze_zeros=True`` held some that nothing holds in the result.
    """
    with torch.inference_mode(False):  # whose tensors cannot be trained
        bare = unwrap(model)
        check_masks_in_place("compact", bare.modules())
        groups = as_groups(groups)
        check_count(round_to, "round_to", at_least=1)
        check_keep_masks(keep_masks)
        check_compactable(bare, groups)
        probe = Probe(bare, example_inputs)
        removals, constants, kept_whole, dead = _choose(bare, groups, round_to, probe)
        keep = optimizer is not None if keep_masks is None else keep_masks
        shared = _cut_tensors(bare, removals)
        masks = {
            ref.original: ref.mask for ref in masked_refs(bare.modules()) if ref.mask is not None
        }
        memo = {id(tensor): tensor for tensor in shared}
        if not keep:
            # Read from the masked model instead: an empty mask stands for that of a tensor to be cut.
            memo |= {id(m): m.new_ones(0) if p in shared else m for p, m in masks.items()}
        small = deep_copy(bare, memo)
        if not keep:
            restore(masked_refs(small.modules()))
        without = bare_biases(small)
        for emitted, units in constants:
            emitted.add_to(small, bare, units)
        new_biases = without - bare_biases(small)
        removals = [_with_biases(removal, new_biases) for removal in removals]
        stage = stage_of(removals, new_biases)
        small, shortened = cut_out(small, removals)
        remember(small, [*(stages_of(bare) or ()), stage])
        successors = _successors(bare, small, memo, shortened)
        zeros = 0 if keep else _zero_masked(masks, successors, shared)
        restore([ref for ref in masked_refs(small.modules()) if is_full(ref.mask)])
        if example_inputs is None and any(not r.layer.family for r in removals if r.count):
            example_inputs = _example_of(bare)
        if example_inputs is not None:
            _compare(bare, small, example_inputs, removals)
        heirs = heirs_of(bare, small, successors)
        goes_on = optimizer is not None or keep
        if keep_masks is None:
            warn_of_zeros("compact", zeros)
            warn_of_held("compact", 0 if goes_on else sum(heir.zeros for heir in heirs.values()))
        if kept_whole:
            warnings.warn(_not_cut(kept_whole), CompactionWarning, stacklevel=2)
        elif not dead:
            warnings.warn(_NOTHING, CompactionWarning, stacklevel=2)
        if optimizer is not None:  # last: where warnings are errors, it is as before
            move_optimizer(optimizer, successors)
            _give_biases(optimizer, small, new_biases)
        if goes_on:
            hold(heirs)
        return small


def replay(model: nn.Module, stages: Iterable[Stage]) -> nn.Module:
    """Cut a dense model to the shapes that these stages led to, in place, whatever its values.

    Args:
        model: built as the one was that the stages come from.
        stages: what :func:`torch_rsst.compaction.cut_record.stages_of` a compacted model says.

    Returns:
        the model, or what takes its place.

    Raises:
        KeyError, ValueError: for stages of another model.
    """
    for stage in stages:
        for name in new_biases_of(stage):
            layer = recorded_module(model, name)
            if layer._parameters.get("bias", layer) is not None:
                got, remedy = "one that has it already, or none", "Pass the model of this folder."
                expected = "a layer without bias"
                refuse(ValueError, name, expected, got, remedy)
            weight = product(layer, "weight")
            layer._parameters["bias"] = nn.Parameter(weight.new_zeros(weight.shape[0]))
        removals = removals_of(stage, model)
        check_compactable(model, Groups(tuple(removal.layer for removal in removals)))
        model, _ = cut_out(model, removals)
    return model


def _with_biases(removal: Removal, new: Collection[str]) -> Removal:
    """With the biases that were not there when the units were found: their rows go, too."""
    added = []
    for member in removal.layer.members:
        path, _, leaf = member.parameter.rpartition(".")
        if leaf == "weight" and path in new and member.dim == 0 and not member.consumes:
            bias = f"{path}.bias" if path else "bias"
            added.append(replace(member, parameter=bias, ranked=False))
    if not added:
        return removal
    members = (*removal.layer.members, *added)
    return Removal(replace(removal.layer, members=members), removal.gone)


def check_compactable(model: nn.Module, groups: Groups) -> None:
    """Raise unless the groups are those of this model, and it can be copied and cut."""
    weights, refs = named_weights(model), named_refs(model)
    remedy = "Find the groups of this very model: find_groups(model)."
    check_groups(weights, groups)
    if sharded := next((name for name, w in weights.items() if is_sharded(w)), None):
        gather = "Gather the full parameters on one process first."
        refuse(ValueError, f"compact: {sharded!r}", "a whole parameter", "a sharded one", gather)
    modules = {without_wrappers(name) for name, _ in model.named_modules()}
    for layer in groups.layers:
        subject = f"groups of {layer}"
        if layer.family:
            if not family(layer.family).whole_model and layer.name not in modules:
                refuse(MissingNameError, subject, "a module of the model", "no such module", remedy)
        elif not any(member.consumes for member in layer.members):
            expected = "a member that takes the units in (consumes=True)"
            refuse(ValueError, subject, expected, "none", remedy)
        for member in layer.members:
            if len(refs[member.parameter]) > 1:
                got = f"{member.parameter!r} in several modules"
                untie = "Untie it, or leave these groups out."
                refuse(ValueError, subject, "parameters of one module", got, untie)
        for member in layer.buffers:
            shape, size = buffer_shape(model, member.parameter), member.unit_of.shape[-1]
            if shape is None or not member.fits(shape):
                expected = f"a buffer {member.parameter!r} of size {size} along dim {member.dim}"
                got = "none" if shape is None else f"shape {shape}"
                refuse(ValueError, subject, expected, got, remedy)


def _choose(
    model: nn.Module, groups: Groups, round_to: int, probe: Probe
) -> tuple[list[Removal], list[tuple[Constants, Tensor]], list[str], int]:
    """Which units go, which put out a constant, dead ones that stay and why; how many are dead."""
    weights, masks = named_weights(model), ModelMasks(model)
    removals, emitted, stay, count = [], [], [], 0
    for layer in groups.layers:
        dead = dead_units(layer, weights, masks)
        goes, number = dead.silent, int((dead.silent | dead.constant).sum())
        count += number
        if layer.fixed and number:
            stay.append(f"{number} of {layer}: {layer.fixed}")
            continue
        constants = None
        if bool(dead.constant.any()):
            constants = _measured(model, layer, dead.constant, probe)
            goes = goes | constants.exact
            if left := int((dead.constant & ~constants.exact).sum()):
                stay.append(f"{left} of {layer}: {constants.stay}")
        wanted, goes = goes, padded(goes, dead.silent, layer, round_to)
        if len(layer.parts) > 1 and (back := int((wanted & ~goes).sum())):
            stay.append(f"{back} of {layer}: as many are left of each of its stacked weights")
        if constants is not None:
            emitted.append((constants, goes & ~dead.silent))
        removals.append(Removal(layer, goes))
    return removals, emitted, stay, count


def _measured(model: nn.Module, layer: GroupLayer, units: Tensor, probe: Probe) -> Constants:
    """What units put out that have no inputs, measured in as small a module as holds them all."""
    owner, local = model, layer
    if layer.family and not family(layer.family).whole_model:
        path = f"{layer.name}."
        members = (replace(m, parameter=m.parameter.removeprefix(path)) for m in layer.members)
        owner = module_at(model, layer.name)
        local = replace(layer, name="", members=tuple(members))
    return measure_constants(model, layer, units, owner, probe.two_calls(owner, local))


def _cut_tensors(model: nn.Module, removals: Sequence[Removal]) -> set[Tensor]:
    """The weights and masks that are to be cut, and so replaced: a copy of the model can share them."""
    refs = named_refs(model)
    members = [member for removal in removals for member in removal.layer.members]
    # Not biases, to which constants are added.
    places = [r for n, _ in kept_indices(members, removals) for r in refs[n] if r.original.ndim > 1]
    return {t for ref in places for t in (ref.original, ref.mask) if t is not None}


def _zero_masked(
    masks: Mapping[nn.Parameter, Tensor],
    successors: Mapping[nn.Parameter, Shortened | None],
    shared: Collection[Tensor],
) -> int:
    """Set what is masked to 0 in parameters that were cut, and count the zeros of all; in place."""
    zeros = 0
    for original, mask in masks.items():
        new = successors[original]
        if new is None or is_full(left := select(mask, new.kept)):
            continue
        dead = left == 0
        zeros += int(dead.count_nonzero())
        if original in shared:
            new.parameter.detach().masked_fill_(dead, 0.0)
    return zeros


def padded(goes: Tensor, silent: Tensor, layer: GroupLayer, round_to: int = 1) -> Tensor:
    """Fewer units, so that those left can run and make a multiple of ``round_to`` features.

    Of stacked weights, as many are left of each.
    """
    if layer.fixed:
        return torch.zeros_like(goes)
    taking = (m.unit_of[m.unit_of != NO_UNIT] for m in layer.members if m.consumes)
    features = int(torch.bincount(next(taking, torch.zeros(1, dtype=torch.int64))).max())
    step = round_to // math.gcd(round_to, features)
    step = math.lcm(step, layer.multiple)
    left = (~goes)[layer.parts].sum(1)
    stay = -(-max(int(left.max()), least_left(layer)) // step) * step
    goes = goes.clone()
    for units, own in zip(layer.parts, left.tolist(), strict=True):
        # Silent ones come back first: they put nothing out.
        first, then = goes[units] & silent[units], goes[units] & ~silent[units]
        goes[units[torch.cat([first.nonzero(), then.nonzero()])[: max(0, stay - own)]]] = False
    return goes


def _successors(
    model: nn.Module,
    small: nn.Module,
    copies: Mapping[int, Any],
    shortened: Mapping[nn.Parameter, Shortened],
) -> dict[nn.Parameter, Shortened | None]:
    """What each parameter of the model has become; None for those that are gone."""
    left = set(small.parameters())
    copied = {parameter: copies[id(parameter)] for parameter in model.parameters()}
    new = {old: shortened.get(own, Shortened(own, {})) for old, own in copied.items()}
    return {old: each if each.parameter in left else None for old, each in new.items()}


def _give_biases(optimizer: Optimizer, small: nn.Module, layers: Collection[str]) -> None:
    """Let an optimizer train biases that are new in these layers, beside their weights."""
    for name in layers:
        ref = ParameterRef(module_at(small, name), "weight")
        bias = ref.module._parameters.get("bias")
        for group in optimizer.param_groups:
            if bias is not None and any(p is ref.original for p in group["params"]):
                group["params"].append(bias)


def _example_of(model: nn.Module) -> Any:
    """Inputs to verify groups on that discovery did not find; refused where none can be guessed."""
    guesses = (each for guess in small_guesses(model) for each in (*_more_rows(guess), guess))
    for example in guesses:
        try:
            with undisturbed(model):
                run_on(model, example)
        except Exception:
            continue
        return example
    remedy = "Pass example_inputs, so that the outputs can be compared."
    got = "groups made by hand, and a model that runs on no inputs that can be guessed"
    refuse(ValueError, "compact", "groups that are verified", got, remedy)


def _more_rows(guess: Any) -> Iterator[Tensor]:
    """A guess of many samples of features: on few ones, a unit that was cut wrongly may not be active."""
    if isinstance(guess, Tensor) and guess.is_floating_point() and guess.ndim == 2:
        generator = torch.Generator().manual_seed(1)
        yield torch.randn((64, guess.shape[1]), generator=generator).to(guess)


def _compare(
    model: nn.Module, small: nn.Module, example_inputs: Any, removals: Sequence[Removal]
) -> None:
    try:
        error, scale = output_error(model, small, example_inputs)
    except Exception as failure:
        with undisturbed(model):
            run_example(model, example_inputs)  # tells where it is the model that does not run
        raise RuntimeError(why_not_run(small, removals, failure)) from failure
    if not is_rounding(error, scale, model):
        got = f"a difference of {error:.3g} at values up to {scale:.3g}"
        refuse(RuntimeError, "compact", "the same outputs", got, HAND_MADE)


def is_rounding(error: float, scale: float, model: nn.Module) -> bool:
    """Whether outputs up to ``scale`` may differ by ``error`` because sums are rounded."""
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    precision = max((torch.finfo(dtype).eps for dtype in types), default=1e-7)
    return error <= 1e3 * precision * max(scale, 1.0)


def _not_cut(stay: Sequence[str]) -> str:
    more = f"; and {len(stay) - 3} more" if stay[3:] else ""
    text = f"Dead units stay in the model: {'; '.join(stay[:3])}{more}."
    if not any("fixes" in each for each in stay):
        return text
    return f"{text} A module that fixes its width can be made to follow its layers, see Extending in the docs."


_NOTHING = (
    "Nothing was cut: no unit of these groups is wholly masked or 0. Apply a refill mask first, "
    "apply_mask(model, regroup(model, groups, amount=0.5)), or finalize() the rounds."
)

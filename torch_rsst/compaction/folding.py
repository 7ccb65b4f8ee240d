"""Units that put out a constant: move it into the bias of the layers that take it in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from torch_rsst.discovery.adapter import Call
from torch_rsst.discovery.probe import run_call
from torch_rsst.groups.groups import NO_UNIT, GroupLayer, Member
from torch_rsst.groups.surgery import module_at
from torch_rsst.masking.live_weight import product
from torch_rsst.masking.masked_parameter import restore
from torch_rsst.masking.names import named_refs
from torch_rsst.masking.parameter_ref import ParameterRef
from torch_rsst.utils.errors import refuse
from torch_rsst.utils.module_state import undisturbed


@dataclass(frozen=True, eq=False)
class Constants:
    """What constant units put out, measured.

    Attributes:
        layer: the units, by names within the model.
        exact: bool tensor over the units: which can be moved into biases without changing any output.
        values: per member that takes units in, what each of its inputs is.
        stay: why the others stay.
    """

    layer: GroupLayer
    exact: Tensor
    values: tuple[Tensor, ...]
    stay: str = "their output cannot be added to the next layer's bias exactly"

    def add_to(self, model: nn.Module, masked: nn.Module, units: Tensor) -> None:
        """Add what ``units`` contribute to the biases of the layers that take them in, in place.

        Args:
            model: a copy of ``masked``, before anything is cut out of it.
            masked: has the weights.
            units: bool tensor; those that are not ``exact`` are left out.
        """
        if bool((units & self.exact).any()):
            for member, value in zip(_taking(self.layer), self.values, strict=True):
                weight = ParameterRef(_home(masked, member), "weight")
                _add_to_bias(_home(model, member), weight, member, units & self.exact, value)


def measure_constants(
    model: nn.Module, layer: GroupLayer, units: Tensor, owner: nn.Module, calls: Sequence[Call]
) -> Constants:
    """Measure what units put out whose output does not depend on the input.

    A unit can be moved into the biases of all layers that take it in, or stays: where its output is not
    constant after all, where it is another one in training (batch norms), where a convolution pads with
    zeros what is not 0, or where the bias is that of another module, too.

    Args:
        model: that holds everything; run in eval mode, not changed.
        layer: the units, by names within the model.
        units: bool tensor, True for those to measure.
        owner: the module to run.
        calls: different inputs of it.

    Raises:
        ValueError: for a member that takes units in along another dimension than its inputs.
    """
    members = _taking(layer)
    homes = [_home(model, member) for member in members]
    none = Constants(layer, torch.zeros_like(units), tuple(torch.zeros(0) for _ in homes))
    if not all(isinstance(home, (nn.Linear, nn.Conv1d, nn.Conv2d)) for home in homes):
        return none
    exact, values = units.clone(), []
    places = [refs for refs in named_refs(model).values() if len(refs) > 1]
    tied = {ref.module for refs in places for ref in refs if ref.name == "bias"}
    norms = [module for module in owner.modules() if isinstance(module, _NormBase)]
    for member, home in zip(members, homes, strict=True):
        size = member.unit_of.numel()
        inputs = _inputs_of(home, owner, calls, [])
        if len(inputs) < 2:
            return replace(none, stay=_NOT_RUN)
        value, constant = _constants(inputs, home)
        if value.numel() != size:
            expected = f"a unit for each of its {value.numel()} inputs"
            got = f"{size} along dim {member.dim}"
            remedy = "Deal its inputs out, as columns: dim=1."
            refuse(ValueError, f"groups of {layer}: {member.parameter!r}", expected, got, remedy)
        if layer.buffers or norms:
            trained, same = _constants(_inputs_of(home, owner, calls, norms), home)
            constant &= same & ((trained - value).abs() <= 1e-5 * (1.0 + value.abs()))
        movable = constant & ((_does_not_pad(home) and home not in tied) | (value == 0))
        owned = member.unit_of != NO_UNIT
        exact[member.unit_of[owned & ~movable]] = False
        values.append(value)
    return Constants(layer, exact, tuple(values))


_NOT_RUN = (
    "what they put out is the same for all inputs: pass example_inputs to measure and move it"
)


def _taking(layer: GroupLayer) -> list[Member]:
    return [member for member in layer.ranked if member.consumes]


def _home(model: nn.Module, member: Member) -> nn.Module:
    return module_at(model, member.parameter.rpartition(".")[0])


def _inputs_of(
    layer: nn.Module, owner: nn.Module, calls: Sequence[Call], training: Sequence[nn.Module]
) -> list[Tensor]:
    """What a layer gets, with some batch norms in training mode: by the statistics of the batch."""
    seen: list[Tensor] = []
    record = layer.register_forward_pre_hook(lambda _, x: seen.append(x[0].detach().clone()))
    with record, undisturbed(owner):
        for norm in training:
            norm.train()
        for call in calls:
            run_call(owner, call)
    return seen


def _constants(inputs: Sequence[Tensor], layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Per feature of a layer's input: its value, and whether it is the same everywhere."""
    dim = -1 if isinstance(layer, nn.Linear) else 1
    flat = torch.cat([tensor.movedim(dim, -1).flatten(0, -2) for tensor in inputs]).double()
    low, high = flat.amin(0), flat.amax(0)
    # Sums that are equal but for their rounding, as those of a softmax are.
    near = 1e-6 * torch.maximum(low.abs(), high.abs())
    return flat.mean(0).cpu(), (high - low <= near).cpu()


def _does_not_pad(layer: nn.Module) -> bool:
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d)) or layer.padding == "valid":
        return True
    return layer.padding != "same" and not any(layer.padding)


def _add_to_bias(
    layer: nn.Module, weight: ParameterRef, member: Member, units: Tensor, value: Tensor
) -> None:
    owned = member.unit_of != NO_UNIT
    goes = torch.zeros_like(owned)
    goes[owned] = units[member.unit_of[owned]]
    if not bool(value[goes].any()):
        return
    with torch.no_grad():
        dense = product(weight.module, "weight").detach()
        columns = dense[:, goes.to(dense.device)].double()
        if columns.ndim > 2:
            columns = columns.flatten(2).sum(2)
        shift = columns @ value[goes].to(dense.device)
        ref = ParameterRef(layer, "bias")
        if ref.is_masked:
            restore([ref])  # entries that were masked take part from now on
        bias = layer._parameters["bias"]
        if bias is None:
            trained = weight.original.requires_grad
            layer._parameters["bias"] = nn.Parameter(shift.to(dense.dtype), requires_grad=trained)
        else:
            bias.copy_(bias.double() + shift)

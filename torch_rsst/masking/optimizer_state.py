"""What optimizers remember of parameters: put in the right order, and reset where weights return."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_rsst.masking.live_weight import ORIG
from torch_rsst.masking.mask_sets import Masks
from torch_rsst.masking.names import named_refs, without_wrappers
from torch_rsst.utils.errors import MissingNameError, check_keys, listing, refuse, shown
from torch_rsst.utils.iterables import items

# Names that torch.optim gives to state with one value per entry: their shapes tell a wrong order.
_PER_ENTRY = (
    "momentum_buffer",
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "exp_inf",
    "square_avg",
    "sum",
)
# State of the parameter's shape, perhaps, that remembers no gradients.
_NO_MOMENTS = ("step", "step_size", "eta", "mu", "ax")


def convert_optimizer_state(
    state: Mapping[str, Any],
    model: nn.Module,
    from_order: Literal["stock"] | Sequence[str] = "stock",
) -> dict[str, Any]:
    """Bring an optimizer's state dict into the order of the model's parameters.

    Example:
        >>> from torch.nn.utils import prune as stock
        >>> old, new = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        >>> _ = stock.l1_unstructured(old, "weight", amount=1)  # moves weight_orig behind bias
        >>> saved = torch.optim.Adam(old.parameters()).state_dict()
        >>> torch_rsst.prepare_from_state_dict(new, old.state_dict()).load_state_dict(old.state_dict())
        <All keys matched successfully>
        >>> optimizer = torch.optim.Adam(new.parameters())
        >>> optimizer.load_state_dict(torch_rsst.convert_optimizer_state(saved, new))

    PyTorch addresses optimizer state by position, and ``torch.nn.utils.prune`` moves a parameter
    behind the others of its module when it is pruned, and again when it is removed: loaded into an
    ordinary model, momentum lands on another parameter, silently where the shapes agree. That holds
    for optimizers made *after* pruning: one that was made before goes on in the dense order, and its
    state loads as it is. This
    library keeps the order, so what was saved dense, pruned or removed by it needs no conversion.

    Args:
        state: of an optimizer that was made after pruning; not changed.
        model: masked in the parameters that were pruned when the state was saved.
        from_order: ``"stock"``: the names in the state itself, if it was made from
            ``named_parameters()``; else that of an optimizer over ``model.parameters()``, in one group, with at
            most one pruned parameter per module. For anything else, the dense names of the
            optimizer's parameters in the order they had, ``_orig`` allowed: for a whole model
            ``[name for name, _ in old_model.named_parameters()]``.

    Returns:
        a new state dict (its tensors are shared) for an optimizer whose groups hold the same
        parameters in the order of ``model.named_parameters()``.

    Raises:
        TypeError: for anything but names in ``from_order``.
        ValueError: where the state does not fit the names or shapes, or ``"stock"`` leaves the
            order open.
        KeyError: for names that the model does not have.
    """
    check_keys(state, ("state", "param_groups"), "optimizer state")
    shapes = {name: places[0].original.shape for name, places in named_refs(model).items()}
    if isinstance(from_order, str) and from_order == "stock":
        given = _names_in(state) or _stock_order(model, state)
    else:
        given = _names(from_order)
    names = _dense(given, shapes)
    ids = [key for group in state["param_groups"] for key in group["params"]]
    if len(names) != len(ids) or len(set(names)) != len(names):
        got = f"{len(ids)} in the state and {len(set(names))} different names"
        remedy = "Name each parameter that the optimizer held, once, in its order."
        refuse(ValueError, "from_order", "one name per parameter", got, remedy)
    name_of = dict(zip(ids, names, strict=True))
    _check_shapes(state["state"], name_of, shapes)
    rank = {name: position for position, name in enumerate(shapes)}
    groups: list[dict[str, Any]] = []
    new_id: dict[int, int] = {}
    for group in state["param_groups"]:
        ordered = sorted(group["params"], key=lambda key: rank[name_of[key]])
        new_id.update({key: len(new_id) + i for i, key in enumerate(ordered)})
        named = {"param_names": [name_of[key] for key in ordered]} if "param_names" in group else {}
        groups.append({**group, "params": [new_id[key] for key in ordered], **named})
    moved = {new_id[key]: value for key, value in state["state"].items() if key in new_id}
    return {**state, "state": moved, "param_groups": groups}


def _stock_order(model: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """The order of ``parameters()`` where each masked one was moved behind its module's others."""
    remedy = "Pass from_order: the names of the optimizer's parameters in the order they had."
    if (groups := len(state["param_groups"])) != 1:
        refuse(ValueError, 'from_order="stock"', "one parameter group", f"{groups}", remedy)
    by_module: dict[nn.Module, list[tuple[str, bool]]] = {}
    for name, places in named_refs(model).items():
        by_module.setdefault(places[0].module, []).append((name, places[0].is_masked))
    order: list[str] = []
    for members in by_module.values():
        masked = [name for name, is_masked in members if is_masked]
        if len(masked) > 1:
            expected, got = "one pruned parameter per module", listing(masked)
            refuse(ValueError, 'from_order="stock"', expected, got, remedy)
        order += [name for name, is_masked in members if not is_masked] + masked
    return order


def _names_in(state: Mapping[str, Any]) -> list[str]:
    """What an optimizer made from named parameters says itself; empty for others."""
    named = [group.get("param_names", ()) for group in state["param_groups"]]
    return [name for names in named for name in names] if all(named) else []


def _names(given: object) -> list[str]:
    """Names that were given as such; refused for anything else."""
    names = items(given)
    if names is None or not all(isinstance(name, str) for name in names):
        remedy = "Pass [name for name, _ in old_model.named_parameters()], or 'stock'."
        refuse(TypeError, "from_order", "'stock' or a list of names", shown(given), remedy)
    return names


def _dense(names: Sequence[str], shapes: Mapping[str, torch.Size]) -> list[str]:
    inner = [without_wrappers(name) for name in names]
    dense = [n.removesuffix(ORIG) if n.removesuffix(ORIG) in shapes else n for n in inner]
    if unknown := [name for name in dense if name not in shapes]:
        remedy = f"It has {listing(shapes)}."
        got = listing(unknown)
        refuse(MissingNameError, "from_order", "parameters of the model", got, remedy)
    return dense


def _check_shapes(
    state: Mapping[Any, Any], name_of: Mapping[Any, str], shapes: Mapping[str, torch.Size]
) -> None:
    for key, name in name_of.items():
        for entry, value in state.get(key, {}).items():
            if entry in _PER_ENTRY and value is not None and value.shape != shapes[name]:
                refuse(
                    ValueError,
                    f"optimizer state of {name!r}",
                    f"{entry} of shape {tuple(shapes[name])}",
                    f"shape {tuple(value.shape)}",
                    "The order is another one. Made before pruning, an optimizer keeps the dense "
                    "order: load its state as it is. Else pass the names in from_order.",
                )


def reset_moments(optimizer: Optimizer, parameter: nn.Parameter, entries: Tensor) -> None:
    """Set what an optimizer remembers of the ``entries`` (bool) of a parameter to 0, in place.

    Momentum and running averages of gradients; the step count, which all entries share, stays.
    """
    with torch.no_grad():
        for name, value in optimizer.state.get(parameter, {}).items():
            is_moment = isinstance(value, Tensor) and name not in _NO_MOMENTS
            if is_moment and value.shape == parameter.shape:
                value.masked_fill_(entries.to(value.device), 0)


def reset_returned(optimizers: Iterable[Optimizer], model: nn.Module, before: Masks) -> None:
    """Reset the moments of entries that were masked ``before`` and are alive now."""
    refs = named_refs(model)
    for optimizer in optimizers:
        for name, was_alive in before.items():
            ref = refs[name][0]
            reset_moments(optimizer, ref.original, ref.alive_entries & ~was_alive)

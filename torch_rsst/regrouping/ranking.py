"""Global L1 over a model's groups: what is alive after one more ranking. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from torch_rsst.groups.groups import Groups
from torch_rsst.importance.weights import remain
from torch_rsst.masking.mask_sets import Masks, alive_in
from torch_rsst.masking.names import first_names, named_refs
from torch_rsst.masking.parameter_ref import (
    Parameter,
    check_has_values,
    check_ref,
    parameter_list,
    ref_of,
)
from torch_rsst.selection.topk import Ranking
from torch_rsst.utils.amounts import Amount, to_count
from torch_rsst.utils.errors import refuse, refuse_name


def ranked_names(
    model: nn.Module, groups: Groups, parameters: Iterable[Parameter | str] | None
) -> list[str]:
    """The dense names of what is ranked, in ``named_parameters`` order where it is the groups'.

    Raises:
        TypeError: for what is no list.
        KeyError: for a parameter that the model does not have.
        ValueError: for one listed twice, or none at all.
    """
    refs = named_refs(model)
    if parameters is None:
        members = {m.parameter for layer in groups.layers for m in layer.ranked}
        names = [name for name in refs if name in members]
    else:
        by_identity = {id(places[0].original): name for name, places in refs.items()}
        first, names = first_names(model), []
        for parameter in parameter_list(parameters):
            if isinstance(parameter, str):
                name = first.get(parameter, parameter)
            else:
                ref = ref_of(parameter)
                name = by_identity.get(id(ref.original), f"{ref.name} of another model")
            if name not in refs:
                refuse_name(f"parameters: {name!r}", refs)
            if name in names:
                remedy = "List every parameter once."
                refuse(ValueError, f"parameters: {name!r}", "once", "it twice", remedy)
            names.append(name)
    if not names:
        remedy = "Pass the result of find_groups(model), or parameters."
        refuse(ValueError, "groups", "at least one", "none", remedy)
    for name in names:
        check_has_values(check_ref(refs[name][0].module, refs[name][0].name))
    return names


def rank(
    weights: Mapping[str, Tensor],
    alive: Mapping[str, Tensor],
    groups: Groups,
    ranked: Sequence[str],
    amount: Amount,
) -> Masks:
    """The current mask after one global L1 ranking, for all ranked, following and masked parameters.

    Of the alive entries of all ``ranked`` parameters together the lowest go; a follower's entry
    goes when its unit's last ranked entry has.
    """
    before = [alive_in(weights, alive, name) for name in ranked]
    scores = [weights[name] for name in ranked]
    ranking = Ranking(scores, among=before, absolute=True, names=[repr(n) for n in ranked])
    cut = ranking.cut(to_count(amount, ranking.available, of="alive entries"))
    current = dict(zip(ranked, cut.stays(), strict=True))
    current |= {name: mask for name, mask in alive.items() if name not in current}
    return with_followers(weights, current, groups)


def with_followers(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], groups: Groups
) -> Masks:
    """Masks in which a follower's entry is 0 where its unit has no alive ranked entry left."""
    current = dict(masks)
    for layer in groups.layers:
        lives = remain(layer, weights, current) > 0
        for member in layer.members:
            if not member.ranked:
                weight = weights[member.parameter]
                follows = member.spread(lives, weight)
                current[member.parameter] = alive_in(weights, current, member.parameter) & follows
    return current

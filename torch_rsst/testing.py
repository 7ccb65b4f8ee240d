"""For your tests: hypothesis strategies, and one check of everything a masked model must keep.

Example:
    >>> from hypothesis import given, settings
    >>> from torch_rsst.testing import assert_mask_invariants, models_with_groups
    >>> @settings(deadline=None)
    ... @given(models_with_groups())
    ... def test_my_pruner(drawn):
    ...     model, groups = drawn
    ...     torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=0.5))
    ...     assert_mask_invariants(model)
    >>> test_my_pruner()

Importing :mod:`torch_rsst` does not import this module, nor hypothesis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from torch_rsst.discovery import find_groups
from torch_rsst.groups.groups import Groups, head_layer
from torch_rsst.masking.live_weight import MASK, ORIG
from torch_rsst.masking.mask_sets import Masks, apply_mask, as_masks, extract_mask
from torch_rsst.masking.masked_parameter import MaskContainer, MaskHook
from torch_rsst.masking.names import named_weights, unwrap
from torch_rsst.masking.parameter_ref import ParameterRef, masked_refs

__all__ = [
    "assert_mask_invariants",
    "mask_sets",
    "masks",
    "models_with_groups",
    "shapes",
    "weights",
]

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# Few distinct values make ties; the rest is what rankings get wrong: both zeros, numbers next to
# each other, and the smallest that float16, float32 and float64 can hold.
_TIED = (0.0, -0.0, 0.5, -0.5, 1.0, -1.0)
_AWKWARD = (2.0**-24, 2.0**-149, 2.0**-1074, 1.0 + 2.0**-10, 1.0 + 2.0**-23, 65504.0)


def shapes(
    max_dims: int = 4, max_side: int = 5, *, min_side: int = 1
) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of parameters, from one dimension up.

    >>> len(shapes(max_dims=1).example())
    1
    """
    sides = st.integers(min_side, max_side)
    return st.lists(sides, min_size=1, max_size=max_dims).map(tuple)


@st.composite
def weights(
    draw: st.DrawFn,
    shape: Sequence[int] | st.SearchStrategy[tuple[int, ...]] | None = None,
    *,
    dtypes: Sequence[torch.dtype] = FLOATS,
    allow_infinity: bool = False,
) -> Tensor:
    """Weights that are hard to rank: heavy ties, both zeros, denormals, any memory layout.

    >>> weights(shape=(2, 3)).example().shape
    torch.Size([2, 3])

    Args:
        draw: given by hypothesis.
        shape: fixed, or a strategy such as :func:`shapes`.
        dtypes: to choose from.
        allow_infinity: also draw ±inf.
    """
    if shape is None:
        shape = shapes()
    size = tuple(draw(shape) if isinstance(shape, st.SearchStrategy) else shape)
    extremes = (float("inf"), -float("inf")) if allow_infinity else ()
    values = st.one_of(
        st.sampled_from(_TIED),
        st.sampled_from((*_AWKWARD, *extremes)),
        st.floats(-4.0, 4.0, width=16),
    )
    count = int(torch.Size(size).numel())
    drawn = draw(st.lists(values, min_size=count, max_size=count))
    tensor = (
        torch.tensor(drawn, dtype=torch.float64).reshape(size).to(draw(st.sampled_from(dtypes)))
    )
    if draw(st.booleans()):  # the same numbers, laid out backwards in memory
        order = tuple(reversed(range(len(size))))
        tensor = tensor.permute(order).contiguous().permute(order)
    return tensor


@st.composite
def masks(draw: st.DrawFn, shape: Sequence[int]) -> Tensor:
    """Bool masks, the all-alive and the all-masked ones among them.

    >>> masks((2, 3)).example().dtype
    torch.bool
    """
    count = int(torch.Size(shape).numel())
    entries = st.one_of(
        st.just([True] * count),
        st.just([False] * count),
        st.lists(st.booleans(), min_size=count, max_size=count),
    )
    return torch.tensor(draw(entries), dtype=torch.bool).reshape(tuple(shape))


@st.composite
def mask_sets(draw: st.DrawFn, model: nn.Module) -> Masks:
    """Mask sets that fit a model: some of its parameters, each with a mask.

    >>> layer = torch.nn.Linear(2, 1)
    >>> set(mask_sets(layer).example()) <= {"weight", "bias"}
    True
    """
    weights = named_weights(model)
    floating = [name for name, weight in weights.items() if weight.is_floating_point()]
    chosen = draw(st.lists(st.sampled_from(floating), unique=True)) if floating else []
    return {name: draw(masks(weights[name].shape)) for name in floating if name in chosen}


@st.composite
def models_with_groups(draw: st.DrawFn, *, pruned: bool | None = None) -> tuple[nn.Module, Groups]:
    """A small model and its groups: MLPs of several sizes, the first layer also split into heads.

    >>> model, groups = models_with_groups(pruned=True).example()
    >>> len(groups) > 0, len(torch_rsst.extract_mask(model)) > 0
    (True, True)

    Some weights are rounded, so that units tie.

    Args:
        draw: given by hypothesis.
        pruned: whether some parameters are masked already; None draws it.
    """
    width, head_dim, heads = (
        draw(st.integers(1, 4)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
    )
    hidden = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    model = nn.Sequential(
        nn.Linear(width, heads * head_dim),
        *(_mlp(heads * head_dim, size, bias=draw(st.booleans())) for size in hidden),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    tied = draw(st.booleans())
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values.mul(2).round().div(2) if tied else values)
    attention = head_layer("0.weight", rows=heads * head_dim, num_heads=heads, projections=1)
    groups = Groups((attention, *find_groups(model).layers))
    if draw(st.booleans()) if pruned is None else pruned:
        chosen = draw(mask_sets(model)) or {"0.weight": draw(masks((heads * head_dim, width)))}
        apply_mask(model, chosen)
    return model, groups


def _mlp(width: int, hidden: int, *, bias: bool) -> nn.Module:
    return nn.Sequential(
        nn.Linear(width, hidden, bias=bias), nn.GELU(), nn.Linear(hidden, width, bias=bias)
    )


def assert_mask_invariants(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> None:
    """Check everything that masking promises, whoever pruned the model.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> torch_rsst.apply_mask(layer, {"weight": torch.tensor([[True, False]])})
        >>> assert_mask_invariants(layer, {"weight": torch.tensor([[True, False]])})
        >>> layer.weight_mask[0, 0] = 0.5
        >>> assert_mask_invariants(layer)
        Traceback (most recent call last):
        AssertionError: 'weight' of Linear: its mask holds values other than 0 and 1

    For each masked parameter: the mask is 0/1, of the parameter's shape, dtype and device; the dense
    name is no parameter; there is exactly one pruning hook, and what it puts into ``weight`` before a
    forward pass is ``weight_orig`` where the mask is 1 and exactly 0 elsewhere. No hook is without a
    mask. The masks of the model and of its state dict are the same. The model is not changed.

    Args:
        model: dense or pruned, wrapped or not.
        masks: the masks that the model must have: these and no others.

    Raises:
        AssertionError: says which parameter breaks which promise.
    """
    modules = list(unwrap(model).modules())
    refs = masked_refs(modules)
    for ref in refs:
        _check_mask(ref)
        _check_hook(ref)
    known = {(id(ref.module), ref.name) for ref in refs}
    for module in modules:
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                _require(
                    (id(module), hook._tensor_name) in known,
                    f"'{hook._tensor_name}' of {type(module).__name__}",
                    "has a pruning hook but no mask",
                )
    # A mask with other values than 0 and 1 was found above: now the model's masks can be read.
    try:
        own, stored = extract_mask(model), extract_mask(model.state_dict())
    except ValueError as error:  # a tied parameter that is masked in some places only
        raise AssertionError(error) from error
    _same_masks(own, stored, "its state dict", "the model")
    if masks is not None:
        expected = as_masks(masks)
        _same_masks(expected, own, "the model", "what was expected")


def _require(holds: bool, subject: object, broken: str) -> None:
    # Raised, not asserted: pytest rewrites no module of ours, and `python -O` drops assertions.
    if not holds:
        raise AssertionError(f"{subject}: {broken}")


def _check_mask(ref: ParameterRef) -> None:
    mask, original = ref.mask, ref.original
    assert mask is not None, "masked_refs() lists masked refs"
    shape = f"its mask has shape {tuple(mask.shape)}, the parameter {tuple(original.shape)}"
    _require(mask.shape == original.shape, ref, shape)
    dtype = f"its mask has dtype {mask.dtype}, the parameter {original.dtype}"
    _require(mask.dtype == original.dtype, ref, dtype)
    device = f"its mask is on {mask.device}, the parameter on {original.device}"
    _require(mask.device == original.device, ref, device)
    binary = bool(((mask == 0) | (mask == 1)).all())
    _require(binary, ref, "its mask holds values other than 0 and 1")
    registered = ref.name in ref.module._parameters
    _require(not registered, ref, f"{ref.name!r} is a parameter beside {ref.name + ORIG!r}")


def _check_hook(ref: ParameterRef) -> None:
    hooks = [
        hook
        for hook in ref.module._forward_pre_hooks.values()
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == ref.name
    ]
    _require(len(hooks) == 1, ref, f"{len(hooks)} pruning hooks instead of one")
    mask = ref.mask
    assert mask is not None, "masked_refs() lists masked refs"
    # A stock hook's own product may be NaN where the live weight that the module reads is 0.
    stored = ref.name in vars(ref.module) or isinstance(hooks[0], (MaskHook, MaskContainer))
    with torch.no_grad():
        product = (
            hooks[0].apply_mask(ref.module)  # type: ignore[no-untyped-call] # stock has no types
            if stored
            else getattr(ref.module, ref.name)
        )
    expected = ref.original.detach().masked_fill(mask == 0, 0.0)
    equal = bool(((product == expected) | (product.isnan() & expected.isnan())).all())
    what = f"{ref.name!r} is not {ref.name + ORIG!r} where {ref.name + MASK!r} is 1 and 0 elsewhere"
    _require(equal, ref, what)


def _same_masks(
    expected: Mapping[str, Tensor], got: Mapping[str, Tensor], whose: str, than: str
) -> None:
    missing, surplus = sorted(expected.keys() - got.keys()), sorted(got.keys() - expected.keys())
    _require(not missing, whose, f"no mask for {missing}, unlike {than}")
    _require(not surplus, whose, f"a mask for {surplus}, unlike {than}")
    for name, mask in expected.items():
        equal = mask.shape == got[name].shape and bool(
            (mask.to(got[name].device) == got[name]).all()
        )
        _require(equal, whose, f"another mask of {name!r} than {than}")

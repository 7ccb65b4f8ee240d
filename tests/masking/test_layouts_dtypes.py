"""Every dtype and memory layout is masked exactly; what cannot be masked is refused and left alone."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import torch_rsst
from torch_rsst.testing import assert_mask_invariants

Fingerprint = Callable[[nn.Module], list[Any]]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


# Exact masks in every layout


def _contiguous() -> Tensor:
    return torch.empty(6, 4)


def _transposed() -> Tensor:
    return torch.empty(4, 6).t()


def _sliced() -> Tensor:
    return torch.empty(6, 8)[:, ::2]


def _channels_last() -> Tensor:
    return torch.empty(6, 3, 2, 2).to(memory_format=torch.channels_last)


def _channels_last_3d() -> Tensor:
    return torch.empty(6, 3, 2, 2, 2).to(memory_format=torch.channels_last_3d)


LAYOUTS = [_contiguous, _transposed, _sliced, _channels_last, _channels_last_3d]
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def holder(layout: Callable[[], Tensor], dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """A module whose parameter has the layout and few distinct values, so that many tie."""
    module = nn.Module()
    empty = layout()
    weight = torch.empty_strided(empty.shape, empty.stride(), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    weight.copy_(torch.randint(-9, 10, weight.shape, generator=generator) / 8)
    module.weight = nn.Parameter(weight)
    return module


def flat(tensor: Tensor) -> list[float]:
    return [float(value) for value in tensor.detach().reshape(-1)]


def alive(module: nn.Module) -> list[bool]:
    return [value == 1.0 for value in flat(module.weight_mask)]


def lowest(scores: list[float], count: int, among: list[bool]) -> set[int]:
    """The slow oracle: sort, ties by position."""
    ranked = sorted((score, i) for i, score in enumerate(scores) if among[i])
    return {i for _, i in ranked[:count]}


class Kept:
    """The parameter object, its layout and its memory must outlive every call."""

    def __init__(self, module: nn.Module) -> None:
        self.parameter = module.weight
        self.layout = (self.parameter.stride(), self.parameter.data_ptr(), self.parameter.dtype)

    def check(self, module: nn.Module) -> None:
        masked = hasattr(module, "weight_mask")
        parameter = module.weight_orig if masked else module.weight
        assert parameter is self.parameter
        assert (parameter.stride(), parameter.data_ptr(), parameter.dtype) == self.layout
        if masked:
            assert module.weight_mask.dtype == parameter.dtype
            assert module.weight.dtype == parameter.dtype
            dense_in_memory = torch.empty_like(parameter).stride() == parameter.stride()
            assert module.weight.stride() == parameter.stride() or not dense_in_memory
        assert_mask_invariants(module)


@every_dtype
@every_layout
def test_ranking_is_exact_and_keeps_the_layout(
    layout: Callable[[], Tensor], dtype: torch.dtype
) -> None:
    modules = [holder(layout, dtype), holder(_contiguous, torch.float32, seed=1)]
    kept = [Kept(module) for module in modules]
    scores = [abs(value) for module in modules for value in flat(module.weight)]
    expected = [True] * len(scores)
    for amount in (7, 5):
        pairs = [(module, "weight") for module in modules]
        torch_rsst.global_unstructured(pairs, torch_rsst.GlobalL1, amount=amount)
        gone = lowest(scores, amount, among=expected)
        expected = [value and i not in gone for i, value in enumerate(expected)]
        assert alive(modules[0]) + alive(modules[1]) == expected
        for module, before in zip(modules, kept, strict=True):
            before.check(module)


@every_dtype
@every_layout
@pytest.mark.parametrize("mask_layout", ["contiguous", "reversed"])
def test_masks_of_any_layout_are_applied_extracted_and_removed_exactly(
    layout: Callable[[], Tensor], dtype: torch.dtype, mask_layout: str
) -> None:
    module = holder(layout, dtype)
    kept, values = Kept(module), module.weight.detach().clone()
    mask = torch.arange(values.numel()).reshape(values.shape) % 3 != 0
    given = mask
    if mask_layout == "reversed":
        order = tuple(reversed(range(mask.ndim)))
        given = mask.permute(order).contiguous().permute(order)
    for now in (given, ~given, given):
        torch_rsst.apply_mask(module, {"weight": now})
        kept.check(module)
        assert torch.equal(torch_rsst.extract_mask(module)["weight"], now)
        assert torch.equal(torch_rsst.extract_mask(module.state_dict())["weight"], now)
        assert torch.equal(module.weight, values.masked_fill(~now, 0.0))
        assert torch.equal(module.weight_orig, values)
    torch_rsst.remove_all(module, freeze_zeros=False)
    kept.check(module)
    assert torch.equal(module.weight, values.masked_fill(~mask, 0.0))


@every_dtype
@every_layout
@pytest.mark.parametrize("policy", ["latent", "snapshot", "zero"])
def test_fillback_gives_back_exactly_and_keeps_the_layout(
    layout: Callable[[], Tensor], dtype: torch.dtype, policy: Any
) -> None:
    module = holder(layout, dtype)
    kept, values = Kept(module), flat(module.weight)
    snapshot = {"weight": torch.full(module.weight.shape, 3.0)} if policy == "snapshot" else None
    mask = [i % 3 == 0 for i in range(len(values))]
    torch_rsst.apply_mask(module, {"weight": torch.tensor(mask).reshape(module.weight.shape)})
    masked = [not value for value in mask]
    back = lowest([-abs(value) for value in values], 5, among=masked)
    torch_rsst.fillback(module, "weight", 5, policy=policy, snapshot=snapshot)
    kept.check(module)
    assert alive(module) == [value or i in back for i, value in enumerate(mask)]
    returned = {"latent": None, "snapshot": 3.0, "zero": 0.0}[policy]
    for i, value in enumerate(flat(module.weight_orig)):
        assert value == (values[i] if returned is None or i not in back else returned)


@every_dtype
@every_layout
def test_heads_are_cut_exactly_and_keep_the_layout(
    layout: Callable[[], Tensor], dtype: torch.dtype
) -> None:
    module = holder(layout, dtype)
    kept = Kept(module)
    rows = [sum(abs(value) for value in flat(row)) for row in module.weight]
    heads = [sum(rows[2 * head : 2 * head + 2]) for head in range(3)]
    best = max(range(3), key=heads.__getitem__)
    with torch.no_grad():  # so far ahead that every norm agrees
        module.weight[2 * best : 2 * best + 2] *= 16
    torch_rsst.head_structured(module, "weight", 2, 3, projections=1)
    kept.check(module)
    size = module.weight[0].numel()
    assert alive(module) == [row // 2 == best for row in range(6) for _ in range(size)]


@every_dtype
def test_training_in_every_dtype_leaves_masked_gradients_zero(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 2)).to(dtype)
    model.to(memory_format=torch.channels_last)
    pairs = [(model[0], "weight"), (model[2], "weight")]
    torch_rsst.global_unstructured(pairs, torch_rsst.GlobalL1, amount=0.5)
    model(torch.ones(2, 2, 3, 3, dtype=dtype)).square().sum().backward()
    for module, _ in pairs:
        assert module.weight_orig.grad.dtype == dtype
        assert bool((module.weight_orig.grad[module.weight_mask == 0] == 0).all())
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_change_of_dtype_or_memory_format_after_pruning_keeps_the_mask() -> None:
    module = nn.Conv2d(2, 3, 2)
    torch_rsst.global_unstructured([(module, "weight")], torch_rsst.GlobalL1, amount=0.5)
    masks = torch_rsst.extract_mask(module)
    for change in (torch.bfloat16, torch.float64, torch.float32):
        module.to(change)
        assert_mask_invariants(module, masks)
    module.to(memory_format=torch.channels_last)
    assert module.weight.is_contiguous(memory_format=torch.channels_last)
    assert_mask_invariants(module, masks)


# What cannot be masked


def _rank(module: nn.Module, name: str) -> None:
    torch_rsst.global_unstructured([(module, name)], torch_rsst.GlobalL1, amount=1)


def _apply(module: nn.Module, name: str) -> None:
    parameter = dict(module.named_parameters()).get(name)
    known = parameter is not None and not isinstance(parameter, nn.UninitializedParameter)
    shape = parameter.shape if parameter is not None and known else (4, 4)
    torch_rsst.apply_mask(module, {name: torch.ones(shape)})


def _heads(module: nn.Module, name: str) -> None:
    torch_rsst.head_structured(module, name, 1, 2, projections=1)


def _fill(module: nn.Module, name: str) -> None:
    torch_rsst.fillback(module, name, 1)


CALLS = [_rank, _apply, _heads, _fill]
every_call = pytest.mark.parametrize("call", CALLS)


def _normed() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(4, 4))


def _of(tensor: Tensor) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module = nn.Module()
        module.weight = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        return module

    return make


def _masked() -> nn.Module:
    module = nn.Linear(4, 4)
    torch_rsst.apply_mask(module, {"weight": torch.eye(4)})
    return module


FLOAT8 = [
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
]
REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "weight of the old weight_norm": (_normed, "weight", "'weight'.*'weight_g', 'weight_v'"),
    "weight of the old spectral_norm": (
        lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
        "weight",
        "'weight'.*'weight_orig'",
    ),
    "weight of the new weight_norm": (
        lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
        "weight",
        "'weight'.*(remove_parametrizations|'parametrizations.weight.original0')",
    ),
    "weight of the new spectral_norm": (
        lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
        "weight",
        "'weight'.*(remove_parametrizations|'parametrizations.weight.original')",
    ),
    "lazy weight": (
        lambda: nn.LazyLinear(4),
        "weight",
        "'weight' of LazyLinear: expected an initialized parameter, got a lazy one. Run one forward",
    ),
    "weight_orig of a masked weight": (_masked, "weight_orig", "'weight_orig'.*'weight'"),
    **{
        str(dtype): (
            _of(torch.ones(4, 4).to(dtype)),
            "weight",
            f"parameter 'weight' of Module: expected one of .*, got {dtype}. Cast it first",
        )
        for dtype in [*FLOAT8, torch.int8, torch.int64, torch.bool, torch.complex64]
    },
    "entries that share memory": (
        _of(torch.arange(1.0, 5.0).expand(4, 4)),
        "weight",
        "parameter 'weight' of Module: expected .*, got .*expanded",
    ),
    "sparse weight": (
        _of(torch.eye(4).to_sparse()),
        "weight",
        "parameter 'weight' of Module: expected .*, got .*sparse",
    ),
}


def untouched(module: nn.Module, fingerprint: Fingerprint) -> Any:
    """Sparse tensors have no bits to look at: their values are compared."""
    weight = module._parameters.get("weight")
    if weight is None or weight.layout == torch.strided:
        return fingerprint(module)
    return id(weight), weight.to_dense().tolist(), sorted(vars(module)), sorted(module._buffers)


@every_call
@pytest.mark.parametrize(("make", "name", "text"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_masked_is_refused_by_name_and_left_bit_identical(
    make: Callable[[], nn.Module],
    name: str,
    text: str,
    call: Callable[[nn.Module, str], None],
    fingerprint: Fingerprint,
) -> None:
    module = make()
    before, cls = untouched(module, fingerprint), type(module)
    with pytest.raises((ValueError, KeyError), match=text):
        call(module, name)
    assert untouched(module, fingerprint) == before
    assert type(module) is cls


def _rank_all(model: nn.Sequential) -> None:
    pairs = [(module, "weight") for module in model]
    torch_rsst.global_unstructured(pairs, torch_rsst.GlobalL1, amount=1)


def _apply_all(model: nn.Sequential) -> None:
    torch_rsst.apply_mask(model, {f"{i}.weight": torch.zeros(4, 4) for i in range(3)})


@pytest.mark.parametrize("call", [_rank_all, _apply_all])
def test_a_refused_parameter_leaves_the_others_alone(
    call: Callable[[nn.Sequential], None], fingerprint: Fingerprint
) -> None:
    model = nn.Sequential(_masked(), nn.Linear(4, 4), nn.LazyLinear(4))
    before = fingerprint(model)
    with pytest.raises(ValueError, match="got a lazy one"):
        call(model)
    assert fingerprint(model) == before
    assert model[2](model[0](torch.ones(1, 4))).shape == (1, 4)


def test_a_lazy_module_is_pruned_after_its_first_forward_pass() -> None:
    module = nn.LazyLinear(3)
    module(torch.ones(1, 4))
    _rank(module, "weight")
    assert int((module.weight_mask == 0).sum()) == 1
    assert_mask_invariants(module)


# Reparametrized modules


def trained_gradients(module: nn.Module) -> dict[str, Tensor]:
    module(torch.ones(2, 4)).square().sum().backward()
    return {k: p.grad for k, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("make", "name", "seen"),
    [
        (_normed, "weight_v", lambda m, v: v * m.weight_g / v.norm(dim=1, keepdim=True)),
        (_normed, "weight_g", lambda m, g: m.weight_v * g / m.weight_v.norm(dim=1, keepdim=True)),
    ],
)
def test_the_parts_of_a_weight_norm_are_masked_and_the_forward_pass_uses_them(
    make: Callable[[], nn.Module], name: str, seen: Any
) -> None:
    module = make()
    part = getattr(module, name).detach().clone()
    mask = torch.arange(part.numel()).reshape(part.shape) % 4 != 1
    torch_rsst.apply_mask(module, {name: mask})
    x = torch.ones(2, 4)
    for _ in range(2):
        expected = nn.functional.linear(x, seen(module, part.masked_fill(~mask, 0.0)), module.bias)
        torch.testing.assert_close(module(x), expected)
        mask = mask.roll(1, 0)
        torch_rsst.apply_mask(module, {name: mask})
    gradient = trained_gradients(module)[f"{name}_orig"]
    assert bool((gradient[~mask] == 0).all())
    assert bool((gradient[mask] != 0).any())
    torch_rsst.remove_all(module, freeze_zeros=False)
    expected = module(x)
    nn.utils.remove_weight_norm(module)
    torch.testing.assert_close(module(x), expected)


def test_the_original_of_a_spectral_norm_is_masked_and_the_forward_pass_uses_it() -> None:
    module = nn.utils.spectral_norm(nn.Linear(4, 4)).eval()
    mask = torch.eye(4, dtype=torch.bool)
    torch_rsst.apply_mask(module, {"weight_orig": mask})
    module(torch.ones(2, 4))
    assert bool((module.weight[~mask] == 0).all())
    assert bool((module.weight[mask] != 0).all())
    gradient = trained_gradients(module)["weight_orig_orig"]
    assert bool((gradient[~mask] == 0).all())
    assert list(torch_rsst.extract_mask(module)) == ["weight_orig"]


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def _parametrized(pruned_first: bool) -> tuple[nn.Module, Tensor]:
    """A module with a masked weight and a parametrized bias, and what its weight must be."""
    module = nn.Linear(4, 4)
    expected = module.weight.detach() * torch.eye(4)
    if pruned_first:
        torch_rsst.apply_mask(module, {"weight": torch.eye(4)})
    parametrize.register_parametrization(module, "bias", Doubled())
    if not pruned_first:
        torch_rsst.apply_mask(module, {"weight": torch.eye(4)})
    return module, expected


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("pruned_first", [True, False])
@pytest.mark.parametrize("order", ["parametrization first", "mask first"])
def test_masks_and_parametrizations_of_one_module_come_and_go_in_any_order(
    pruned_first: bool, again: bool, order: str
) -> None:
    module, weight = _parametrized(pruned_first)
    if again:
        torch_rsst.apply_mask(module, {"weight": torch.ones(4, 4)})
        torch_rsst.apply_mask(module, {"weight": torch.eye(4)})
    x = torch.ones(2, 4)

    def check() -> None:
        assert torch.equal(module.weight, weight)
        torch.testing.assert_close(module(x), nn.functional.linear(x, weight, module.bias))

    check()
    bias = module.bias.detach().clone()
    if order == "mask first":
        torch_rsst.remove_all(module, freeze_zeros=False)
        check()
        parametrize.remove_parametrizations(module, "bias")
    else:
        parametrize.remove_parametrizations(module, "bias")
        check()
        assert_mask_invariants(module, {"weight": torch.eye(4)})
        torch_rsst.remove_all(module, freeze_zeros=False)
    check()
    assert torch.equal(module.bias, bias)
    assert isinstance(module.weight, nn.Parameter)


def test_a_copy_of_a_parametrized_module_is_masked_by_itself() -> None:
    module = nn.Linear(4, 4)
    parametrize.register_parametrization(module, "bias", Doubled())
    twin = copy.deepcopy(module)
    torch_rsst.apply_mask(module, {"weight": torch.eye(4)})
    both = copy.deepcopy(module)
    torch_rsst.remove_all(both, freeze_zeros=False)
    assert_mask_invariants(module, {"weight": torch.eye(4)})
    assert isinstance(twin.weight, nn.Parameter)
    parametrize.remove_parametrizations(twin, "bias")
    assert type(twin) is nn.Linear
    x = torch.ones(2, 4)
    torch.testing.assert_close(both(x), module(x))
    assert torch.equal(module.weight, twin.weight * torch.eye(4))


def test_the_parts_of_a_new_weight_norm_are_masked_and_the_forward_pass_uses_them() -> None:
    module = parametrizations.weight_norm(nn.Linear(4, 4))
    name = "parametrizations.weight.original1"
    mask = torch.eye(4, dtype=torch.bool)
    torch_rsst.apply_mask(module, {name: mask})
    assert bool((module.weight[~mask] == 0).all())
    gradient = trained_gradients(module)[f"{name}_orig"]
    assert bool((gradient[~mask] == 0).all())
    assert list(torch_rsst.extract_mask(module)) == [name]


# Meta tensors: no values to rank


def _on_meta() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4, device="meta"), nn.Linear(4, 2, device="meta"))


def _shell(model: nn.Module) -> list[Any]:
    return [
        (type(m), [(k, id(p)) for k, p in m._parameters.items()], list(m._buffers), sorted(vars(m)))
        for m in model.modules()
    ]


def test_a_meta_model_is_masked_and_takes_the_weights_and_masks_of_a_checkpoint() -> None:
    real = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    torch_rsst.apply_mask(real, {"0.weight": torch.eye(4), "1.bias": torch.tensor([0, 1])})
    model = _on_meta()
    for _ in range(2):  # the second time its masks have no values that could be read
        torch_rsst.prepare_from_state_dict(model, real.state_dict())
    torch_rsst.apply_mask(model, torch_rsst.extract_mask(real), strict=True)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.load_state_dict(real.state_dict(), assign=True)
    x = torch.ones(2, 4)
    assert torch.equal(model(x), real(x))
    assert_mask_invariants(model, torch_rsst.extract_mask(real))
    torch_rsst.global_unstructured([(model[0], "weight")], torch_rsst.GlobalL1, amount=1)
    gradient = trained_gradients(model)["0.weight_orig"]
    assert bool((gradient[model[0].weight_mask == 0] == 0).all())


def test_a_masked_meta_model_is_materialized_empty() -> None:
    model = _on_meta()
    torch_rsst.apply_mask(model, {"0.weight": torch.eye(4)})
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    torch_rsst.apply_mask(model, {"0.weight": torch.eye(4)})
    assert torch.equal(model[0].weight, torch.eye(4))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "call",
    [
        lambda m: torch_rsst.global_unstructured(
            [(m[0], "weight"), (m[1], "weight")], torch_rsst.GlobalL1, amount=2
        ),
        lambda m: torch_rsst.global_unstructured(
            [(m[0], "weight")], torch_rsst.L1Unstructured, amount=2
        ),
        lambda m: torch_rsst.GlobalL1.apply(m[0], "weight", 2),
        lambda m: _heads(m[0], "weight"),
    ],
)
def test_ranking_what_has_no_values_is_an_error_that_says_so(
    call: Callable[[nn.Module], None], masked: bool
) -> None:
    model = _on_meta()
    if masked:
        torch_rsst.apply_mask(model, {"0.weight": torch.eye(4)})
    before = _shell(model)
    text = "parameter 'weight' of Linear: expected values, got a parameter on the meta device"
    with pytest.raises(ValueError, match=text):
        call(model)
    assert _shell(model) == before


@pytest.mark.parametrize(
    "call",
    [
        lambda m: _fill(m[0], "weight"),
        lambda m: torch_rsst.fillback(m[0], "weight", 1, torch.ones(4, 4)),
        lambda m: torch_rsst.global_unstructured(
            [(m[0], "weight")],
            torch_rsst.GlobalL1,
            {(m[0], "weight"): torch.ones(4, 4)},
            amount=2,
        ),
        torch_rsst.extract_mask,
        lambda m: torch_rsst.extract_mask(m.state_dict()),
    ],
)
def test_reading_a_mask_that_has_no_values_is_an_error_that_says_so(
    call: Callable[[nn.Module], Any],
) -> None:
    model = _on_meta()
    torch_rsst.apply_mask(model, {"0.weight": torch.eye(4)})
    before = _shell(model)
    with pytest.raises(ValueError, match=r"weight.*expected values, got .* on the meta device"):
        call(model)
    assert _shell(model) == before

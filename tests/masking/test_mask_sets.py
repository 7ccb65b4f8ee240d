"""Mask sets: what is extracted is what was applied, under every name a model goes by."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as stock

import torch_rsst
from torch_rsst import apply_mask, extract_mask, penalty_mask, prepare_from_state_dict, remove_all
from torch_rsst.masking.mask_sets import ModelMasks, check_masks, mask_of
from torch_rsst.masking.names import named_weights, unwrap, without_wrappers
from torch_rsst.testing import assert_mask_invariants, mask_sets, models_with_groups

Fingerprint = Callable[[nn.Module], list[Any]]
T, F = True, False


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3))


def compiled(model: nn.Module) -> nn.Module:
    # Only the wrapper is wanted; nothing is run, so nothing is compiled.
    return torch.compile(model)  # type: ignore[return-value]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@given(models_with_groups(pruned=False), st.data())
def test_what_was_applied_is_extracted(drawn: tuple[nn.Module, Any], data: st.DataObject) -> None:
    model, _ = drawn
    masks = data.draw(mask_sets(model))
    apply_mask(model, masks)
    assert same(extract_mask(model), masks)
    assert same(extract_mask(model.state_dict()), masks)
    assert_mask_invariants(model, masks)


@given(models_with_groups(pruned=True), st.data())
def test_masks_are_set_exactly_and_come_back(
    drawn: tuple[nn.Module, Any], data: st.DataObject
) -> None:
    model, _ = drawn
    before, latents = extract_mask(model), named_weights(model)
    latents = {name: weight.clone() for name, weight in latents.items()}
    masks = data.draw(mask_sets(model))
    apply_mask(model, masks)
    assert same(extract_mask(model), before | masks)
    apply_mask(model, {name: torch.ones_like(mask) for name, mask in extract_mask(model).items()})
    assert same(named_weights(model), latents)


def test_extracted_masks_are_new_memory() -> None:
    model = net()
    apply_mask(model, {"0.weight": torch.eye(2, 3)})
    extract_mask(model)["0.weight"].fill_(True)
    assert model[0].weight_mask.sum() == 2


def test_applied_masks_are_copied() -> None:
    model, mask = net(), torch.eye(2, 3)
    apply_mask(model, {"0.weight": mask})
    mask.fill_(0.0)
    assert model[0].weight_mask.sum() == 2


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16])
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    model = net()
    apply_mask(model, {"0.weight": torch.eye(2, 3).to(dtype)})
    assert extract_mask(model)["0.weight"].dtype == torch.bool
    assert model[0].weight_mask.dtype == torch.float32


def test_a_layer_itself_is_keyed_by_the_bare_name() -> None:
    layer = nn.Linear(2, 1)
    apply_mask(layer, {"weight": torch.tensor([[T, F]])})
    assert list(extract_mask(layer)) == ["weight"]


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, compiled, lambda m: compiled(nn.DataParallel(m))]
)
def test_wrappers_around_the_model_do_not_show(wrap: Callable[[nn.Module], nn.Module]) -> None:
    masks = {"0.weight": torch.eye(2, 3, dtype=torch.bool)}
    model = net()
    wrapped = wrap(model)
    apply_mask(wrapped, masks)
    assert unwrap(wrapped) is model
    assert same(extract_mask(wrapped), masks)
    assert same(extract_mask(wrapped.state_dict()), masks)
    assert same(extract_mask(model), masks)
    assert_mask_invariants(wrapped, masks)
    prefix = next(iter(wrapped.state_dict())).removesuffix("0.weight_orig")
    assert prefix
    fresh = net()
    apply_mask(fresh, {f"{prefix}{name}": mask for name, mask in masks.items()})
    assert same(extract_mask(fresh), masks)


def test_compiled_parts_do_not_show() -> None:
    model = nn.Sequential(net(), net())
    model[1] = compiled(model[1])
    masks = {"1.0.weight": torch.eye(2, 3, dtype=torch.bool)}
    apply_mask(model, masks)
    assert same(extract_mask(model), masks)
    assert same(extract_mask(model.state_dict()), masks)


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("_orig_mod.fc.weight", "fc.weight"),
        ("blocks.0._orig_mod.fc.weight", "blocks.0.fc.weight"),
        ("blocks.0._fsdp_wrapped_module.fc", "blocks.0.fc"),
        ("mlp._orig_mod", "mlp"),
        ("module.fc", "module.fc"),
    ],
)
def test_names_without_wrappers(name: str, bare: str) -> None:
    assert without_wrappers(name) == bare


def test_a_child_called_module_is_no_wrapper() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 1, bias=False)

    holder, fresh = Holder(), Holder()
    apply_mask(holder, {"module.weight": torch.tensor([[T, F]])})
    assert list(extract_mask(holder)) == ["module.weight"]
    prepare_from_state_dict(fresh, holder.state_dict())
    fresh.load_state_dict(holder.state_dict())
    assert same(extract_mask(fresh), extract_mask(holder))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(3, 2), nn.Linear(2, 3, bias=False)
        self.head.weight = self.embed.weight


def test_a_tied_tensor_appears_once_under_its_first_name() -> None:
    model, mask = Tied(), torch.eye(3, 2, dtype=torch.bool)
    apply_mask(model, {"embed.weight": mask})
    assert same(extract_mask(model), {"embed.weight": mask})
    assert same(extract_mask(model.state_dict()), {"embed.weight": mask})
    assert model.head.weight_orig is model.embed.weight_orig
    assert_mask_invariants(model)


def test_a_tied_tensor_that_stock_masked_in_one_place() -> None:
    model = Tied()
    stock.l1_unstructured(model.head, "weight", 2)
    for given_ in (model, model.state_dict()):
        with pytest.raises(ValueError, match=r"'embed\.weight': expected one mask for all that"):
            extract_mask(given_)
    torch_rsst.refresh(model)
    assert list(extract_mask(model)) == list(extract_mask(model.state_dict())) == ["embed.weight"]


def test_equal_tensors_that_are_not_tied_appear_each() -> None:
    model = net()
    masks = {"0.weight": torch.eye(2, 3, dtype=torch.bool), "2.weight": torch.zeros(3, 2) != 0}
    apply_mask(model, masks)
    state = {name: value.to("meta") for name, value in model.state_dict().items()}
    state |= {name: model.state_dict()[name] for name in state if name.endswith("_mask")}
    assert same(extract_mask(state), masks)


def test_a_key_needs_both_orig_and_mask() -> None:
    state = {
        "a.weight_orig": torch.ones(2),
        "b.weight_mask": torch.ones(2),
        "attn_mask": torch.ones(2),
        "c.weight_orig": torch.ones(2),
        "c.weight_mask": torch.tensor([1.0, 0.0]),
        "extra_state": "text",
    }
    assert same(extract_mask(state), {"c.weight": torch.tensor([T, F])})
    assert extract_mask({}) == {}


@pytest.mark.parametrize("given_", [None, 3, [torch.ones(1)], "model"])
def test_masks_come_from_models_and_state_dicts(given_: object) -> None:
    with pytest.raises(TypeError, match="a model or state dict"):
        extract_mask(given_)


def test_state_dicts_of_pruned_models_load_strictly() -> None:
    pruned, fresh = net(), net()
    apply_mask(pruned, {"0.weight": torch.eye(2, 3), "2.bias": torch.tensor([1, 0, 1])})
    file = io.BytesIO()
    torch.save(pruned.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert prepare_from_state_dict(fresh, state) is fresh
    fresh.load_state_dict(state, strict=True)
    fresh(torch.ones(1, 3))
    assert_mask_invariants(fresh, extract_mask(pruned))
    assert same(named_weights(fresh), named_weights(pruned))


def test_strict_wants_every_masked_parameter() -> None:
    model = net()
    apply_mask(model, {"0.weight": torch.eye(2, 3)})
    with pytest.raises(KeyError, match=r"every masked parameter, got none for '0.weight'"):
        apply_mask(model, {"2.weight": torch.eye(3, 2)}, strict=True)
    apply_mask(model, {"2.weight": torch.eye(3, 2), "0.weight": torch.eye(2, 3)}, strict=True)
    assert set(extract_mask(model)) == {"0.weight", "2.weight"}


@pytest.mark.parametrize(
    ("masks", "error", "text"),
    [
        ({"0.weigth": torch.eye(2, 3)}, KeyError, "'0.weigth'.*Did you mean '0.weight'"),
        ({"0.weight_orig": torch.eye(2, 3)}, KeyError, "no such name"),
        ({"0.weight": torch.eye(3, 2)}, ValueError, r"shape \(2, 3\), got shape \(3, 2\)"),
        ({"0.weight": torch.ones(1)}, ValueError, r"got shape \(1,\)"),
        ({"0.weight": torch.full((2, 3), 0.5)}, ValueError, "zeros and ones, got other values"),
        ({"0.weight": torch.full((2, 3), -1)}, ValueError, "zeros and ones"),
        ({"0.weight": torch.full((2, 3), float("nan"))}, ValueError, "zeros and ones"),
        ({"0.weight": [[1, 0, 1]] * 2}, TypeError, "a tensor, got list"),
        ({3: torch.eye(2, 3)}, TypeError, "a mask set, got the name 3"),
        ([torch.eye(2, 3)], TypeError, "a mask set, got list"),
        (None, TypeError, "a mask set, got NoneType"),
    ],
)
@pytest.mark.parametrize("pruned", [False, True])
def test_bad_masks_change_nothing(
    masks: Any, error: type[Exception], text: str, pruned: bool, fingerprint: Fingerprint
) -> None:
    model = net()
    if pruned:
        apply_mask(model, {"0.weight": torch.eye(2, 3)})
    if isinstance(masks, dict):
        masks = {"2.weight": torch.zeros(3, 2), **masks}
    before = fingerprint(model)
    with pytest.raises(error, match=text):
        apply_mask(model, masks)
    assert fingerprint(model) == before


@pytest.mark.parametrize("function", [remove_all, lambda m: apply_mask(m, {})])
def test_only_modules_are_masked(function: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="model: expected a module, got dict"):
        function({})


def test_remove_all_is_permanent_and_repeatable() -> None:
    model = net()
    identities = [id(p) for p in model.parameters()]
    stock.l1_unstructured(model[0], "weight", 2)
    apply_mask(model, {"2.weight": torch.eye(3, 2)})
    assert remove_all(model, freeze_zeros=False) is model
    assert sorted(id(p) for p in model.parameters()) == sorted(identities)
    assert not torch_rsst.is_pruned(model)
    assert (model[2].weight != 0).int().tolist() == [[1, 0], [0, 1], [0, 0]]
    assert int((model[0].weight == 0).sum()) == 2
    assert remove_all(model, freeze_zeros=False) is model


@pytest.mark.parametrize(
    ("current", "refill", "penalized"),
    [
        ([T, T, F, F], [T, F, T, F], [F, T, F, F]),
        ([T, T, T, T], [F, F, F, F], [T, T, T, T]),
        ([F, F, F, F], [F, F, F, F], [F, F, F, F]),
        ([T, T, T, T], [T, T, T, T], [F, F, F, F]),
    ],
)
def test_penalized_is_alive_now_and_meant_to_go(
    current: list[bool], refill: list[bool], penalized: list[bool]
) -> None:
    found = penalty_mask({"w": torch.tensor(current)}, {"w": torch.tensor(refill)})
    assert found["w"].tolist() == penalized


def test_keys_on_one_side_only() -> None:
    current, refill = {"only_current": torch.tensor([T])}, {"only_refill": torch.tensor([T, F])}
    found = penalty_mask(current, refill)
    assert list(found) == ["only_refill"]
    assert found["only_refill"].tolist() == [F, T]


def test_penalty_mask_is_pure() -> None:
    current, refill = {"w": torch.tensor([T, T])}, {"w": torch.tensor([F, F])}
    penalty_mask(current, refill)["w"].fill_(False)
    assert current["w"].tolist() == [T, T]
    assert refill["w"].tolist() == [F, F]


@pytest.mark.parametrize(
    ("current", "refill", "error", "text"),
    [
        ({"w": torch.ones(2)}, {"w": torch.ones(3)}, ValueError, r"current mask's shape \(2,\)"),
        ({"w": torch.ones(2)}, {"w": torch.full((2,), 0.5)}, ValueError, "zeros and ones"),
        ({"w": torch.full((2,), 2)}, {"w": torch.ones(2)}, ValueError, "zeros and ones"),
        ({"w": [1]}, {"w": torch.ones(1)}, TypeError, "a tensor, got list"),
        (None, {"w": torch.ones(1)}, TypeError, "a mask set, got NoneType"),
        ({}, 3, TypeError, "a mask set, got int"),
    ],
)
def test_masks_that_do_not_fit(
    current: Any, refill: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        penalty_mask(current, refill)


@given(models_with_groups())
def test_the_invariants_hold_for_drawn_models(drawn: tuple[nn.Module, Any]) -> None:
    assert_mask_invariants(drawn[0])


def _double_hook(layer: nn.Linear) -> None:
    layer.register_forward_pre_hook(next(iter(layer._forward_pre_hooks.values())))


def _no_hook(layer: nn.Linear) -> None:
    layer._forward_pre_hooks.clear()


def _gray(layer: nn.Linear) -> None:
    layer.weight_mask[0, 0] = 0.5


def _wrong_dtype(layer: nn.Linear) -> None:
    layer.weight_mask = layer.weight_mask.double()


def _wrong_shape(layer: nn.Linear) -> None:
    layer.weight_mask = layer.weight_mask[:, :1]


def _second_parameter(layer: nn.Linear) -> None:
    layer._parameters["weight"] = nn.Parameter(torch.ones(1, 2))


def _hook_without_mask(layer: nn.Linear) -> None:
    del layer._buffers["weight_mask"]


def _another_product(layer: nn.Linear) -> None:
    (hook,) = layer._forward_pre_hooks.values()
    hook.apply_mask = lambda module: module.weight_orig + 1


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (_double_hook, "2 pruning hooks instead of one"),
        (_no_hook, "0 pruning hooks"),
        (_gray, "values other than 0 and 1"),
        (_wrong_dtype, "dtype torch.float64"),
        (_wrong_shape, r"shape \(1, 1\)"),
        (_second_parameter, "is a parameter beside"),
        (_hook_without_mask, "has a pruning hook but no mask"),
        (_another_product, "is not 'weight_orig' where"),
    ],
)
def test_broken_invariants_are_told_apart(spoil: Callable[[nn.Linear], None], text: str) -> None:
    layer = nn.Linear(2, 1)
    apply_mask(layer, {"weight": torch.tensor([[T, F]])})
    spoil(layer)
    with pytest.raises(AssertionError, match=text):
        assert_mask_invariants(layer)


@pytest.mark.parametrize(
    ("masks", "text"),
    [
        ({}, "a mask for"),
        ({"weight": [[T, T]]}, "another mask of 'weight'"),
        ({"weight": [[T, F]], "bias": [T]}, "no mask for"),
    ],
)
def test_invariants_compare_with_a_mask_set(masks: dict[str, Any], text: str) -> None:
    layer = nn.Linear(2, 1)
    apply_mask(layer, {"weight": torch.tensor([[T, F]])})
    with pytest.raises(AssertionError, match=text):
        assert_mask_invariants(layer, {k: torch.tensor(v) for k, v in masks.items()})


def test_the_invariants_leave_the_model_alone(fingerprint: Fingerprint) -> None:
    model = net()
    apply_mask(model, {"0.weight": torch.eye(2, 3)})
    with torch.no_grad():
        model[0].weight_orig.add_(1.0)  # the product is stale now: the check must not refresh it
    before = fingerprint(model)
    assert_mask_invariants(model)
    assert fingerprint(model) == before


def test_a_checkpoint_is_no_state_dict() -> None:
    checkpoint = {"epoch": 3, "model": net().state_dict()}
    with pytest.raises(
        ValueError,
        match=r"got none in 'epoch', 'model'\. Pass the model's own, such as checkpoint\['model'\]",
    ):
        extract_mask(checkpoint)


def test_a_name_that_was_probably_meant_is_suggested() -> None:
    for wrong in ("0.weigth", "0.weight_orig"):
        with pytest.raises(KeyError, match=r"Did you mean '0\.weight'\?"):
            apply_mask(net(), {wrong: torch.ones(2, 3)})


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (
            lambda: apply_mask(_masked(), {}, strict=True),
            "masks: expected every masked parameter, got none for '0.weight'. Add them, or pass "
            "strict=False to leave them as they are.",
        ),
        (
            lambda: apply_mask(net(), {"head": torch.ones(1)}),
            "mask 'head': expected a parameter of the model, got no such name. It has '0.weight', "
            "'0.bias', '2.weight', '2.bias'.",
        ),
        (
            lambda: apply_mask(net(), {"0.weight": torch.ones(3, 2)}),
            "mask of '0.weight': expected the parameter's shape (2, 3), got shape (3, 2). Masks are "
            "made for one architecture; extract them from the same one.",
        ),
        (
            lambda: apply_mask(net(), {"0.weight": torch.full((2, 3), 0.5)}),
            "mask of '0.weight': expected zeros and ones, got other values. Compare with a threshold "
            "first: mask > 0.5.",
        ),
        (
            lambda: apply_mask(net(), {"0.weight": [1]}),  # type: ignore[dict-item]
            "mask of '0.weight': expected a tensor, got list. A mask set maps parameter names to "
            "tensors.",
        ),
        (
            lambda: apply_mask(net(), {"0.weight": torch.ones(2, 3, device="meta")}),
            "mask of '0.weight': expected values, got a mask on the meta device. Materialize the "
            "model first.",
        ),
        (
            lambda: apply_mask(net(), {3: torch.ones(2, 3)}),  # type: ignore[dict-item]
            "masks: expected a mask set, got the name 3. A mask set maps parameter names to tensors.",
        ),
        (
            lambda: apply_mask(net(), [3]),  # type: ignore[arg-type]
            "masks: expected a mask set, got list. A mask set maps parameter names to tensors.",
        ),
        (
            lambda: extract_mask([3]),  # type: ignore[arg-type]
            "extract_mask: expected a model or state dict, got list. Pass the model or "
            "model.state_dict().",
        ),
        (
            lambda: extract_mask({3: torch.ones(1)}),  # type: ignore[dict-item]
            "extract_mask: expected a model or state dict, got dict. Pass the model or "
            "model.state_dict().",
        ),
        (
            lambda: extract_mask({"epoch": 1}),  # type: ignore[dict-item]
            "state dict: expected tensors, got none in 'epoch'. Pass model.state_dict().",
        ),
        (
            lambda: penalty_mask({"w": torch.ones(2)}, {"w": torch.ones(3)}),
            "refill mask of 'w': expected the current mask's shape (2,), got shape (3,). Both masks "
            "must come from the same model.",
        ),
        (
            lambda: check_masks({"w": torch.ones(2)}, {"v": torch.ones(2)}),
            "mask 'v': expected a parameter of the model, got no such name. It has 'w'.",
        ),
        (
            lambda: check_masks({"w": torch.ones(2)}, {"w": torch.ones(3)}),
            "mask of 'w': expected the parameter's shape (2,), got shape (3,). Take the masks from "
            "the same model.",
        ),
    ],
)
def test_errors_say_it_all(act: Callable[[], object], text: str) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)) as raised:
        act()
    assert raised.value.args[0] == text


def _masked() -> nn.Module:
    model = net()
    apply_mask(model, {"0.weight": torch.eye(2, 3)})
    return model


def test_tied_weights_of_a_state_dict_have_one_mask() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    apply_mask(model, {"0.weight": torch.eye(2)})
    assert list(extract_mask(model.state_dict())) == ["0.weight"]
    assert list(extract_mask({k: v.clone() for k, v in model.state_dict().items()})) == [
        "0.weight",
        "1.weight",
    ]


def test_masks_of_the_model_itself_may_change_places():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    one, other = torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    apply_mask(model, {"0.weight": one, "1.weight": other})
    apply_mask(
        model, {"0.weight": model[1].weight_mask, "1.weight": model[0].weight_mask.view(2, 2)}
    )
    assert torch.equal(model[0].weight_mask, other)
    assert torch.equal(model[1].weight_mask, one)


def test_masks_of_a_model_are_read_where_they_lie_and_given_as_bool():
    model = nn.Linear(2, 2)
    apply_mask(model, {"weight": torch.eye(2)})
    masks = ModelMasks(model)
    assert (list(masks), len(masks)) == (["weight"], 1)
    assert torch.equal(masks["weight"], torch.eye(2, dtype=torch.bool))
    weights = named_weights(model)
    assert mask_of(weights, masks, "weight") is model.weight_mask
    assert mask_of(weights, masks, "bias") is None
    model.weight_mask[0, 0] = 0.5
    with pytest.raises(ValueError, match="expected zeros and ones"):
        ModelMasks(model)


def test_a_mask_in_another_layout_is_refused_by_name(fingerprint):
    layer = torch.nn.Linear(4, 3)
    before = fingerprint(layer)
    text = r"mask of 'weight': expected a dense tensor, got torch\.sparse_coo\. Call to_dense\(\) first\."
    with pytest.raises(ValueError, match=text):
        torch_rsst.apply_mask(layer, {"weight": torch.eye(3, 4).to_sparse()})
    assert fingerprint(layer) == before


@pytest.mark.parametrize(
    "remove", [torch_rsst.remove_all, lambda layer: torch_rsst.remove(layer, "weight")]
)
def test_masks_without_values_are_not_removed(remove):
    layer = torch.nn.Linear(4, 3)
    torch_rsst.apply_mask(layer, {"weight": torch.eye(3, 4)})
    layer.to("meta")
    text = r"mask of 'weight' of Linear: expected values, got one on the meta device\. Materialize"
    with pytest.raises(ValueError, match=text):
        remove(layer)
    assert layer.weight_mask.is_meta

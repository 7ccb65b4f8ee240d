"""The stock-shaped calls."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune as stock

import torch_rsst
from torch_rsst.testing import assert_mask_invariants, masks, shapes, weights

Fingerprint = Callable[[nn.Module], list[Any]]


def holder(*values: Any) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(torch.as_tensor(*values).clone())
    return module


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 4), nn.ReLU(), nn.Linear(4, 3))


def pairs(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(module, "weight") for module in model.modules() if isinstance(module, nn.Linear)]


def prune(model: nn.Module, amount: float, **options: Any) -> None:
    torch_rsst.global_unstructured(pairs(model), torch_rsst.GlobalL1, amount=amount, **options)


@pytest.mark.parametrize("method", [torch_rsst.GlobalL1, torch_rsst.L1Unstructured])
@given(seed=st.integers(0, 10**6), amount=st.one_of(st.floats(0, 1), st.integers(0, 52)))
def test_distinct_scores_are_pruned_as_stock_prunes_them(
    method: Any, seed: int, amount: float
) -> None:
    # Stock picks a count among alive entries; on a dense model with distinct |w| all agree.
    ours, theirs = net(seed), net(seed)
    torch_rsst.global_unstructured(pairs(ours), method, amount=amount)
    stock.global_unstructured(pairs(theirs), stock.L1Unstructured, amount=amount)
    for (a, _), (b, _) in zip(pairs(ours), pairs(theirs), strict=True):
        assert torch.equal(a.weight_mask, b.weight_mask)
        assert torch.equal(a.weight, b.weight)
    assert_mask_invariants(ours)


def test_stock_and_ours_agree_over_several_rounds() -> None:
    ours, theirs = net(), net()
    for _ in range(4):
        prune(ours, 0.2)
        stock.global_unstructured(pairs(theirs), stock.L1Unstructured, amount=0.2)
        for (a, _), (b, _) in zip(pairs(ours), pairs(theirs), strict=True):
            assert torch.equal(a.weight_mask, b.weight_mask)


@given(st.data(), st.floats(0, 1))
def test_ranking_against_sorting(data: st.DataObject, amount: float) -> None:
    modules = [
        holder(weight)
        for weight in data.draw(st.lists(weights(shapes(3, 4)), min_size=1, max_size=3))
    ]
    alive = [data.draw(masks(tuple(m.weight.shape))) for m in modules]
    dense = [data.draw(st.booleans()) for _ in modules]
    entries = []
    for which, module in enumerate(modules):
        if dense[which]:
            alive[which] = torch.ones_like(alive[which])
        else:
            torch_rsst.apply_mask(module, {"weight": alive[which]})
        values = module.get_parameter("weight" if dense[which] else "weight_orig").detach()
        for i, value in enumerate(values.double().abs().reshape(-1).tolist()):
            if alive[which].reshape(-1)[i]:
                entries.append((value, which, i))
    gone = {(which, i) for _, which, i in sorted(entries)[: round(amount * len(entries))]}
    torch_rsst.global_unstructured(
        [(m, "weight") for m in modules], torch_rsst.GlobalL1, amount=amount
    )
    for which, module in enumerate(modules):
        before = alive[which].reshape(-1).tolist()
        expected = [bool(a) and (which, i) not in gone for i, a in enumerate(before)]
        assert (module.weight_mask.reshape(-1) != 0).tolist() == expected
        assert_mask_invariants(module)


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_n_calls_at_one_rate_leave_its_complement_to_the_n(rate: float) -> None:
    model = nn.Sequential(nn.Linear(100, 80), nn.Linear(80, 25))
    for n in range(1, 6):
        prune(model, rate)
        left = sum(int(m.sum()) for m in torch_rsst.extract_mask(model).values())
        assert left == pytest.approx(10_000 * (1 - rate) ** n, abs=1.0)


def test_repeated_calls_stack_neither_hooks_nor_bytes() -> None:
    model = net()
    prune(model, 1)
    size = len(pickle.dumps(model))
    hooks = [list(m._forward_pre_hooks) for m in model]
    for _ in range(5):
        prune(model, 1)
    assert len(pickle.dumps(model)) == size
    assert [list(m._forward_pre_hooks) for m in model] == hooks
    assert_mask_invariants(model)


def test_all_equal_scores_go_in_order_of_parameter_and_position() -> None:
    modules = [holder(torch.ones(2, 2)), holder(-torch.ones(3))]
    parameters = [(modules[1], "weight"), (modules[0], "weight")]
    torch_rsst.global_unstructured(parameters, torch_rsst.GlobalL1, amount=5)
    assert modules[1].weight_mask.tolist() == [0, 0, 0]
    assert modules[0].weight_mask.tolist() == [[0, 0], [1, 1]]


def test_generators_are_accepted() -> None:
    model = net()
    torch_rsst.global_unstructured(
        ((m, "weight") for m in model if isinstance(m, nn.Linear)), torch_rsst.GlobalL1, amount=5
    )
    assert sum(int((m == 0).sum()) for m in torch_rsst.extract_mask(model).values()) == 5


def test_parameter_order_identity_and_gradients_survive() -> None:
    model = net()
    model(torch.ones(1, 10)).sum().backward()
    before = [(id(p), id(p.grad)) for p in model.parameters()]
    prune(model, 0.5)
    assert [(id(p), id(p.grad)) for p in model.parameters()] == before
    torch_rsst.remove(model[0], "weight", freeze_zeros=False)
    torch_rsst.remove_all(model, freeze_zeros=False)
    assert [(id(p), id(p.grad)) for p in model.parameters()] == before
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in net().named_parameters()]


def test_scores_come_from_the_latent_not_from_a_stale_product() -> None:
    module = holder([3.0, 1.0, 2.0])
    prune_it = [(module, "weight")]
    torch_rsst.global_unstructured(prune_it, torch_rsst.GlobalL1, amount=0)
    with torch.no_grad():
        module.weight_orig.copy_(torch.tensor([1.0, 3.0, 2.0]))
    torch_rsst.global_unstructured(prune_it, torch_rsst.GlobalL1, amount=1)
    assert module.weight_mask.tolist() == [0, 1, 1]
    assert module.weight.tolist() == [0, 3, 2]


def test_importance_scores_replace_the_weights() -> None:
    first, second = holder([1.0, 2.0]), holder([3.0, 4.0])
    scores = {(first, "weight"): torch.tensor([9, 8])}  # the second is ranked by its weights
    torch_rsst.global_unstructured(
        [(first, "weight"), (second, "weight")], torch_rsst.GlobalL1, scores, amount=2
    )
    assert first.weight_mask.tolist() == [1, 1]
    assert second.weight_mask.tolist() == [0, 0]


def test_tied_parameters_count_once_and_share_a_mask() -> None:
    first, second = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    second.weight = first.weight
    other = holder([10.0, 20.0])
    pairs_ = [(first, "weight"), (second, "weight"), (other, "weight")]
    torch_rsst.global_unstructured(pairs_, torch_rsst.GlobalL1, amount=0.5)
    assert first.weight_mask is second.weight_mask
    assert int(first.weight_mask.sum()) == 0
    assert other.weight_mask.tolist() == [1, 1]
    torch_rsst.global_unstructured(pairs_, torch_rsst.GlobalL1, amount=0.5)
    assert other.weight_mask.tolist() == [0, 1]


def test_stock_random_methods_prune_what_is_alive() -> None:
    model = net()
    prune(model, 10)
    before = torch_rsst.extract_mask(model)
    torch_rsst.global_unstructured(pairs(model), torch_rsst.RandomUnstructured, amount=0.5)
    after = torch_rsst.extract_mask(model)
    assert sum(int(m.sum()) for m in after.values()) == 21
    assert all(not bool((after[name] & ~before[name]).any()) for name in after)


@pytest.mark.parametrize("base", [torch_rsst.GlobalL1, torch_rsst.L1Unstructured])
def test_overridden_rules_are_called(base: Any) -> None:
    class Last(base):  # type: ignore[misc]
        def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
            mask = default_mask.clone()
            mask[-self.amount :] = 0
            return mask

    first, second = holder([1.0, 2.0]), holder([3.0, 4.0])
    parameters = [(first, "weight"), (second, "weight")]
    torch_rsst.global_unstructured(parameters, Last, amount=1)
    torch_rsst.global_unstructured(parameters, Last, amount=2)
    assert first.weight_mask.tolist() == [1, 0]
    assert second.weight_mask.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("parameters", "error", "text"),
    [
        ([], ValueError, "parameters: expected at least one, got none"),
        (iter(()), ValueError, "at least one"),
        (None, TypeError, r"\(module, name\) pairs, got NoneType"),
        ([nn.Linear(1, 1)], TypeError, r"\(module, name\) pairs, got Linear"),
        ([("weight", nn.Linear(1, 1))], TypeError, r"a \(module, name\) pair"),
        ([(nn.Linear(1, 1), "wieght")], ValueError, "'wieght' of Linear"),
        ([(nn.Linear(1, 1), "weight", 1)], TypeError, "pairs"),
        ([(nn.LazyLinear(1), "weight")], ValueError, "a lazy one"),
        ("weight", TypeError, "pairs, got str"),
        (torch.tensor(0.5), TypeError, "pairs, got Tensor"),
        (torch.tensor(0.5).numpy(), TypeError, "pairs, got ndarray"),
        (5, TypeError, "pairs, got int"),
    ],
)
def test_what_is_no_list_of_parameters(parameters: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        torch_rsst.global_unstructured(parameters, torch_rsst.GlobalL1, amount=0)


@pytest.mark.parametrize("pruned", [False, True])
def test_a_parameter_listed_twice_is_an_error(pruned: bool, fingerprint: Fingerprint) -> None:
    model = net()
    if pruned:
        prune(model, 3)
    before = fingerprint(model)
    with pytest.raises(ValueError, match="'weight' of Linear: expected to be listed once"):
        torch_rsst.global_unstructured(
            [*pairs(model), (model[0], "weight")], torch_rsst.GlobalL1, amount=1
        )
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("method", "options", "error", "text"),
    [
        (torch_rsst.GlobalL1, {"amount": 53}, ValueError, "at most 52, as many alive entries"),
        (torch_rsst.GlobalL1, {"amount": -1}, ValueError, "amount: expected"),
        (torch_rsst.GlobalL1, {"amount": "x"}, TypeError, "amount: expected"),
        (torch_rsst.GlobalL1, {}, TypeError, "amount"),
        (torch_rsst.GlobalL1, {"amount": 1, "rate": 2}, TypeError, "rate"),
        (torch_rsst.Fillback, {"rate": 0.5}, TypeError, 'Fillback with "global"'),
        (torch_rsst.HeadRegroup, {"amount": 0.5, "num_heads": 2}, TypeError, "regroup.. and apply"),
        (stock.RandomStructured, {"amount": 1}, TypeError, 'with "structured"'),
        (
            dict,
            {},
            TypeError,
            "expected a pruning class, got dict. Pass the class, such as GlobalL1",
        ),
        ("l1", {}, TypeError, "expected a pruning class, got 'l1'"),
        (stock.L1Unstructured(1), {}, TypeError, "expected a pruning class, got "),
        (stock.L1Unstructured, {"amount": 1.5}, ValueError, "amount"),
    ],
)
def test_bad_methods_change_nothing(
    method: Any, options: dict[str, Any], error: Any, text: str, fingerprint: Fingerprint
) -> None:
    model = net()
    before = fingerprint(model)
    with pytest.raises(error, match=text):
        torch_rsst.global_unstructured(pairs(model), method, **options)
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("score", "error", "text"),
    [
        (torch.ones(10, 4), ValueError, r"shape \(4, 10\), got shape \(10, 4\)"),
        (torch.full((4, 10), math.nan), ValueError, "'weight' of Linear.*40 NaN"),
        ([1.0], TypeError, "a tensor of numbers, got list"),
        (torch.ones(4, 10, dtype=torch.complex64), TypeError, "got torch.complex64"),
    ],
)
def test_bad_scores_change_nothing(
    score: Any, error: Any, text: str, fingerprint: Fingerprint
) -> None:
    model = net()
    before = fingerprint(model)
    with pytest.raises(error, match=text):
        prune(model, 1, importance_scores={(model[0], "weight"): score})
    assert fingerprint(model) == before


def test_scores_come_in_a_dict() -> None:
    with pytest.raises(TypeError, match="importance_scores: expected a dict, got list"):
        prune(net(), 1, importance_scores=[])


def test_nan_counts_where_it_is_alive() -> None:
    model = net()
    with torch.no_grad():
        model[2].weight[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"'weight' of Linear.*1 NaN"):
        prune(model, 1)
    mask = torch.ones(3, 4)
    mask[1, 2] = 0
    torch_rsst.apply_mask(model, {"2.weight": mask})
    prune(model, 1)
    assert_mask_invariants(model)
    assert bool(model(torch.ones(1, 10)).isfinite().all())


def test_a_failing_installation_changes_nothing(
    fingerprint: Fingerprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch_rsst.masking import masked_parameter

    model = net()
    before = fingerprint(model)
    original, seen = masked_parameter.set_hook, []

    def failing_late(ref: Any) -> Any:
        seen.append(ref)
        if len(seen) == 2:
            raise MemoryError
        return original(ref)

    monkeypatch.setattr(masked_parameter, "set_hook", failing_late)
    with pytest.raises(MemoryError):
        prune(model, 0.5)
    assert fingerprint(model) == before


def test_heads_of_a_fused_projection() -> None:
    qkv = nn.Linear(8, 24)
    with torch.no_grad():
        qkv.weight.fill_(1.0)
        qkv.weight[[0, 8, 16]] = 3.0  # rows of head 0 in q, k and v
    assert torch_rsst.head_structured(qkv, "weight", 0.5, num_heads=4) is qkv
    kept = qkv.weight_mask[:, 0].reshape(3, 4, 2)[:, :, 0]
    assert kept.tolist() == [[1, 0, 0, 1]] * 3
    assert_mask_invariants(qkv)


@pytest.mark.parametrize("amount", [0.3, 1, None])
def test_example_2(amount: float | None) -> None:
    layer = nn.Linear(1, 192, bias=False)
    alive = torch.zeros(192, 1, dtype=torch.bool)
    for head, count in enumerate((50, 60, 30)):
        alive[64 * head : 64 * head + count] = True
    torch_rsst.apply_mask(layer, {"weight": alive})
    torch_rsst.head_structured(
        layer, "weight", amount, num_heads=3, projections=1, importance="remain"
    )
    assert layer.weight_mask.reshape(3, 64).sum(1).tolist() == [64, 64, 0]
    penalized = torch_rsst.penalty_mask({"weight": alive}, torch_rsst.extract_mask(layer))["weight"]
    assert penalized.nonzero()[:, 0].tolist() == list(range(128, 158))


def test_fillback_in_place() -> None:
    layer = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    torch_rsst.l1_unstructured(layer, "weight", amount=3)
    assert torch_rsst.fillback(layer, "weight", 0.7) is layer
    assert layer.weight.tolist() == [[4, 3, 2, 0]]
    torch_rsst.fillback(layer, "weight", 1, torch.tensor([[1.0, 1.0, 1.0, 1.0]]), policy="zero")
    assert layer.weight.tolist() == [[4, 3, 2, 0]]
    assert int(layer.weight_mask.sum()) == 4


def test_integer_scores_that_float64_cannot_tell_apart_are_refused() -> None:
    layer = nn.Linear(2, 1)
    scores = {(layer, "weight"): torch.tensor([[2**53 + 1, 2**53]])}
    with pytest.raises(ValueError, match=r"expected integers within .*, got larger ones\. Scale"):
        torch_rsst.global_unstructured([(layer, "weight")], torch_rsst.GlobalL1, scores, amount=1)


@pytest.mark.parametrize("owner", [0, 1])
def test_scores_of_any_owner_of_a_tied_weight_count(owner: int) -> None:
    pair = [nn.Linear(3, 1), nn.Linear(3, 1)]
    pair[1].weight = pair[0].weight
    scores = {(pair[owner], "weight"): torch.tensor([[1.0, 2.0, 3.0]])}
    refs = [(layer, "weight") for layer in pair]
    torch_rsst.global_unstructured(refs, torch_rsst.GlobalL1, scores, amount=1)
    assert pair[0].weight_mask.tolist() == [[0, 1, 1]]
    scores |= {(pair[1 - owner], "weight"): torch.ones(1, 3)}
    with pytest.raises(ValueError, match="expected one tensor, got 2"):
        torch_rsst.global_unstructured(refs, torch_rsst.GlobalL1, scores, amount=1)


@pytest.mark.parametrize("key", ["weight", ("0", "weight"), (0,)])
def test_scores_under_a_key_that_is_no_pair_are_refused(key: Any) -> None:
    layer = nn.Linear(4, 3)
    scores = {key: torch.rand(3, 4)}
    with pytest.raises(
        TypeError, match=r"key of importance_scores: expected a \(module, name\) pair"
    ):
        torch_rsst.global_unstructured([(layer, "weight")], torch_rsst.GlobalL1, scores, amount=0.5)
    assert not hasattr(layer, "weight_mask")


@pytest.mark.parametrize("method", ["parameters", "named_parameters", "named_modules"])
def test_what_lists_no_pairs_is_named_in_a_line(method: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64)))
    with pytest.raises(TypeError, match=r"Pass .*\(model\.fc, 'weight'\)") as raised:
        torch_rsst.global_unstructured(getattr(model, method)(), torch_rsst.GlobalL1, amount=0.2)
    assert len(str(raised.value)) < 200


def test_a_parametrized_parameter_is_refused_with_what_to_mask_instead(fingerprint):
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    before = fingerprint(layer)
    for call in (torch_rsst.l1_unstructured, torch_rsst.random_unstructured):
        with pytest.raises(ValueError, match=r"a plain parameter.*remove_parametrizations first"):
            call(layer, "weight", amount=0.5)
        assert fingerprint(layer) == before


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda layer: torch_rsst.remove_all(layer, freeze_zeros="no"), "freeze_zeros"),
        (lambda layer: torch_rsst.remove(layer, "weight", freeze_zeros=[]), "freeze_zeros"),
        (
            lambda layer: torch_rsst.fillback(layer, "weight", 0.5, freeze_masked=np.ones(2)),
            "freeze_masked",
        ),
        (lambda layer: torch_rsst.apply_mask(layer, {}, strict=""), "strict"),
    ],
)
def test_what_is_neither_true_nor_false_is_refused_before_anything_is_changed(
    call: Callable[[nn.Module], Any], name: str, fingerprint: Fingerprint
) -> None:
    layer = nn.Linear(6, 4)
    torch_rsst.l1_unstructured(layer, "weight", 0.5)
    before = fingerprint(layer)
    with pytest.raises(TypeError, match=f"{name}: expected True or False"):
        call(layer)
    assert fingerprint(layer) == before

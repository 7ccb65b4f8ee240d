"""One masked parameter: identity, order, gradients, and what a failure leaves."""

from __future__ import annotations

import gc
import math
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as stock

import torch_rsst
from torch_rsst.masking import freezing, masked_parameter
from torch_rsst.masking.masked_parameter import MaskHook, NewMasks, find_hook, install, restore
from torch_rsst.masking.parameter_ref import ParameterRef, check_ref, masked_refs
from torch_rsst.masking.rollback import AllOrNothing
from torch_rsst.testing import assert_mask_invariants

Fingerprint = Callable[[nn.Module], list[Any]]


def layer_of(*weight: float) -> nn.Linear:
    layer = nn.Linear(len(weight), 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([weight]))
    return layer


def mask(ref: ParameterRef, *alive: int) -> None:
    install([ref], NewMasks.of([torch.tensor([alive], dtype=torch.bool)]))


def test_parameter_keeps_identity_place_and_gradient_through_prune_and_remove() -> None:
    layer = layer_of(3.0, 1.0, 2.0)
    weight, gradient = layer.weight, torch.ones(1, 3)
    weight.grad = gradient
    mask(ParameterRef(layer, "weight"), 1, 0, 1)
    assert list(layer._parameters) == ["weight_orig", "bias"]
    assert layer.weight_orig is weight
    assert weight.grad is gradient
    restore([ParameterRef(layer, "weight")])
    assert list(layer._parameters) == ["weight", "bias"]
    assert layer.weight is weight
    assert weight.grad is gradient
    assert weight.tolist() == [[3.0, 0.0, 2.0]]
    assert not layer._forward_pre_hooks
    assert not layer._buffers
    assert "weight" not in vars(layer)


def test_latents_stay_until_removal() -> None:
    layer = layer_of(3.0, 1.0)
    mask(ParameterRef(layer, "weight"), 1, 0)
    assert layer.weight_orig.tolist() == [[3.0, 1.0]]
    assert layer.weight.tolist() == [[3.0, 0.0]]
    mask(ParameterRef(layer, "weight"), 1, 1)
    assert layer.weight.tolist() == [[3.0, 1.0]]


def test_an_optimizer_made_before_pruning_goes_on_training() -> None:
    layer = layer_of(3.0, 1.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    mask(ParameterRef(layer, "weight"), 1, 0)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    layer(torch.ones(1, 2))
    assert layer.weight.tolist() == [[2.5, 0.0]]


@pytest.mark.parametrize("latent", [math.nan, math.inf, -math.inf])
def test_a_non_finite_latent_does_not_leak(latent: float) -> None:
    layer = layer_of(3.0, 1.0)
    mask(ParameterRef(layer, "weight"), 1, 0)
    with torch.no_grad():
        layer.weight_orig[0, 1] = latent
    output = layer(torch.ones(1, 2))
    assert layer.weight.tolist() == [[3.0, 0.0]]
    output.sum().backward()
    assert layer.weight_orig.grad.tolist() == [[1.0, 0.0]]
    restore([ParameterRef(layer, "weight")])
    assert layer.weight.tolist() == [[3.0, 0.0]]


@pytest.mark.parametrize("latent", [math.nan, math.inf])
def test_a_non_finite_latent_does_not_leak_behind_a_stock_method(latent: float) -> None:
    layer = layer_of(3.0, 1.0, 2.0)
    stock.l1_unstructured(layer, "weight", 1)
    mask(ParameterRef(layer, "weight"), 1, 0, 1)
    with torch.no_grad():
        layer.weight_orig[0, 1] = latent
    layer(torch.ones(1, 3))
    assert layer.weight.tolist() == [[3.0, 0.0, 2.0]]


def test_the_mask_is_written_in_place() -> None:
    layer = layer_of(3.0, 1.0)
    ref = ParameterRef(layer, "weight")
    mask(ref, 1, 0)
    buffer, hook = layer.weight_mask, find_hook(ref)
    mask(ref, 0, 1)
    assert layer.weight_mask is buffer
    assert buffer.tolist() == [[0.0, 1.0]]
    assert find_hook(ref) == hook


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_mask_has_the_parameters_dtype(dtype: torch.dtype) -> None:
    layer = layer_of(3.0, 1.0).to(dtype)
    mask(ParameterRef(layer, "weight"), 1, 0)
    assert layer.weight_mask.dtype == layer.weight.dtype == dtype
    layer.double()
    assert_mask_invariants(layer)


def test_tied_parameters_share_one_mask() -> None:
    first, second = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    second.weight = first.weight
    alive = torch.tensor([[True, False]])
    install([ParameterRef(first, "weight"), ParameterRef(second, "weight")], NewMasks.of([alive]))
    assert first.weight_orig is second.weight_orig
    assert first.weight_mask is second.weight_mask
    torch_rsst.remove_all(nn.ModuleList([first, second]), freeze_zeros=False)
    assert first.weight is second.weight
    assert first.weight[0, 1].item() == 0.0


def test_two_parameters_of_one_module_have_a_hook_each() -> None:
    layer = layer_of(3.0, 1.0)
    alive = [torch.tensor([[True, False]]), torch.tensor([False])]
    install([ParameterRef(layer, "weight"), ParameterRef(layer, "bias")], NewMasks.of(alive))
    assert len(layer._forward_pre_hooks) == 2
    assert layer(torch.ones(1, 2)).item() == 3.0
    restore([ParameterRef(layer, "weight")])
    assert [ref.name for ref in masked_refs([layer])] == ["bias"]
    assert_mask_invariants(layer, {"bias": torch.tensor([False])})


def test_recurrent_layers_see_the_masked_weight() -> None:
    recurrent = nn.LSTM(2, 3)
    before = list(recurrent._parameters)
    weight = recurrent.weight_ih_l0
    install(
        [ParameterRef(recurrent, "weight_ih_l0")],
        NewMasks.of([torch.zeros(12, 2, dtype=torch.bool)]),
    )
    output, _ = recurrent(torch.ones(1, 1, 2))
    again, _ = recurrent(torch.zeros(1, 1, 2))
    assert torch.equal(output, again)
    restore([ParameterRef(recurrent, "weight_ih_l0")])
    assert list(recurrent._parameters) == before
    assert recurrent._flat_weights[0] is weight is recurrent.weight_ih_l0


class InjectedError(Exception):
    pass


def failing(*_: object, **__: object) -> None:
    raise InjectedError


def failing_second_time(function: Callable[..., Any]) -> Callable[..., Any]:
    calls = []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise InjectedError
        return function(*args, **kwargs)

    return wrapped


def _dense() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3), nn.LSTM(3, 2))


def _masked_by_us() -> nn.Module:
    model = _dense()
    torch_rsst.apply_mask(model, {"0.weight": torch.eye(2, 3), "2.weight_hh_l0": torch.ones(8, 2)})
    return model


def _masked_by_stock() -> nn.Module:
    model = _dense()
    stock.l1_unstructured(model[0], "weight", 2)
    stock.l1_unstructured(model[0], "weight", 1)
    stock.random_unstructured(model[1], "weight", 2)
    return model


@pytest.mark.parametrize("make", [_dense, _masked_by_us, _masked_by_stock])
@pytest.mark.parametrize(
    "point", ["_mask_buffer", "reparametrize", "make_live", "set_hook", "place_kept"]
)
@pytest.mark.parametrize("when", ["first", "second"])
def test_a_failure_anywhere_in_install_changes_nothing(
    make: Callable[[], nn.Module],
    point: str,
    when: str,
    fingerprint: Fingerprint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    before = fingerprint(model)
    named = {
        "0.weight": torch.zeros(2, 3),
        "1.weight": torch.eye(3, 2),
        "2.weight_hh_l0": torch.zeros(8, 2),
        "2.weight_ih_l0": torch.zeros(8, 3),
    }
    original = getattr(masked_parameter, point)
    replacement = failing if when == "first" else failing_second_time(original)
    monkeypatch.setattr(masked_parameter, point, replacement)
    try:
        torch_rsst.apply_mask(model, named)
    except InjectedError:
        assert fingerprint(model) == before
        monkeypatch.undo()
        torch_rsst.apply_mask(model, named)
    else:
        assert point == "place_kept"  # one dense parameter at most was left to rename
        assert when == "second"
    assert_mask_invariants(model)


def test_an_interrupt_is_rolled_back_too(
    fingerprint: Fingerprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: ParameterRef) -> None:
        raise KeyboardInterrupt

    layer = layer_of(3.0, 1.0)
    before = fingerprint(layer)
    monkeypatch.setattr(masked_parameter, "set_hook", interrupt)
    with pytest.raises(KeyboardInterrupt):
        mask(ParameterRef(layer, "weight"), 1, 0)
    assert fingerprint(layer) == before


@pytest.mark.parametrize("on", ["entry", "exit"])
def test_an_interrupt_around_the_rollback_leaves_all_masks_old_or_all_new(on: str) -> None:
    """Whenever the exception is dropped, which a generator that holds a rollback would wait for."""
    layers = [layer_of(3.0, 1.0), layer_of(2.0, 4.0)]
    mask(ParameterRef(layers[0], "weight"), 1, 1)

    def interrupt(frame: Any, event: str, _: object) -> None:
        code = frame.f_code
        if code.co_name == f"__{on.replace('entry', 'enter')}__" and "rollback" in code.co_filename:
            sys.settrace(None)
            raise KeyboardInterrupt

    new = NewMasks.of([torch.tensor([[True, False]]), torch.tensor([[False, True]])])
    held: BaseException | None = None
    before = sys.gettrace()
    sys.settrace(interrupt)
    try:
        install([ParameterRef(layer, "weight") for layer in layers], new)
    except KeyboardInterrupt as raised:
        held = raised
    finally:
        sys.settrace(before)
    assert held is not None
    expected = [[[1.0, 1.0]], None] if on == "entry" else [[[1.0, 0.0]], [[0.0, 1.0]]]

    def masks() -> list[Any]:
        found = [layer._buffers.get("weight_mask") for layer in layers]
        return [None if each is None else each.tolist() for each in found]

    assert masks() == expected
    held = None
    gc.collect()
    assert masks() == expected


def test_a_step_back_that_fails_keeps_no_other_from_being_made() -> None:
    layers = [layer_of(3.0, 1.0), layer_of(2.0, 4.0)]
    for layer in layers:
        mask(ParameterRef(layer, "weight"), 1, 1)

    def fail() -> None:
        with AllOrNothing([ParameterRef(layer, "weight") for layer in layers]) as undo:
            undo.append(failing)
            for layer in layers:
                layer.weight_mask.zero_()
            raise ValueError

    with pytest.raises(InjectedError):
        fail()
    assert [layer.weight_mask.tolist() for layer in layers] == [[[1.0, 1.0]], [[1.0, 1.0]]]


@pytest.mark.parametrize("how", ["expanded", "made in inference mode"])
def test_a_mask_that_cannot_be_written_to_is_replaced(how: str) -> None:
    layer = nn.Linear(3, 2)
    if how == "expanded":
        mask(ParameterRef(layer, "weight"), 1, 1, 1)
        layer.weight_mask = torch.ones(3).expand(2, 3)
    else:
        with torch.inference_mode():
            stock.l1_unstructured(layer, "weight", 0)
    torch_rsst.global_unstructured([(layer, "weight")], torch_rsst.GlobalL1, amount=2)
    torch_rsst.global_unstructured([(layer, "weight")], torch_rsst.GlobalL1, amount=2)
    assert int(layer.weight_mask.sum()) == 2


@pytest.mark.parametrize("how", ["expanded", "made in inference mode"])
def test_a_mask_that_cannot_be_written_to_hides_no_error(
    how: str, fingerprint: Fingerprint
) -> None:
    layer = nn.Linear(3, 2)
    with torch.inference_mode(how != "expanded"):
        stock.l1_unstructured(layer, "weight", 0)
    if how == "expanded":
        layer.weight_mask = torch.tensor([[1.0], [0.0]]).expand(2, 3)
    before = fingerprint(layer)
    with pytest.raises(ValueError, match="amount=100"):
        torch_rsst.l1_unstructured(layer, "weight", 100)
    assert fingerprint(layer) == before


ODD_MASKS = {
    "an average of masks": torch.tensor([[0.5, 1.0, 0.0]]),
    "a bool": torch.tensor([[True, False, True]]),
    "small integers": torch.tensor([[1, 0, 1]], dtype=torch.int8),
    "no number": torch.tensor([[1.0, math.nan, 0.0]]),
}


@pytest.mark.parametrize("odd", ODD_MASKS)
def test_masks_of_other_hands_are_as_they_were_after_a_failure(odd: str) -> None:
    layer = layer_of(3.0, 1.0, 2.0)
    mask(ParameterRef(layer, "weight"), 1, 0, 1)
    layer.weight_mask = ODD_MASKS[odd].clone()

    def fail(outs: Any) -> None:
        outs[0].fill_(0)
        raise InjectedError

    with pytest.raises(InjectedError):
        install([ParameterRef(layer, "weight")], NewMasks(fail))
    assert layer.weight_mask.dtype == ODD_MASKS[odd].dtype
    torch.testing.assert_close(layer.weight_mask, ODD_MASKS[odd], rtol=0, atol=0, equal_nan=True)


def test_masks_of_unchanged_modules_are_put_back_where_another_module_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recurrent, layer = nn.LSTM(2, 1), nn.Linear(2, 4)
    refs = [ParameterRef(layer, "weight"), ParameterRef(recurrent, "weight_ih_l0")]
    halves = [torch.tensor([[1.0, 0.0]] * 4)] * 2
    install(refs, NewMasks.of(halves))
    monkeypatch.setattr(masked_parameter._Masked, "apply_mask", failing)
    with pytest.raises(InjectedError):
        install(refs, NewMasks.of([1 - half for half in halves]))
    assert torch.equal(layer.weight_mask, halves[0])
    assert torch.equal(recurrent.weight_ih_l0_mask, halves[1])


def test_zeros_stay_frozen_after_a_failure() -> None:
    layer = layer_of(3.0, 1.0, 2.0, 4.0)
    mask(ParameterRef(layer, "weight"), 1, 0, 0, 1)
    torch_rsst.remove_all(layer, freeze_zeros=True)

    def fail(outs: Any) -> None:
        raise InjectedError

    with pytest.raises(InjectedError):
        install([ParameterRef(layer, "weight")], NewMasks(fail))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert layer.weight[0, 1:3].tolist() == [0.0, 0.0]
    assert layer.weight[0, 0] != 3.0


def frozen_in(model: nn.Module) -> list[Any]:
    return [each for each in freezing._FROZEN if each.module() in list(model.modules())]


def test_latents_and_freezes_are_as_they_were_where_removal_fails_at_its_end(
    fingerprint: Fingerprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(layer_of(3.0, 1.0), layer_of(1.0, 2.0))
    torch_rsst.apply_mask(
        model, {"0.weight": torch.tensor([[1, 0]]), "1.weight": torch.tensor([[0, 1]])}
    )
    torch_rsst.freeze_masked(model)
    before, frozen = fingerprint(model), frozen_in(model)
    with monkeypatch.context() as patch:
        patch.setattr(freezing, "FreezeHandle", failing)  # when all else is done
        with pytest.raises(InjectedError):
            torch_rsst.remove_all(model, freeze_zeros=True)
    assert fingerprint(model) == before
    assert frozen_in(model) == frozen
    assert model[0].weight_orig.tolist() == [[3.0, 1.0]]


def test_a_freeze_that_was_lifted_is_back_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(layer_of(3.0, 1.0), layer_of(1.0, 2.0))
    half = {f"{i}.weight": torch.tensor([[1, 0]]) for i in range(2)}
    torch_rsst.apply_mask(model, half)
    torch_rsst.remove_all(model, freeze_zeros=True)
    frozen = frozen_in(model)
    end = masked_parameter.end_freeze
    calls: list[ParameterRef] = []

    def interrupted(ref: ParameterRef) -> None:
        end(ref)
        calls.append(ref)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(masked_parameter, "end_freeze", interrupted)
    with pytest.raises(KeyboardInterrupt):
        torch_rsst.apply_mask(model, half)
    assert frozen_in(model) == frozen


def test_a_list_in_a_module_is_the_same_list_after_a_failure() -> None:
    class Listed(list[int]):
        pass

    layer = layer_of(3.0, 1.0)
    layer.shared = shared = Listed([1])

    def fail(outs: Any) -> None:
        shared.append(2)
        raise InjectedError

    with pytest.raises(InjectedError):
        install([ParameterRef(layer, "weight")], NewMasks(fail))
    assert layer.shared is shared
    assert shared == [1]


def test_handles_of_other_hooks_work_after_a_rollback(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(3.0, 1.0)
    handle = layer.register_forward_pre_hook(lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(masked_parameter, "set_hook", failing)
        with pytest.raises(InjectedError):
            mask(ParameterRef(layer, "weight"), 1, 0)
    handle.remove()
    assert not layer._forward_pre_hooks


def test_ours_joins_stock_methods_once() -> None:
    layer = nn.Linear(4, 3)
    stock.l1_unstructured(layer, "weight", 2)
    ref = check_ref(layer, "weight")
    for k in range(4):
        alive = torch.ones(3, 4, dtype=torch.bool).index_fill(1, torch.tensor(k), False)
        install([ref], NewMasks.of([alive]))
    (container,) = layer._forward_pre_hooks.values()
    assert isinstance(container, stock.PruningContainer)
    assert [type(method) for method in container] == [stock.L1Unstructured, MaskHook]
    assert_mask_invariants(layer)


@pytest.mark.parametrize("first", ["stock", "ours"])
def test_other_libraries_remove_hooks_by_hand(first: str) -> None:
    # As Lightning's ModelPruning does: hook.remove(module), then delete the hook.
    layer = nn.Linear(4, 3)
    if first == "stock":
        stock.l1_unstructured(layer, "weight", 2)
    weight = layer.weight_orig if first == "stock" else layer.weight
    torch_rsst.GlobalL1.apply(layer, "weight", 2)
    for key in list(layer._forward_pre_hooks):
        hook = layer._forward_pre_hooks[key]
        if isinstance(hook, stock.BasePruningMethod):
            hook.remove(layer)
            del layer._forward_pre_hooks[key]
    assert layer.weight is weight
    assert not torch_rsst.is_pruned(layer)
    layer(torch.ones(1, 4))


def test_pickling_does_not_grow() -> None:
    layer = nn.Linear(8, 8)

    def prune_and_measure() -> int:
        torch_rsst.global_unstructured([(layer, "weight")], torch_rsst.GlobalL1, amount=1)
        return len(pickle.dumps(layer))

    sizes = [prune_and_measure() for _ in range(4)]
    assert len(set(sizes)) == 1
    assert_mask_invariants(pickle.loads(pickle.dumps(layer)))


@pytest.mark.parametrize(
    ("pair", "text"),
    [
        (("fc", "weight"), r"a \(module, name\) pair, got \(str, 'weight'\)"),
        ((nn.Linear(1, 1), 3), r"got \(Linear, 3\)"),
        ((nn.Linear(1, 1), None), r"got \(Linear, None\)"),
    ],
)
def test_what_is_no_parameter_at_all(pair: tuple[Any, Any], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        check_ref(*pair)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'weigth' of Linear.*It has 'weight', 'bias'"):
        check_ref(nn.Linear(1, 1), "weigth")
    with pytest.raises(ValueError, match="It has no parameters of its own"):
        check_ref(nn.ReLU(), "weight")
    with pytest.raises(ValueError, match="got none"):
        check_ref(nn.Linear(1, 1, bias=False), "bias")
    with pytest.raises(ValueError, match="got none"):
        check_ref(nn.BatchNorm1d(2), "running_mean")


def test_weight_orig_is_not_prunable_again() -> None:
    layer = layer_of(3.0, 1.0)
    mask(ParameterRef(layer, "weight"), 1, 0)
    with pytest.raises(ValueError, match=r"masked already. Pass 'weight': masks of one"):
        check_ref(layer, "weight_orig")


def test_lazy_parameters_must_be_materialized_first() -> None:
    lazy = nn.LazyLinear(3)
    with pytest.raises(
        ValueError, match=r"an initialized parameter, got a lazy one. Run one forward"
    ):
        check_ref(lazy, "weight")
    lazy(torch.ones(1, 2))
    assert check_ref(lazy, "weight").original is lazy.weight


def test_parametrized_parameters_are_refused() -> None:
    layer = parametrizations.weight_norm(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"got a parametrized one. Call .*remove_parametrizations"):
        check_ref(layer, "weight")
    assert check_ref(layer, "bias").name == "bias"


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_only_floating_point_parameters(dtype: torch.dtype) -> None:
    module = nn.Module()
    module.table = nn.Parameter(torch.zeros(2, dtype=dtype), requires_grad=False)
    with pytest.raises(
        ValueError, match=rf"expected one of torch\.float32, .*, got {dtype}\. Cast"
    ):
        check_ref(module, "table")


def test_a_lone_weight_orig_is_a_parameter_like_any_other() -> None:
    module = nn.Module()
    module.weight_orig = nn.Parameter(torch.zeros(2))
    assert not ParameterRef(module, "weight").is_masked
    assert check_ref(module, "weight_orig").original is module.weight_orig


@pytest.mark.parametrize("taken", ["weight_orig", "weight_mask"])
@pytest.mark.parametrize("how", ["parameter", "buffer", "attribute"])
def test_names_in_use_are_not_taken(taken: str, how: str, fingerprint: Fingerprint) -> None:
    layer, value = layer_of(3.0, 1.0), torch.ones(1, 2)
    if how == "parameter":
        layer.register_parameter(taken, nn.Parameter(value))
    elif how == "buffer":
        layer.register_buffer(taken, value)
    else:
        setattr(layer, taken, value)
    before = fingerprint(layer)
    with pytest.raises(
        ValueError, match=rf"to be free names, got one in use: '{taken}'\. Rename it"
    ):
        torch_rsst.apply_mask(layer, {"weight": torch.tensor([[1, 0]])})
    assert fingerprint(layer) == before


def test_the_last_mask_of_a_tied_parameter_is_the_one_of_all_its_places() -> None:
    first, second = layer_of(3.0, 1.0, 2.0), layer_of(0.0, 0.0, 0.0)
    second.weight = first.weight
    mask(ParameterRef(first, "weight"), 1, 0, 1)
    mask(ParameterRef(second, "weight"), 1, 1, 0)
    torch_rsst.remove_all(nn.ModuleList([first, second]), freeze_zeros=False)
    assert first.weight.tolist() == [[3.0, 1.0, 0.0]]


@pytest.mark.parametrize("masked", ["exactly", "by the functions of stock"])
def test_masks_stand_in_the_order_of_parameters_in_whatever_order_they_are_made(
    masked: str,
) -> None:
    norm = nn.BatchNorm1d(4)
    for name in ("bias", "weight"):
        if masked == "exactly":
            torch_rsst.apply_mask(norm, {name: torch.tensor([1, 0, 1, 1])})
        else:
            torch_rsst.l1_unstructured(norm, name, amount=1)
    assert list(norm._buffers)[3:] == ["weight_mask", "bias_mask"]

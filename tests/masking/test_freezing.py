"""What no optimizer may move stays exactly where it is: masked latents, zeros of removed masks."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.ao.quantization as quantization
from tiny_models import gradient_step, linear, mlp, same
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.prune import BasePruningMethod
from torch.optim import Optimizer

import torch_rsst
from torch_rsst.masking import freezing

ENDED = r"freeze of 'weight' of Linear: expected a parameter of the same shape, got none any more"
MASK = torch.tensor(
    [[True, False, True, True], [False, False, True, True], [True, True, True, False]]
)

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, weight_decay=0.1),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def masked_layer() -> nn.Linear:
    layer = linear()
    torch_rsst.apply_mask(layer, {"weight": MASK})
    return layer


def train(layer: nn.Module, optimizer: Optimizer, steps: int = 5) -> None:
    for number in range(steps):
        gradient_step(layer, optimizer, number)


def latents(layer: nn.Linear) -> Tensor:
    return layer.weight_orig.detach()[~MASK].clone()


@every_optimizer
def test_masked_latents_drift_unless_frozen(make: Callable[[Any], Optimizer]) -> None:
    layer = linear()
    optimizer = make(layer.parameters())
    train(layer, optimizer)  # warm: momentum and averages are not zero
    torch_rsst.apply_mask(layer, {"weight": MASK})
    drifting = copy.deepcopy(layer)
    other = make(drifting.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    handle = torch_rsst.freeze_masked(layer)
    before, alive = latents(layer), layer.weight.detach().clone()
    train(layer, optimizer)
    train(drifting, other)
    assert same(latents(layer), before)
    assert not same(latents(drifting), before)
    # What is alive trains as it would have.
    assert not same(layer.weight, alive)
    assert same(layer.weight, drifting.weight)
    assert same(layer.bias, drifting.bias)
    handle.remove()


def test_the_handle_lifts_the_freeze() -> None:
    layer = masked_layer()
    optimizer = OPTIMIZERS["adamw"](layer.parameters())
    before = latents(layer)
    handle = torch_rsst.freeze_masked(layer)
    train(layer, optimizer, 1)
    assert same(latents(layer), before)
    handle.remove()
    train(layer, optimizer, 1)
    assert not same(latents(layer), before)


def test_the_freeze_follows_the_mask() -> None:
    layer = masked_layer()
    optimizer = OPTIMIZERS["adamw"](layer.parameters())
    handle = torch_rsst.freeze_masked(layer)
    before = layer.weight_orig.detach().clone()
    torch_rsst.apply_mask(layer, {"weight": ~MASK})
    train(layer, optimizer)
    assert same(layer.weight_orig[MASK], before[MASK])
    assert bool((layer.weight_orig[~MASK] != before[~MASK]).all())
    handle.remove()


def test_a_step_of_something_else_in_a_closure_lifts_nothing() -> None:
    layer, stranger = masked_layer(), linear()
    torch_rsst.freeze_masked(layer)
    before = latents(layer)
    inner = OPTIMIZERS["adamw"](stranger.parameters())
    optimizer = OPTIMIZERS["adamw"](layer.parameters())

    def closure() -> Tensor:
        gradient_step(stranger, inner, 1)
        optimizer.zero_grad()
        loss = layer(torch.ones(2, 4)).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert same(latents(layer), before)


def test_a_step_around_another_step_lifts_nothing() -> None:
    class Shrinking(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.mul_(0.5)
            return super().step(closure)

    layer = masked_layer()
    torch_rsst.freeze_masked(layer)
    before = latents(layer)
    train(layer, Shrinking(layer.parameters(), lr=0.1, momentum=0.9))
    assert same(latents(layer), before)


def test_a_step_that_raised_leaves_no_old_values_behind() -> None:
    layer = masked_layer()
    torch_rsst.freeze_masked(layer)
    optimizer = OPTIMIZERS["sgd"](layer.parameters())

    def failing() -> float:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        optimizer.step(failing)
    with torch.no_grad():
        layer.weight_orig.fill_(3.0)
    train(layer, optimizer, 1)
    assert bool((latents(layer) == 3.0).all())


def test_threads_freeze_their_own_models() -> None:
    def work(_: int) -> bool:
        layer = masked_layer()
        torch_rsst.freeze_masked(layer)
        before = latents(layer)
        train(layer, OPTIMIZERS["sgd"](layer.parameters()), 30)
        return same(latents(layer), before)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_a_freeze_does_not_keep_a_model_alive() -> None:
    reference = weakref.ref(masked := masked_layer())
    torch_rsst.freeze_masked(masked)
    del masked
    gc.collect()
    assert reference() is None


def test_freezing_again_replaces_and_the_old_handle_lifts_nothing() -> None:
    layer = masked_layer()
    first, second = torch_rsst.freeze_masked(layer), torch_rsst.freeze_masked(layer)
    assert len([each for each in freezing._FROZEN if each.module() is layer]) == 1
    first.remove()
    before = latents(layer)
    train(layer, OPTIMIZERS["adamw"](layer.parameters()))
    assert same(latents(layer), before)
    second.remove()
    second.remove()
    train(layer, OPTIMIZERS["adamw"](layer.parameters()))
    assert not same(latents(layer), before)


def test_nothing_is_held_between_steps() -> None:
    layer = masked_layer()
    torch_rsst.freeze_masked(layer)
    train(layer, OPTIMIZERS["sgd"](layer.parameters()), 1)
    assert [each._before for each in freezing._FROZEN if each.module() is layer] == [None]


def test_there_must_be_something_to_freeze() -> None:
    with pytest.raises(
        ValueError, match=r"model: expected masked parameters, got none\. Mask it first"
    ):
        torch_rsst.freeze_masked(linear())


def test_only_models_are_frozen() -> None:
    with pytest.raises(TypeError, match="model: expected a module, got dict"):
        torch_rsst.freeze_masked({})  # type: ignore[arg-type]


@every_optimizer
def test_zeros_of_removed_masks_stay_zero(make: Callable[[Any], Optimizer]) -> None:
    layer = linear()
    optimizer = make(layer.parameters())
    train(layer, optimizer)
    torch_rsst.apply_mask(layer, {"weight": MASK})
    assert torch_rsst.remove_all(layer, freeze_zeros=True) is layer
    before = layer.weight.detach().clone()
    train(layer, optimizer)
    assert (layer.weight == 0).tolist() == (~MASK).tolist()
    assert bool((layer.weight != before)[MASK].all())


def test_zeros_come_back_to_life_with_a_warning() -> None:
    layer = linear()
    optimizer = OPTIMIZERS["sgd"](layer.parameters())
    train(layer, optimizer)
    torch_rsst.apply_mask(layer, {"weight": MASK})
    with pytest.warns(torch_rsst.UnfrozenZerosWarning, match="Pass freeze_zeros=True to hold them"):
        torch_rsst.remove_all(layer)
    train(layer, optimizer, 2)
    assert int((layer.weight == 0).sum()) == 0


def _remove_all(layer: nn.Module, **options: Any) -> object:
    return torch_rsst.remove_all(layer, **options)


def _remove(layer: nn.Module, **options: Any) -> object:
    return torch_rsst.remove(layer, "weight", **options)


every_removal = pytest.mark.parametrize("remove", [_remove_all, _remove])


@every_removal
def test_the_warning_points_at_the_caller(remove: Callable[..., object]) -> None:
    layer = masked_layer()
    with pytest.warns(torch_rsst.UnfrozenZerosWarning, match="Pass freeze_zeros=True") as caught:
        remove(layer)
    assert caught[0].filename == __file__


@every_removal
@pytest.mark.parametrize("by", ["ours", "stock", "a stranger"])
def test_every_removal_holds_zeros_on_request(remove: Callable[..., object], by: str) -> None:
    layer = linear()
    if by == "ours":
        torch_rsst.apply_mask(layer, {"weight": MASK})
    elif by == "stock":
        torch_rsst.custom_from_mask(layer, "weight", MASK)
    else:
        Stranger.apply(layer, "weight")
    remove(layer, freeze_zeros=True)
    train(layer, OPTIMIZERS["adamw"](layer.parameters()))
    assert ((layer.weight == 0) == ~MASK).all()
    assert layer.weight.requires_grad


class Stranger(BasePruningMethod):
    """A method of somebody else, with a removal of its own."""

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        return MASK.to(default_mask)

    def remove(self, module: nn.Module) -> None:
        super().remove(module)


@pytest.mark.parametrize("choice", [True, False])
def test_a_choice_needs_no_warning(choice: bool) -> None:
    layer = torch_rsst.remove_all(masked_layer(), freeze_zeros=choice)  # warnings are errors here
    assert not torch_rsst.is_pruned(layer)


def test_no_zeros_no_warning() -> None:
    layer = linear()
    torch_rsst.remove_all(layer)
    torch_rsst.apply_mask(layer, {"weight": torch.ones_like(MASK)})
    torch_rsst.remove_all(layer)
    assert not torch_rsst.is_pruned(layer)


def test_removing_twice_does_nothing_the_second_time() -> None:
    layer = masked_layer()
    torch_rsst.remove_all(layer, freeze_zeros=True)
    weight = layer.weight.detach().clone()
    torch_rsst.remove_all(layer)
    train(layer, OPTIMIZERS["adamw"](layer.parameters()))
    assert (layer.weight == 0).tolist() == (weight == 0).tolist() == (~MASK).tolist()


def test_a_freeze_of_zeros_ends_for_good_once_masked_again() -> None:
    layer = masked_layer()
    torch_rsst.remove_all(layer, freeze_zeros=True)
    torch_rsst.apply_mask(layer, {"weight": ~MASK})
    with torch.no_grad():
        layer.weight_orig.fill_(5.0)
    torch_rsst.remove_all(layer, freeze_zeros=False)
    train(layer, OPTIMIZERS["sgd"](layer.parameters()), 1)
    assert bool((layer.weight[~MASK] != 0).all())


def test_a_layer_of_another_shape_is_no_longer_held() -> None:
    layer = masked_layer()
    torch_rsst.remove_all(layer, freeze_zeros=True)
    layer.weight, layer.bias = nn.Parameter(layer.weight[:2]), nn.Parameter(layer.bias[:2])
    with pytest.warns(torch_rsst.UnfrozenZerosWarning, match=ENDED) as caught:
        train(layer, OPTIMIZERS["sgd"](layer.parameters()), 1)
    assert bool((layer.weight != 0).any())
    assert len(caught) == 1
    train(layer, OPTIMIZERS["sgd"](layer.parameters()), 1)


def test_frozen_zeros_whose_parameter_is_gone_warn_at_the_next_step() -> None:
    layer = masked_layer()
    torch_rsst.remove_all(layer, freeze_zeros=True)
    layer.other = nn.Parameter(layer.weight.detach().clone())
    del layer.weight
    optimizer = OPTIMIZERS["sgd"](layer.parameters())
    with pytest.warns(torch_rsst.UnfrozenZerosWarning, match=ENDED):
        optimizer.step()


REPLACED = (
    r"freeze of 'weight' of Linear: expected the same module, got another one in its place: nothing "
    r"holds its entries from now on\. Freeze it after the module was changed, or mask it again\."
)


@pytest.mark.parametrize("frozen", ["zeros", "latents"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_freeze_that_ends_with_its_module_replaced_by_another_warns(
    frozen: str, wrapped: bool
) -> None:
    model = mlp()
    torch_rsst.l1_unstructured(model[0], "weight", amount=0.5)
    outer = nn.DataParallel(model) if wrapped else model
    if frozen == "zeros":
        torch_rsst.remove_all(outer, freeze_zeros=True)
    else:
        torch_rsst.freeze_masked(outer)
    new = nn.Linear(4, 8)
    new.weight = nn.Parameter(model[0].weight.detach().clone())
    model[0] = new
    gc.collect()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with pytest.warns(torch_rsst.UnfrozenZerosWarning, match=REPLACED):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()  # once


@pytest.mark.parametrize("after", ["frozen anew", "deleted", "the model is gone"])
def test_a_freeze_whose_module_is_gone_is_silent_where_nothing_is_left_to_hold(after: str) -> None:
    before = len(freezing._FROZEN)
    model = mlp()
    torch_rsst.l1_unstructured(model[0], "weight", amount=0.5)
    torch_rsst.remove_all(model, freeze_zeros=True)
    if after == "frozen anew":
        model[0] = nn.Linear(4, 8)
        torch_rsst.l1_unstructured(model[0], "weight", amount=0.5)
        torch_rsst.remove_all(model, freeze_zeros=True)
    elif after == "deleted":
        del model[0]
    else:
        model = mlp()
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OPTIMIZERS["sgd"](model.parameters()).step()
    assert len(freezing._FROZEN) == before + (after == "frozen anew")


def test_zeros_of_models_that_are_gone_are_forgotten_without_a_word() -> None:
    gc.collect()
    before = len(freezing._FROZEN)
    layer = masked_layer()
    torch_rsst.remove_all(layer, freeze_zeros=True)
    assert len(freezing._FROZEN) == before + 1
    del layer
    gc.collect()
    assert len(freezing._FROZEN) == before
    other = linear()
    train(other, OPTIMIZERS["sgd"](other.parameters()), 1)


class Quantizable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.fc = masked_layer()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dequant(self.fc(self.quant(x)))
        return y


def _prepares_for_quantization(model: nn.Module) -> None:
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(model.train(), inplace=True)


def _moves_to_another_module(model: nn.Module) -> None:
    fresh = nn.Linear(4, 3)
    fresh.weight = model.fc.weight
    model.fc = fresh


def _loads_by_assignment(model: nn.Module) -> None:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.requires_grad_()


def _normalizes_the_spectrum(model: nn.Module) -> None:
    parametrizations.spectral_norm(model.fc)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*quantization.*", "ignore:.*reduce_range.*")
@pytest.mark.parametrize("collect", [False, True])
@pytest.mark.parametrize(
    "work",
    [
        _prepares_for_quantization,
        _moves_to_another_module,
        _loads_by_assignment,
        _normalizes_the_spectrum,
    ],
)
def test_frozen_zeros_go_with_their_parameter_wherever_it_goes(
    work: Callable[[nn.Module], None], collect: bool
) -> None:
    model = Quantizable()
    torch_rsst.remove_all(model, freeze_zeros=True)
    work(model)
    if collect:
        gc.collect()
    train(model, OPTIMIZERS["adamw"](model.parameters()))
    assert ((model.fc.weight == 0) == ~MASK).all()


def test_zeros_that_end_with_their_parameter_under_weight_norm_warn() -> None:
    layer = masked_layer()
    torch_rsst.remove_all(layer, freeze_zeros=True)
    parametrizations.weight_norm(layer)  # two parameters of its own
    with pytest.warns(torch_rsst.UnfrozenZerosWarning, match="freeze of 'weight'"):
        train(layer, OPTIMIZERS["adamw"](layer.parameters()))


def test_latents_stay_frozen_in_the_module_that_takes_the_place_of_another() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    alive = torch.tensor([True, False, True, True])
    torch_rsst.apply_mask(model, {"1.weight": alive})
    torch_rsst.freeze_masked(model)
    with torch_rsst.dense_weights(model):
        fresh = nn.BatchNorm1d(4)
        fresh.weight = model[1].weight
        model[1] = fresh
    del fresh
    gc.collect()
    before = model[1].weight_orig.detach().clone()
    train(model, OPTIMIZERS["adamw"](model.parameters()))
    assert ((model[1].weight_orig == before) == ~alive).all()


def test_a_new_mask_decides_again_about_frozen_zeros() -> None:
    layer = masked_layer()
    torch_rsst.remove_all(layer, freeze_zeros=True)
    torch_rsst.apply_mask(layer, {"weight": torch.ones_like(MASK)})
    train(layer, OPTIMIZERS["adamw"](layer.parameters()))
    assert int((layer.weight == 0).sum()) == 0


def test_frozen_zeros_follow_a_change_of_device_and_dtype() -> None:
    layer = masked_layer()
    torch_rsst.remove_all(layer, freeze_zeros=True)
    layer.double()
    optimizer = OPTIMIZERS["adamw"](layer.parameters())
    layer(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert (layer.weight == 0).tolist() == (~MASK).tolist()


def test_a_failing_removal_removes_nothing(
    fingerprint: Callable[[nn.Module], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch_rsst.masking import masked_parameter

    model = mlp()
    torch_rsst.apply_mask(model, {"0.weight": torch.eye(8, 4), "2.weight": torch.eye(2, 8)})
    before = fingerprint(model)
    original, seen = masked_parameter.make_plain, []

    def failing_late(module: nn.Module, name: str) -> None:
        seen.append(module)
        if len(seen) == 2:
            raise KeyboardInterrupt
        original(module, name)

    monkeypatch.setattr(masked_parameter, "make_plain", failing_late)
    with pytest.raises(KeyboardInterrupt):
        torch_rsst.remove_all(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize(("kind", "rule"), [("RSST", {"kept_units": "sparse"}), ("Refill", {})])
def test_rounds_freeze_masked_latents(kind: str, rule: dict[str, str], freeze: bool) -> None:
    model = mlp()
    groups = torch_rsst.find_groups(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    rounds = getattr(torch_rsst, kind)(
        model, groups, optimizer=optimizer, steps_per_round=4, rounds=2, regroup_amount=0.5,
        freeze_masked=freeze, **rule,
    )  # fmt: skip
    for rnd in rounds:
        dead = {n: ~m for n, m in torch_rsst.extract_mask(model).items()}
        before = {n: model.get_parameter(f"{n}_orig").detach().clone() for n in dead}
        for number in range(rnd.start_step, 4):
            gradient_step(model, optimizer, number)
        moved = [bool((model.get_parameter(f"{n}_orig") != before[n])[dead[n]].any()) for n in dead]
        assert any(moved) is not freeze
    rounds.finalize(force=True)


def test_fillback_freezes_what_stays_masked() -> None:
    layer = masked_layer()
    torch_rsst.fillback(layer, "weight", 1, freeze_masked=True)
    dead = layer.weight_mask == 0
    before = layer.weight_orig[dead].clone()
    train(layer, OPTIMIZERS["adamw"](layer.parameters()))
    assert int(dead.sum()) == 3
    assert same(layer.weight_orig[dead], before)


@pytest.mark.parametrize(
    "remove", [torch_rsst.remove_all, lambda layer: torch_rsst.remove(layer, "weight")]
)
def test_a_removal_whose_warning_is_an_error_removes_nothing(remove) -> None:
    layer = masked_layer()
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch_rsst.UnfrozenZerosWarning)
        with pytest.raises(torch_rsst.UnfrozenZerosWarning, match="come back to life"):
            remove(layer)
    assert "weight_mask" in dict(layer.named_buffers())


class PullsBack(Optimizer):
    """An optimizer around another one, which writes to the parameters after its step."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})
        self.inner = inner

    def step(self, closure: Any = None) -> None:
        self.inner.step(closure)
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.mul_(0.5)


def test_what_is_frozen_is_held_when_the_optimizer_around_another_one_is_done() -> None:
    model = mlp()
    torch_rsst.l1_unstructured(model[0], "weight", 0.5)
    torch_rsst.freeze_masked(model)
    gone = model[0].weight_mask == 0
    before = model[0].weight_orig.detach().clone()
    optimizer = PullsBack(torch.optim.AdamW(model.parameters(), lr=0.1))
    for number in range(3):
        gradient_step(model, optimizer, number)
    assert torch.equal(model[0].weight_orig[gone], before[gone])
    assert not torch.equal(model[0].weight_orig[~gone], before[~gone])
    own = [each for each in freezing._FROZEN if each.module() is model[0]]
    assert [each._before for each in own] == [None]

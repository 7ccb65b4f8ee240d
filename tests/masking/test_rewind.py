"""Rewinding: what a snapshot holds, that it is a copy, and what is put back."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import linear, mlp, same
from torch import Tensor, nn

import torch_rsst
from torch_rsst import apply_mask
from torch_rsst.masking.names import named_buffers
from torch_rsst.masking.rewind import Snapshot


class Normed(nn.Module):
    """With buffers of a norm, one of its own whose name looks like a mask's, and one unsaved."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = linear(), nn.BatchNorm1d(3)
        self.register_buffer("causal_mask", torch.arange(3.0))
        self.register_buffer("unsaved", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc(x))


def disturb(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.add_(1)


def test_none_rewinds_nothing():
    snapshot = Snapshot.of(linear(), None)
    model = linear(seed=3)
    snapshot.restore(model)
    assert same(model.weight, linear(seed=3).weight)
    assert snapshot.state() == {"weights": {}, "buffers": {}}


@pytest.mark.parametrize("rewind", ["init", "state_dict"])
def test_the_snapshot_is_a_copy_and_restores_parameters_and_buffers(rewind):
    model, fresh = Normed(), Normed()
    snapshot = Snapshot.of(model, rewind if rewind == "init" else model.state_dict())
    disturb(model)
    snapshot.restore(model)
    for (name, found), (_, expected) in zip(
        model.state_dict().items(), fresh.state_dict().items(), strict=True
    ):
        assert same(found, expected), name
    assert same(model.unsaved, torch.zeros(2) + (rewind == "state_dict"))
    disturb(model)
    snapshot.restore(model)
    assert same(model.fc.weight, fresh.fc.weight)


def test_parameters_and_buffers_keep_their_identity():
    model = Normed()
    before = [id(t) for t in (*model.parameters(), *model.buffers())]
    Snapshot.of(model, "init").restore(model)
    assert [id(t) for t in (*model.parameters(), *model.buffers())] == before


@given(bits=st.lists(st.booleans(), min_size=12, max_size=12))
def test_only_surviving_entries_return(bits):
    model, first = linear(), linear().weight
    snapshot = Snapshot.of(model, "init")
    alive = torch.tensor(bits).reshape(3, 4)
    disturb(model)
    apply_mask(model, {"weight": alive})
    drifted = model.weight_orig.detach().clone()
    snapshot.restore(model)
    for i in range(3):
        for j in range(4):
            expected = first[i, j] if alive[i, j] else drifted[i, j]
            assert same(model.weight_orig[i, j], expected)


def test_masks_are_not_rewound():
    model = linear()
    apply_mask(model, {"weight": torch.eye(3, 4) > 0})
    snapshot = Snapshot.of(model, "init")
    apply_mask(model, {"weight": torch.ones(3, 4)})
    snapshot.restore(model)
    assert bool(model.weight_mask.all())
    assert snapshot.buffers == {}


@pytest.mark.parametrize("pruned_then", [False, True])
@pytest.mark.parametrize("pruned_now", [False, True])
def test_a_state_dict_fits_before_and_after_pruning(pruned_then, pruned_now):
    earlier, model = mlp(), mlp(seed=3)
    mask = {"0.weight": torch.ones(8, 4)}
    if pruned_then:
        apply_mask(earlier, mask)
    if pruned_now:
        apply_mask(model, mask)
    Snapshot.of(model, earlier.state_dict()).restore(model)
    weight = model[0].weight_orig if pruned_now else model[0].weight
    assert same(weight, mlp()[0].weight)


def test_the_state_dict_of_a_compiled_model_fits():
    model = mlp(seed=3)
    wrapped = {f"_orig_mod.{name}": value for name, value in mlp().state_dict().items()}
    Snapshot.of(model, wrapped).restore(model)
    assert same(model[0].weight, mlp()[0].weight)


@pytest.mark.parametrize("given", ["of the wrapper", "of the model", "of a replicated wrapper"])
def test_a_model_whose_only_child_is_called_module_is_rewound(given):
    wrapper = nn.Module()
    wrapper.module = Normed()
    states = {
        "of the wrapper": wrapper.state_dict(),
        "of the model": wrapper.module.state_dict(),
        "of a replicated wrapper": nn.DataParallel(wrapper).state_dict(),
    }
    snapshot, before = Snapshot.of(wrapper, states[given]), copy.deepcopy(wrapper.state_dict())
    disturb(wrapper.module)
    snapshot.restore(wrapper)
    assert all(same(value, before[name]) for name, value in wrapper.state_dict().items())


def test_a_state_round_trips_as_copies():
    model = Normed()
    snapshot = Snapshot.of(model, "init")
    state = snapshot.state()
    again = Snapshot.from_state(state)
    state["weights"]["fc.weight"].zero_()
    disturb(model)
    again.restore(model)
    assert same(model.fc.weight, linear().weight)
    assert same(model.norm.running_mean, torch.zeros(3))


def _without(name: str) -> dict[str, Tensor]:
    return {k: v for k, v in Normed().state_dict().items() if k != name}


@pytest.mark.parametrize(
    ("rewind", "error", "text"),
    [
        ("initial", ValueError, r"rewind: expected one of 'init', got 'initial'\. Did you mean"),
        (3, TypeError, "expected None, 'init' or a state dict, got int"),
        (
            _without("fc.weight"),
            ValueError,
            r"got none for 'fc\.weight'\. Pass the full state dict",
        ),
        ({**_without(""), "fc.bias": torch.ones(9)}, ValueError, r"none for 'fc\.bias'"),
        ({**_without(""), "norm.running_var": torch.ones(9)}, ValueError, r"'norm\.running_var'"),
        ({**_without(""), "fc.bias": 1.0}, ValueError, r"none for 'fc\.bias'"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_changed(rewind, error, text):
    model = Normed()
    with pytest.raises(error, match=text):
        Snapshot.of(model, rewind)
    assert same(model.fc.weight, linear().weight)


def test_a_buffer_of_two_modules_is_kept_once_and_stays_shared() -> None:
    model = nn.ModuleList([nn.Module(), nn.Module()])
    shared = torch.zeros(2)
    for part in model:
        part.register_buffer("table", shared)
    snapshot = Snapshot.of(model, "init")
    assert list(snapshot.buffers) == ["0.table"]
    assert list(named_buffers(model)) == ["0.table", "1.table"]
    shared.fill_(1.0)
    snapshot.restore(model)
    assert model[0].table is model[1].table is shared
    assert shared.tolist() == [0.0, 0.0]


def test_a_shared_buffer_that_is_not_written_in_place_is_put_back_in_both_modules() -> None:
    model = nn.ModuleList([nn.Module(), nn.Module()])
    for part in model:
        part.register_buffer("table", torch.zeros(()))
    model[0].table = model[1].table = torch.zeros(1).expand(3)
    snapshot = Snapshot.of(model, "init")
    model[0].table = model[1].table = torch.ones(1).expand(3)
    snapshot.restore(model)
    assert model[0].table is model[1].table
    assert model[1].table.tolist() == [0.0, 0.0, 0.0]


def test_a_buffer_that_has_had_another_shape_does_not_become_the_snapshot() -> None:
    model = nn.Module()
    model.register_buffer("statistic", torch.zeros(4))
    snapshot = Snapshot.of(model, "init")
    model.statistic = torch.ones(2)
    snapshot.restore(model)
    model.statistic.add_(1.0)
    snapshot.restore(model)
    assert model.statistic.tolist() == [0.0] * 4


def test_a_mask_that_is_registered_under_another_name_as_well_is_not_rewound() -> None:
    model = linear()
    torch_rsst.apply_mask(model, {"weight": torch.ones_like(model.weight)})
    model.register_buffer("kept", model.weight_mask)
    snapshot = Snapshot.of(model, "init")
    assert not snapshot.buffers
    torch_rsst.apply_mask(model, {"weight": torch.zeros_like(model.weight)})
    snapshot.restore(model)
    assert not model.weight_mask.any()


def test_buffers_that_a_state_dict_lacks_stay():
    model = Normed()
    snapshot = Snapshot.of(model, _without("norm.running_mean"))
    disturb(model)
    snapshot.restore(model)
    assert same(model.norm.running_mean, torch.ones(3))

"""Where outputs of units are recorded: parameters of wider modules, recurrent layers, packed sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_rsst
from torch_rsst import find_groups, measure_importance, regroup


class HeldWeights(nn.Module):
    """An MLP whose weights are its own parameters, as wide inside as outside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(8, 8))
        self.outer = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.inner) @ self.outer


@pytest.mark.parametrize("name", ["variance", "activation_l2"])
def test_a_weight_that_is_a_parameter_of_a_wider_module_is_measured_where_it_is_multiplied(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), HeldWeights(), nn.Linear(8, 3)).double()
    x = torch.randn(32, 8, dtype=torch.float64)
    groups = [
        layer
        for layer in find_groups(model, example_inputs=x).layers
        if any((m.parameter, m.dim) == ("1.outer", 0) for m in layer.members)
    ]
    found = measure_importance(model, groups, name, batches=[x])(groups[0], {}, {})
    hidden = torch.relu(model[0](x) @ model[1].inner)
    if name == "variance":
        expected = hidden.square().mean(0) * model[1].outer.square().sum(1)
    else:
        expected = hidden.square().mean(0).sqrt()
    torch.testing.assert_close(found / found.sum(), expected / expected.sum())


class Recurrent(nn.Module):
    def __init__(self, packed: bool, layers: int = 1) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 8, layers, batch_first=True)
        self.head = nn.Linear(8, 3)
        self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        given: Any = x
        if self.packed:
            given = nn.utils.rnn.pack_padded_sequence(x, [5, 3], batch_first=True)
        out, _ = self.rnn(given)
        return self.head(out.data)


@pytest.mark.parametrize("packed", [False, True])
def test_hidden_units_of_a_recurrent_layer_are_measured_behind_it_not_at_its_input(packed):
    torch.manual_seed(0)
    model, x = Recurrent(packed).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    groups = find_groups(Recurrent(False), example_inputs=x.float())
    found = measure_importance(model, groups, "variance", batches=[x])(groups.layers[0], {}, {})
    given: Any = nn.utils.rnn.pack_padded_sequence(x, [5, 3], batch_first=True) if packed else x
    states = model.rnn(given)[0].data.reshape(-1, 8)
    expected = states.square().mean(0) * model.head.weight.square().sum(0)
    torch.testing.assert_close(found / found.sum(), expected / expected.sum())


def test_packed_sequences_are_measured_at_the_input_of_a_recurrent_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LSTM(8, 8, batch_first=True))
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(2, 5, 4), [5, 3], batch_first=True)

    def forward(model: nn.Module, batch: Any) -> Any:
        return model[1](batch._replace(data=model[0](batch.data)))

    groups = find_groups(model, example_inputs=torch.randn(2, 5, 4))
    found = measure_importance(
        model, groups, "activation_l2", batches=lambda: [packed], forward=forward
    )
    assert (
        found(groups.layers[0], {}, {}).argmax() == model[0](packed.data).square().sum(0).argmax()
    )


def test_units_that_only_the_recurrence_itself_reads_are_refused_by_name():
    model = nn.Sequential(nn.LSTM(8, 8, batch_first=True))
    index = torch.arange(8)
    layer = torch_rsst.GroupLayer(
        "0",
        "neurons",
        8,
        (
            torch_rsst.Member("0.weight_ih_l0", 0, index.repeat(4), ranked=True),
            torch_rsst.Member("0.weight_hh_l0", 1, index, ranked=True, consumes=True),
        ),
    )
    text = (
        "expected a member that consumes the units, got 0.weight_hh_l0, which a LSTM applies within "
        "itself. Pass importance='magnitude', or leave out these units"
    )
    with pytest.raises(ValueError, match=text):
        regroup(model, [layer], importance="variance", batches=[torch.randn(2, 5, 8)])

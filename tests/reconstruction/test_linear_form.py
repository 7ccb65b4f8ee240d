"""Layers as linear maps, against the layers themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torch_rsst.reconstruction.linear_form import linear_form, outputs_of


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor]:
    ndim, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3]))
    transposed = draw(st.booleans())
    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d) if transposed else (
        nn.Conv1d, nn.Conv2d, nn.Conv3d
    )  # fmt: skip
    sizes = st.tuples(*[st.integers(1, 3)] * ndim)
    options: dict[str, Any] = {"kernel_size": draw(sizes), "stride": draw(sizes)}
    options |= {"dilation": draw(st.tuples(*[st.integers(1, 2)] * ndim)), "groups": groups}
    options["padding"] = draw(st.tuples(*[st.integers(0, 2)] * ndim))
    if transposed:
        options["output_padding"] = tuple(
            draw(st.integers(0, max(s, d) - 1))
            for s, d in zip(options["stride"], options["dilation"], strict=True)
        )
    else:
        options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "circular"]))
        if draw(st.booleans()):
            options |= {"padding": "same", "stride": 1}
    channels = draw(st.integers(1, 2)) * groups, draw(st.integers(1, 2)) * groups
    layer = kinds[ndim - 1](*channels, bias=draw(st.booleans()), **options).double()
    lead = (draw(st.integers(1, 2)),) if draw(st.booleans()) else ()
    return layer, torch.randn(*lead, channels[0], *[7] * ndim, dtype=torch.float64)


@given(convolutions())
def test_convolutions_of_all_kinds(drawn):
    layer, x = drawn
    form = linear_form(layer, 1)
    assert form.convolution is layer
    got = outputs_of(form, form.features(x), layer.weight, layer.bias)
    torch.testing.assert_close(got, form.flat(layer(x)))
    assert torch.equal(form.weight(form.matrix(layer.weight)), layer.weight)


@given(convolutions())
def test_chunks_are_the_whole(drawn):
    layer, x = drawn
    form = linear_form(layer, 1)
    parts = [form.features(part) for part in form.chunks(x)]
    torch.testing.assert_close(torch.cat(parts, 1), form.features(x))


def test_large_inputs_come_in_several_chunks(monkeypatch):
    monkeypatch.setattr("torch_rsst.reconstruction.linear_form._CHUNK", 40)
    for layer, x in (
        (nn.Linear(5, 2), torch.randn(3, 7, 5)),
        (nn.Conv2d(2, 3, 3), torch.randn(4, 2, 5, 5)),
    ):
        form = linear_form(layer, 1)
        parts = [form.features(part) for part in form.chunks(x)]
        assert len(parts) > 1
        assert torch.equal(torch.cat(parts, 1), form.features(x))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,)])
def test_linear_layers_of_any_leading_dimensions(lead):
    layer, x = nn.Linear(4, 3), torch.randn(*lead, 4)
    form = linear_form(layer, 1)
    got = outputs_of(form, form.features(x), layer.weight, layer.bias)
    torch.testing.assert_close(got, form.flat(layer(x)))
    assert torch.equal(form.weight(form.matrix(layer.weight)), layer.weight)


def test_layers_that_store_their_weight_transposed():
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))

    layer, x = Conv1D(), torch.randn(5, 4)
    form = linear_form(layer, 0)
    got = outputs_of(form, form.features(x), layer.weight, layer.bias)
    torch.testing.assert_close(got[0], x @ layer.weight + layer.bias)
    assert torch.equal(form.weight(form.matrix(layer.weight)), layer.weight)


def test_layers_of_no_known_kind():
    assert linear_form(nn.LayerNorm(3), 0) is None
    assert linear_form(nn.ReLU(), 0) is None

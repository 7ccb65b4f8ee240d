"""Pictures show the numbers they are given."""

from __future__ import annotations

import math

import pytest
import torch

import torch_rsst

pytest.importorskip("matplotlib", reason="matplotlib is an extra")


def layer(heads=2, rows=8, **options):
    return torch_rsst.head_layer("weight", rows=rows, num_heads=heads, projections=1, **options)


def report_with_one_dead_head():
    linear = torch.nn.Linear(4, 8, bias=False)
    mask = torch.ones(8, 4, dtype=torch.bool)
    mask[:4] = False
    torch_rsst.apply_mask(linear, {"weight": mask})
    return torch_rsst.sparsity_report(linear, layer())


def test_head_map_shows_alive_shares_and_says_which_are_gone():
    figure = torch_rsst.plot.head_map(report_with_one_dead_head())
    axes = figure.axes[0]
    assert axes.images[0].get_array().tolist() == [[0.0, 1.0]]
    assert [text.get_text() for text in axes.texts] == ["gone", "100%"]
    assert axes.get_title() == "1 of 2 heads gone"


def test_head_map_of_a_kind_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="no neurons; it has heads"):
        torch_rsst.plot.head_map(report_with_one_dead_head(), kind="neurons")


def test_schedule_starts_anew_in_every_round():
    figure = torch_rsst.plot.schedule("linear", steps=4, rounds=2, strength=1.0)
    lines = figure.axes[0].lines[:2]  # the third marks the boundary
    assert [line.get_ydata().tolist() for line in lines] == [[0.25, 0.5, 0.75, 1.0]] * 2
    assert [line.get_xdata().tolist() for line in lines] == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_schedule_shows_what_shrink_to_makes_of_it():
    figure = torch_rsst.plot.schedule("linear", steps=20, shrink_to=0.05)
    assert figure.axes[0].get_title() == "Penalty: linear, shrinks to 0.05"
    left = math.prod(1 - value for value in figure.axes[0].lines[0].get_ydata())
    assert left == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("schedule", "title"),
    [
        ("exp_custom_exponents", "Penalty: late_exponential, strength 0.3"),
        (torch_rsst.schedules.Polynomial(4, 0.2), "Penalty: Polynomial(power=4, strength=0.2)"),
        (math.sqrt, "Penalty: sqrt"),
    ],
)
def test_schedule_is_titled_by_the_name_that_is_shown(schedule, title):
    figure = torch_rsst.plot.schedule(schedule, steps=4, strength=0.3)
    assert figure.axes[0].get_title() == title


@pytest.mark.parametrize("dim", [0, 1])
def test_mask_frames_every_head_and_marks_dead_ones(dim):
    mask = torch.ones(8, 8)
    mask.narrow(dim, 4, 4).zero_()
    axes = torch_rsst.plot.mask(mask, layer(dim=dim), "weight").axes[0]
    assert axes.get_title() == "weight\n1 of 2 heads gone, 50% alive"
    assert [text.get_text() for text in axes.texts] == ["head 0", "head 1"]
    assert [text.get_color() for text in axes.texts] == ["tab:blue", "tab:red"]


def test_mask_of_a_convolution_is_flattened():
    axes = torch_rsst.plot.mask(torch.ones(8, 3, 2, 2), layer(), "weight").axes[0]
    assert axes.images[0].get_array().shape == (8, 12)


def test_mask_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="expected 8 entries along dim 0"):
        torch_rsst.plot.mask(torch.ones(6, 4), layer(), "weight")
    with pytest.raises(ValueError, match="has no member 'bias'"):
        torch_rsst.plot.mask(torch.ones(8, 4), layer(), "bias")


def test_history_draws_rounds_where_they_end_and_the_cut():
    records = [
        {"event": "epoch", "stage": "dense", "epoch": 0, "accuracy": 50.0},
        {"event": "epoch", "stage": "round 0", "epoch": 1, "accuracy": 60.0},
        {"event": "epoch", "stage": "round 0", "epoch": 2, "accuracy": 70.0},
        {
            "event": "round",
            "round": 0,
            "element_sparsity": 0.2,
            "share_gone": {"heads": 0.0},
            "share_to_go": {"heads": 0.5},
        },
    ]
    top, bottom = torch_rsst.plot.history(records, final=report_with_one_dead_head()).axes
    assert top.lines[0].get_ydata().tolist() == [50.0, 60.0, 70.0]
    gone, to_go, masked = bottom.lines[:3]
    assert (gone.get_xdata().tolist(), gone.get_ydata().tolist()) == ([3, 3], [0.0, 0.5])
    assert (to_go.get_xdata().tolist(), to_go.get_ydata().tolist()) == ([3], [0.5])
    assert masked.get_ydata().tolist() == [0.2, 0.5]


def test_comparison_has_a_point_for_each_model_in_both_panels():
    points = {"half": (97.0, 0.55, 0.6), "quarter": (94.0, 0.3, 1.2)}
    left, right = torch_rsst.plot.comparison(points, dense=97.5).axes
    for axes, place in ((left, 1), (right, 2)):
        dense, *lines = axes.lines
        assert set(dense.get_ydata()) == {97.5}
        drawn = {line.get_label(): (line.get_ydata()[0], line.get_xdata()[0]) for line in lines}
        assert drawn == {name: (values[0], values[place]) for name, values in points.items()}
    assert right.get_xlim()[1] > 1.2

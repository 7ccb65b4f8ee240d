import numpy as np
import pytest
import torch

from torch_rsst.utils.errors import (
    InertPenaltyWarning,
    RoundWarning,
    RSSTWarning,
    UnsupportedModuleWarning,
    check_choice,
    check_type,
    listing,
    message,
    missing_package,
    shown,
    unknown_choice,
)


def test_a_message_has_subject_expectation_finding_and_remedy() -> None:
    text = message("amount", expected="a fraction", got=2, remedy="Try 0.5.")
    assert text == "amount: expected a fraction, got 2. Try 0.5."


def test_an_unknown_name_lists_all_choices_and_the_nearest() -> None:
    text = unknown_choice("scope", "layr", ["layer", "type", "global"])
    assert "'layer', 'type', 'global'" in text
    assert "Did you mean 'layer'?" in text


@pytest.mark.parametrize("got", ["zzzz", 3, None])
def test_an_unknown_name_with_nothing_near_suggests_nothing(got: object) -> None:
    text = unknown_choice("scope", got, ["layer", "type"])
    assert "Did you mean" not in text
    assert repr(got) in text


@pytest.mark.parametrize(
    ("names", "limit", "text"),
    [
        ([], 2, ""),
        (["a"], 2, "'a'"),
        (["a", "b"], 2, "'a', 'b'"),
        (["a", "b", "c"], 2, "'a', 'b' and 1 more"),
        ((n for n in "abcd"), 1, "'a' and 3 more"),
    ],
)
def test_listing_names_the_first_few(names: list[str], limit: int, text: str) -> None:
    assert listing(names, limit) == text


@pytest.mark.parametrize("kind", [InertPenaltyWarning, RoundWarning, UnsupportedModuleWarning])
def test_one_filter_reaches_every_warning(kind: type[Warning]) -> None:
    assert issubclass(kind, RSSTWarning)
    assert issubclass(kind, UserWarning)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (("weight", 1.5), "('weight', 1.5)"),
        (["weight"], "['weight']"),
        (torch.nn.Parameter(torch.ones(2, 3)), "a Parameter of shape (2, 3)"),
        (("fc.weight", torch.ones(2)), "('fc.weight', a Tensor of shape (2,))"),
        (torch.nn.Linear(2, 3), "Linear(in_features=2, out_features=3, bias=True)"),
        (torch.nn.Sequential(torch.nn.Linear(2, 3)), "a Sequential"),
        ([1, 2, 3, 4], "a list of 4"),
        (["a", ["b"]], "a list of 2"),
        (torch.nn.parameter.UninitializedParameter(), "<UninitializedParameter>"),
        (torch.Tensor, "<class 'torch.Tensor'>"),
        ("x" * 100, "a str"),
        (None, "None"),
    ],
)
def test_what_was_given_is_shown_in_a_line(value: object, text: str) -> None:
    assert shown(value) == text


def test_what_compares_entry_by_entry_is_no_choice():
    with pytest.raises(ValueError, match="scope: expected one of 'layer', 'type', got a ndarray"):
        check_choice("scope", np.array(["layer", "type"]), ["layer", "type"])
    check_choice("scope", "type", ["layer", "type"])


def test_a_value_of_another_kind_is_named_by_its_type() -> None:
    check_type({}, (dict, list), "state", "a dict or a list", "Pass one.")
    with pytest.raises(
        TypeError, match=r"^state: expected a dict or a list, got int\. Pass one\.$"
    ):
        check_type(3, (dict, list), "state", "a dict or a list", "Pass one.")


def test_a_missing_package_is_named_with_what_to_do() -> None:
    error = missing_package(ModuleNotFoundError("", name="onnx"), "export", "Install it.")
    assert (error.name, str(error)) == ("onnx", "export: expected onnx, got none. Install it.")

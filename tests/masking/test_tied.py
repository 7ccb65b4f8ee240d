"""A parameter that several modules share has one mask for all of them, whichever call sets it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.utils import prune as stock

import torch_rsst
from torch_rsst.masking import tied
from torch_rsst.testing import assert_mask_invariants

pytestmark = pytest.mark.filterwarnings("ignore::torch_rsst.UnfrozenZerosWarning")

Fingerprint = Callable[[nn.Module], list[Any]]
TOKENS = torch.arange(6)
REFUSED = (
    r"tied parameter 'embed\.weight': expected one mask for all that share it, got (none for some of "
    r"them|different ones)\. Call torch_rsst\.refresh\(model\) .* or torch_rsst\.apply_mask"
)


class Language(nn.Module):
    """As language models: the head's weight is that of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp = nn.Embedding(6, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.embed.weight = self.head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        return self.head(hidden + self.mlp(hidden).relu())


def made() -> Language:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Language()


def half() -> torch.Tensor:
    return torch.arange(24).reshape(6, 4) % 3 != 0


CALLS: dict[str, Callable[[nn.Module], object]] = {
    "identity": lambda m: torch_rsst.identity(m, "weight"),
    "l1_unstructured": lambda m: torch_rsst.l1_unstructured(m, "weight", 0.5),
    "random_unstructured": lambda m: torch_rsst.random_unstructured(m, "weight", 0.5),
    "ln_structured": lambda m: torch_rsst.ln_structured(m, "weight", 0.5, n=2, dim=0),
    "random_structured": lambda m: torch_rsst.random_structured(m, "weight", 0.5, dim=1),
    "custom_from_mask": lambda m: torch_rsst.custom_from_mask(m, "weight", half()),
    "global_unstructured": lambda m: torch_rsst.global_unstructured(
        [(m, "weight")], torch_rsst.L1Unstructured, amount=0.5
    ),
    "GlobalL1": lambda m: torch_rsst.GlobalL1.apply(m, "weight", 0.5),
    "head_structured": lambda m: torch_rsst.head_structured(m, "weight", 1, 2, projections=1),
    "apply_mask": lambda m: torch_rsst.apply_mask(m, {"weight": half()}),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
owners = pytest.mark.parametrize("owner", ["embed", "head"])


def assert_agrees(model: nn.Module) -> None:
    """Masks, checkpoints, removal and forward pass tell the same of a model."""
    assert_mask_invariants(model)
    masks, output = torch_rsst.extract_mask(model), model(TOKENS)
    dtype = next(model.parameters()).dtype
    fresh, again = made().to(dtype), made().to(dtype)
    torch_rsst.prepare_from_state_dict(fresh, model.state_dict())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(TOKENS), output)
    plain = torch_rsst.remove_all(copy.deepcopy(model))
    assert torch.equal(plain(TOKENS), output)
    assert plain.embed.weight is plain.head.weight
    again.load_state_dict(plain.state_dict())
    torch_rsst.apply_mask(again, masks)
    assert torch.equal(again(TOKENS), output)
    with torch_rsst.dense_weights(fresh):
        assert torch.equal(fresh(TOKENS), output)
        assert fresh.embed.weight is fresh.head.weight


def assert_shared(model: nn.Module) -> None:
    assert model.embed.weight_orig is model.head.weight_orig
    assert model.embed.weight_mask is model.head.weight_mask


@owners
@every_call
def test_masking_one_owner_masks_all(call: Callable[[nn.Module], object], owner: str) -> None:
    model = made()
    names = [name for name, _ in model.named_parameters()]
    call(getattr(model, owner))
    assert_shared(model)
    assert_agrees(model)
    assert [name.removesuffix("_orig") for name, _ in model.named_parameters()] == names


@owners
@every_call
def test_masking_one_owner_again_after_a_conversion_masks_all(
    call: Callable[[nn.Module], object], owner: str
) -> None:
    model = made()
    torch_rsst.apply_mask(model.head, {"weight": half().logical_not()})
    model.double()  # which converts the buffer once for each module
    assert model.embed.weight_mask is not model.head.weight_mask
    assert_agrees(model)
    call(getattr(model, owner))
    assert_shared(model)
    assert_agrees(model)


@owners
def test_the_mask_is_the_one_that_an_untied_weight_gets(owner: str) -> None:
    model = made()
    alone = nn.Linear(4, 6, bias=False)
    alone.load_state_dict(model.head.state_dict())
    torch_rsst.l1_unstructured(alone, "weight", 0.4)
    torch_rsst.l1_unstructured(getattr(model, owner), "weight", 0.4)
    assert torch.equal(model.embed.weight_mask, alone.weight_mask)
    torch_rsst.fillback(getattr(model, owner), "weight", 0.5, policy="zero")
    torch_rsst.fillback(alone, "weight", 0.5, policy="zero")
    assert torch.equal(model.head.weight_mask, alone.weight_mask)
    assert_agrees(model)


@owners
@pytest.mark.parametrize(
    "remove",
    [
        lambda m: torch_rsst.remove(m, "weight", freeze_zeros=False),
        lambda m: torch_rsst.remove_all(m, freeze_zeros=False),
        lambda m: stock.remove(m, "weight"),
    ],
    ids=["remove", "remove_all", "stock"],
)
@pytest.mark.parametrize("by", ["apply_mask", "l1_unstructured"])
def test_removing_at_one_owner_removes_at_all(owner: str, remove: Any, by: str) -> None:
    model = made()
    CALLS[by](model.embed)
    output = model(TOKENS)
    remove(getattr(model, owner))
    assert model.embed.weight is model.head.weight
    assert torch_rsst.extract_mask(model) == {}
    assert not model.embed._forward_pre_hooks
    assert not model.head._forward_pre_hooks
    assert torch.equal(model(TOKENS), output)


def test_owners_in_other_models_and_under_other_names_are_masked_and_copies_are_not() -> None:
    model, other = made(), nn.Module()
    average = copy.deepcopy(model)
    other.table = model.head.weight
    other.list = nn.ParameterList([model.head.weight])
    torch_rsst.l1_unstructured(model.head, "weight", 0.5)
    assert other.table_mask is model.head.weight_mask
    assert torch.equal(other.list[0], model.head.weight)
    assert torch_rsst.extract_mask(average) == {}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_traced_modules_stay_as_they_were_traced() -> None:
    layer = nn.Linear(4, 6)
    x = torch.ones(1, 4)
    traced, before = torch.jit.trace(layer, x), layer(x)
    torch_rsst.l1_unstructured(layer, "weight", 0.5)
    assert torch.equal(traced(x), before)
    assert not torch.equal(layer(x), before)


@every_call
def test_where_one_owner_cannot_be_masked_nothing_is(
    call: Callable[[nn.Module], object], fingerprint: Fingerprint
) -> None:
    model = made()
    model.embed.weight_mask = 3
    before = fingerprint(model)[1:]
    with pytest.raises(ValueError, match=r"'weight' of Embedding: expected .* to be free names"):
        call(model.head)
    assert fingerprint(model)[1:] == before


def half_tied(kind: str) -> Language:
    """What the stock module makes of a model; it cannot be changed."""
    model = made()
    stock.l1_unstructured(model.head, "weight", 0.5)
    if kind == "two masks":
        stock.custom_from_mask(model.embed, "weight", half())
    return model


WHOLE: dict[str, Callable[[nn.Module], object]] = {
    "extract_mask": torch_rsst.extract_mask,
    "extract_mask of a state dict": lambda m: torch_rsst.extract_mask(m.state_dict()),
    "prepare_from_state_dict": lambda m: torch_rsst.prepare_from_state_dict(made(), m.state_dict()),
    "apply_mask of others": lambda m: torch_rsst.apply_mask(m, {"mlp.bias": torch.ones(4)}),
    "remove_all": torch_rsst.remove_all,
    "find_groups": torch_rsst.find_groups,
    "freeze_masked": torch_rsst.freeze_masked,
    "sparsity_report": torch_rsst.sparsity_report,
    "dense_weights": lambda m: torch_rsst.dense_weights(m).__enter__(),
    "load_dense_state_dict": lambda m: torch_rsst.load_dense_state_dict(
        m, made().state_dict(), mask="keep"
    ),
}


@pytest.mark.parametrize("kind", ["one mask", "two masks"])
@pytest.mark.parametrize("call", WHOLE.values(), ids=WHOLE)
def test_calls_that_see_a_half_tied_model_refuse_it_and_change_nothing(
    call: Callable[[nn.Module], object], kind: str, fingerprint: Fingerprint
) -> None:
    model = half_tied(kind)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=REFUSED):
        call(model)
    assert fingerprint(model) == before


@owners
@pytest.mark.parametrize(
    "call",
    [
        torch_rsst.remove,
        lambda m, _: torch_rsst.remove_all(m),
        lambda m, _: torch_rsst.freeze_masked(m),
    ],
)
def test_a_mask_that_another_owner_lacks_is_neither_removed_nor_frozen_at_one(
    owner: str, call: Any, fingerprint: Fingerprint
) -> None:
    model = half_tied("two masks" if owner == "embed" else "one mask")
    before = fingerprint(model)
    with pytest.raises(ValueError, match="tied parameter 'weight': expected one mask"):
        call(getattr(model, owner), "weight")
    assert fingerprint(model) == before


def test_refresh_gives_a_tied_weight_that_stock_has_masked_one_mask() -> None:
    model = half_tied("one mask")
    mask = model.head.weight_mask.clone()
    assert torch_rsst.refresh(model) is model
    assert torch.equal(model.embed.weight_mask, mask)
    assert_shared(model)
    assert_agrees(model)


def test_refresh_does_not_choose_between_two_masks(fingerprint: Fingerprint) -> None:
    model = half_tied("two masks")
    before = fingerprint(model)
    with pytest.raises(ValueError, match=REFUSED):
        torch_rsst.refresh(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize("kind", ["one mask", "two masks"])
@every_call
@owners
def test_masking_a_half_tied_weight_completes_it(
    owner: str, call: Callable[[nn.Module], object], kind: str
) -> None:
    model = half_tied(kind)
    call(getattr(model, owner))
    assert_shared(model)
    assert_agrees(model)


def test_apply_mask_sets_one_mask_where_there_were_two() -> None:
    model = half_tied("two masks")
    torch_rsst.apply_mask(model, {"embed.weight": half()}, strict=True)
    assert torch.equal(torch_rsst.extract_mask(model)["embed.weight"], half())
    assert_agrees(model)


def test_invariants_tell_a_half_tied_model() -> None:
    with pytest.raises(AssertionError, match=REFUSED):
        assert_mask_invariants(half_tied("one mask"))


def test_the_heap_is_searched_only_where_something_else_refers_to_a_parameter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    searches: list[int] = []
    search = tied._modules_alive
    monkeypatch.setattr(tied, "_modules_alive", lambda: searches.append(1) or search())
    model, layers = made(), nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    for layer in layers:
        torch_rsst.l1_unstructured(layer, "weight", 0.5)
    torch_rsst.apply_mask(model, {"embed.weight": half()})  # which sees all owners
    assert not searches
    trained = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    pairs = [(layer, "weight") for layer in trained]
    torch_rsst.global_unstructured(pairs, torch_rsst.GlobalL1, amount=0.5)
    assert len(searches) == 1  # a call, not a parameter
    for layer in trained:
        torch_rsst.l1_unstructured(layer, "weight", 0.5)
        torch_rsst.fillback(layer, "weight", 0.5)
    torch_rsst.remove_all(trained, freeze_zeros=False)
    assert len(searches) == 1
    optimizer.step()


def test_one_search_tells_of_all_layers_until_a_parameter_is_tied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    searches: list[int] = []
    search = tied._modules_alive
    monkeypatch.setattr(tied, "_modules_alive", lambda: searches.append(1) or search())
    layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    for layer in layers[:3]:
        torch_rsst.l1_unstructured(layer, "weight", 0.5)
    assert len(searches) == 1
    del optimizer  # something else may hold a parameter now, and as many things as before
    layers[4].weight = layers[5].weight
    torch_rsst.l1_unstructured(layers[5], "weight", 0.5)
    assert layers[4].weight_mask is layers[5].weight_mask
    assert len(searches) == 2
    copied = copy.deepcopy(layers[3])  # its parameters were not there when modules were asked
    other = nn.Linear(4, 4)
    other.weight = copied.weight
    torch_rsst.l1_unstructured(copied, "weight", 0.5)
    assert other.weight_mask is copied.weight_mask


class TiedModels(RuleBasedStateMachine):
    """Any sequence of calls: what tells of masks agrees, or a call refused and changed nothing."""

    owners = st.sampled_from(["embed", "head"])

    @initialize()
    def start(self) -> None:
        self.model = made()
        self.half_tied = False

    @rule(owner=owners, call=st.sampled_from(sorted(CALLS)), seed=st.integers(0, 9))
    def mask(self, owner: str, call: str, seed: int) -> None:
        torch.manual_seed(seed)
        CALLS[call](getattr(self.model, owner))
        self.half_tied = False

    @rule(call=st.sampled_from(["l1_unstructured", "apply_mask"]))
    def mask_another(self, call: str) -> None:
        layer = self.model.mlp
        if call == "apply_mask":
            torch_rsst.apply_mask(layer, {"weight": torch.eye(4), "bias": torch.ones(4)})
        else:
            torch_rsst.l1_unstructured(layer, "weight", 0.5)

    @rule(seed=st.integers(0, 9))
    def mask_by_name(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(6, 4, generator=generator) > 0.5
        torch_rsst.apply_mask(self.model, {"embed.weight": mask})
        self.half_tied = False

    @rule(owner=owners)
    def mask_by_stock(self, owner: str) -> None:
        stock.l1_unstructured(getattr(self.model, owner), "weight", 0.5)
        masks = [getattr(m, "weight_mask", None) for m in (self.model.embed, self.model.head)]
        self.half_tied = any(mask is None for mask in masks) or not torch.equal(*masks)

    @rule(owner=owners)
    def give_back(self, owner: str) -> None:
        module = getattr(self.model, owner)
        if hasattr(module, "weight_mask"):
            torch_rsst.fillback(module, "weight", 0.5)
            self.half_tied = False

    @rule(owner=owners, whole=st.booleans())
    def remove(self, owner: str, whole: bool) -> None:
        try:
            torch_rsst.remove_all(self.model if whole else getattr(self.model, owner))
        except ValueError:
            assert self.half_tied

    @rule()
    def refresh(self) -> None:
        try:
            torch_rsst.refresh(self.model)
        except ValueError:
            assert self.half_tied
        else:
            self.half_tied = False

    @rule()
    def train(self) -> None:
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            self.model(TOKENS).square().mean().backward()
            optimizer.step()

    @rule(dtype=st.sampled_from([torch.float32, torch.float64]))
    def convert(self, dtype: torch.dtype) -> None:
        self.model.to(dtype)

    @precondition(lambda self: not self.half_tied)
    @rule(how=st.sampled_from(["copy", "pickle"]))
    def replace(self, how: str) -> None:
        torch_rsst.refresh(self.model)  # what a stock function has stored cannot be copied
        if how == "copy":
            self.model = copy.deepcopy(self.model)
            return
        file = io.BytesIO()
        torch.save(self.model, file)
        file.seek(0)
        self.model = torch.load(file, weights_only=False)

    @invariant()
    def agrees(self) -> None:
        if self.half_tied:
            for call in ("extract_mask", "extract_mask of a state dict", "remove_all"):
                with pytest.raises(ValueError, match=REFUSED):
                    WHOLE[call](self.model)
            return
        torch_rsst.refresh(self.model)
        assert_agrees(self.model)


def test_after_any_sequence_of_calls_all_that_tells_of_masks_agrees() -> None:
    run_state_machine_as_test(
        TiedModels, settings=settings(max_examples=60, stateful_step_count=12)
    )


def test_weights_are_tied_after_masking_whoever_listens_to_registrations() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "mid": nn.Linear(4, 4)})
    model["head"] = nn.Linear(4, 6, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    torch_rsst.l1_unstructured(model["mid"], "weight", amount=0.5)
    heard: list[str] = []
    handle = register_module_parameter_registration_hook(
        lambda module, name, parameter: heard.append(name)
    )
    try:
        model["head"].weight = model["embed"].weight
    finally:
        handle.remove()
    assert heard == ["weight"]
    assert optimizer.param_groups  # alive until here
    torch_rsst.l1_unstructured(model["embed"], "weight", amount=0.5)
    assert model["head"].weight_mask is model["embed"].weight_mask


@every_call
@owners
def test_weights_that_are_tied_no_more_have_masks_of_their_own_once_one_is_set(
    owner: str, call: Callable[[nn.Module], object]
) -> None:
    model = made()
    torch_rsst.apply_mask(model, {"embed.weight": torch.arange(24).reshape(6, 4) % 3 > 0})
    model.embed.weight_orig = nn.Parameter(model.embed.weight_orig.detach().clone())
    other = model.head if owner == "embed" else model.embed
    before = other.weight_mask.clone()
    call(getattr(model, owner))
    assert torch.equal(other.weight_mask, before)
    assert_mask_invariants(model)


def test_masks_are_asked_for_other_owners_once_a_call_and_not_once_a_parameter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    searches: list[int] = []
    search = tied.masked_refs
    monkeypatch.setattr(tied, "masked_refs", lambda of: searches.append(1) or search(of))
    layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    pairs = [(layer, "weight") for layer in layers]
    for calls in (1, 2, 3):
        torch_rsst.global_unstructured(pairs, torch_rsst.GlobalL1, amount=calls)
        layers(torch.ones(1, 4)).sum().backward()
        assert len(searches) < calls
    torch_rsst.apply_mask(layers, torch_rsst.extract_mask(layers))
    assert len(searches) <= 2


@pytest.mark.parametrize("kept", ["embed", "head"])
def test_a_state_dict_may_hold_a_tied_weight_under_any_of_its_names(kept: str) -> None:
    model = made()
    torch_rsst.apply_mask(model, {"head.weight": half()})
    state = model.state_dict()
    other = "head" if kept == "embed" else "embed"
    state = {key: value for key, value in state.items() if not key.startswith(other)}
    fresh = torch_rsst.prepare_from_state_dict(made(), state)
    fresh.load_state_dict(state, strict=False)
    assert_shared(fresh)
    assert torch.equal(fresh(TOKENS), model(TOKENS))


def test_a_state_dict_may_hold_copies_of_a_tied_weight() -> None:
    model = made()
    torch_rsst.apply_mask(model, {"embed.weight": half()})
    state = {key: value.clone() for key, value in model.state_dict().items()}
    fresh = torch_rsst.prepare_from_state_dict(made(), state)
    fresh.load_state_dict(state)
    assert_shared(fresh)
    assert_agrees(fresh)


def test_different_masks_for_the_names_of_one_weight_are_refused(fingerprint: Fingerprint) -> None:
    model = made()
    before = fingerprint(model)
    with pytest.raises(
        ValueError,
        match=r"mask 'head\.weight': expected that of 'embed\.weight', which it is tied to, got another one\. "
        r"Pass one of the two\.",
    ):
        torch_rsst.apply_mask(model, {"embed.weight": half(), "head.weight": ~half()})
    assert fingerprint(model) == before
    torch_rsst.apply_mask(model, {"embed.weight": half(), "head.weight": half().int()})
    assert_shared(model)


def loaded_by_assigning(moment: str) -> Language:
    """As loaders from the meta device load: each name of the tied weight gets a parameter in the same memory."""
    saved, model = made(), made()
    if moment == "masked":
        torch_rsst.apply_mask(saved, {"embed.weight": half()})
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    torch_rsst.prepare_from_state_dict(model, state).load_state_dict(state, assign=True)
    if moment == "masked in one place":
        torch_rsst.l1_unstructured(model.head, "weight", amount=0.5)
    return model


@pytest.mark.parametrize(
    ("moment", "remedy"),
    [
        ("dense", r"Tie them: b\.weight = a\.weight\."),
        ("masked", r"Tie them: b\.weight_orig = a\.weight_orig\."),
        (
            "masked in one place",
            r"Remove the mask of 'head\.weight' with torch_rsst\.remove\(module, name\)\. "
            r"Tie them: b\.weight = a\.weight\.",
        ),
    ],
)
def test_two_parameters_in_one_memory_are_refused_by_name_and_the_remedy_helps(
    moment: str, remedy: str, fingerprint: Fingerprint
) -> None:
    model = loaded_by_assigning(moment)
    before = fingerprint(model)
    state = made().state_dict()
    calls: list[Callable[[], object]] = [
        lambda: torch_rsst.extract_mask(model),
        lambda: torch_rsst.apply_mask(model, {"head.weight": half()}),
        lambda: torch_rsst.remove_all(model),
        lambda: torch_rsst.refresh(model),
        lambda: torch_rsst.freeze_masked(model),
        lambda: torch_rsst.dense_weights(model).__enter__(),
        lambda: torch_rsst.prepare_from_state_dict(model, state),
        lambda: torch_rsst.load_dense_state_dict(model, state, mask="keep"),
        lambda: torch_rsst.sparsity_report(model),
        lambda: torch_rsst.find_groups(model),
        lambda: torch_rsst.RegularizedPruner(model, {}, total_steps=1),
    ]
    expected = (
        r"'embed\.weight' and 'head\.weight': expected memory of their own, or one tied parameter, "
        rf"got two parameters in one memory\. {remedy}"
    )
    for call in calls:
        with pytest.raises(ValueError, match=expected):
            call()
    assert fingerprint(model) == before
    if moment == "masked":
        model.head.weight_orig = model.embed.weight_orig
    else:
        torch_rsst.remove_all(model.head, freeze_zeros=False)
        model.head.weight = model.embed.weight
    torch_rsst.apply_mask(model, {"head.weight": half()})
    assert torch.equal(torch_rsst.extract_mask(model)["embed.weight"], half())
    assert_mask_invariants(model)


def test_listed_parameters_in_one_memory_are_refused(fingerprint: Fingerprint) -> None:
    model = loaded_by_assigning("dense")
    before = fingerprint(model)
    pairs = [(model.embed, "weight"), (model.mlp, "weight"), (model.head, "weight")]
    with pytest.raises(
        ValueError, match=r"'parameters\[0\]' and 'parameters\[2\]': expected memory"
    ):
        torch_rsst.global_unstructured(pairs, torch_rsst.GlobalL1, amount=0.5)
    assert fingerprint(model) == before


@pytest.mark.parametrize("part", [torch.t, lambda weight: weight[1:]])
def test_parts_and_views_of_another_weight_are_refused(part: Callable[[Tensor], Tensor]) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[1].weight.data = part(model[0].weight.data)
    with pytest.raises(
        ValueError, match=r"'0\.weight' and '1\.weight': expected memory of their own"
    ):
        torch_rsst.extract_mask(model)


def test_parts_of_one_buffer_that_do_not_overlap_are_no_ties() -> None:
    model, buffer = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)), torch.ones(36)
    model[0].weight.data = buffer[:9].view(3, 3)
    wide = buffer[9:27].view(3, 6)
    model[1].weight.data, model[2].weight.data = wide[:, :3], wide[:, 3:]
    model[0].bias.data = buffer[27:30]
    model[1].bias.data = model[2].bias.data = torch.empty(
        0
    )  # as sharding leaves parts of other ranks
    model[0].register_parameter("meta", nn.Parameter(torch.empty(2, device="meta")))
    model[1].register_parameter("meta", nn.Parameter(torch.empty(2, device="meta")))
    masks = {"0.weight": torch.eye(3), "1.weight": 1 - torch.eye(3)}
    torch_rsst.apply_mask(model, masks)
    assert all(
        torch.equal(mask, masks[n].bool()) for n, mask in torch_rsst.extract_mask(model).items()
    )

"""After any sequence of calls, what tells of masks agrees, or the call refused and changed nothing.

The models are tied, averaged, frozen, sharded and registered anew on the way.
"""

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
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

import torch_rsst
from torch_rsst.masking.parameter_ref import masked_refs
from torch_rsst.testing import assert_mask_invariants

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch_rsst.UnfrozenZerosWarning"),
    pytest.mark.filterwarnings("ignore::torch_rsst.FractionalMaskWarning"),
]

TOKENS = torch.arange(6)
AVERAGED = r"mask of '.*': expected zeros and ones, got other values\. Averaging buffers"
NAMES = ("embed.weight", "mlp.weight", "mlp.bias", "norm.weight")


class Language(nn.Module):
    """The head's weight is that of the embedding; a linear layer and a batch norm are between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp, self.norm = nn.Embedding(6, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.embed.weight = self.head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        return self.head(self.norm(hidden + self.mlp(hidden).relu()))


def made() -> Language:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Language().eval()


def values(model: nn.Module) -> list[Any]:
    """Everything that a refused call may not change: names, identities, values, classes."""
    own = [
        (name, id(tensor), tensor.clone())
        for name, tensor in model.state_dict(keep_vars=True).items()
    ]
    return [*own, *(type(module) for module in model.modules())]


def assert_unchanged(before: list[Any], model: nn.Module) -> None:
    for old, new in zip(before, values(model), strict=True):
        if isinstance(old, tuple):
            assert old[:2] == new[:2]
            torch.testing.assert_close(old[2], new[2], rtol=0, atol=0, equal_nan=True)
        else:
            assert old is new


class AnySequence(RuleBasedStateMachine):
    """One model, called in every way; ``fractions`` says that an average has spoiled its masks."""

    names = st.sampled_from(NAMES)
    seeds = st.integers(0, 9)

    @initialize()
    def start(self) -> None:
        self.model, self.fractions = made(), False
        self.frozen: dict[str, Tensor] = {}

    def attempt(self, call: Callable[[], object]) -> None:
        """Call; with fractions about, it may refuse, and changes nothing then."""
        before = values(self.model)
        try:
            call()
        except ValueError:
            if not self.fractions:
                raise
            assert_unchanged(before, self.model)

    def masks(self, name: str, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        module, _, leaf = name.rpartition(".")
        weight = getattr(self.model.get_submodule(module), leaf)
        return {name: torch.rand(weight.shape, generator=generator) > 0.4}

    @rule(name=names, seed=seeds)
    def apply(self, name: str, seed: int) -> None:
        self.attempt(lambda: torch_rsst.apply_mask(self.model, self.masks(name, seed)))
        self.look_for_fractions()

    @rule(amount=st.sampled_from([0.25, 0.5]))
    def prune_globally(self, amount: float) -> None:
        layers = [(self.model.head, "weight"), (self.model.mlp, "weight")]
        self.attempt(
            lambda: torch_rsst.global_unstructured(layers, torch_rsst.GlobalL1, amount=amount)
        )
        self.look_for_fractions()

    @rule(name=names, rate=st.sampled_from([0.5, 1.0]))
    def give_back(self, name: str, rate: float) -> None:
        module, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(module)
        if hasattr(owner, f"{leaf}_mask"):
            self.attempt(lambda: torch_rsst.fillback(owner, leaf, rate))
            self.look_for_fractions()

    @rule(frozen=st.booleans(), part=st.sampled_from(["", "mlp", "head"]))
    def remove(self, frozen: bool, part: str) -> None:
        module = self.model.get_submodule(part)
        masks = {} if self.fractions else torch_rsst.extract_mask(self.model)
        self.attempt(lambda: torch_rsst.remove_all(module, freeze_zeros=frozen))
        self.look_for_fractions()
        if frozen and masks:
            left = torch_rsst.extract_mask(self.model).keys()
            self.frozen |= {name: ~mask for name, mask in masks.items() if name not in left}

    @rule(coupled=st.booleans())
    def train(self, coupled: bool) -> None:
        kind = torch.optim.SGD if coupled else torch.optim.AdamW
        optimizer = kind(self.model.parameters(), lr=0.05, weight_decay=0.1)
        for _ in range(2):
            self.model(TOKENS).square().mean().backward()
            optimizer.step()
        for name, zeros in self.frozen.items():
            assert not self.model.get_parameter(name)[zeros].any(), name

    @precondition(lambda self: any(ref.is_masked for ref in masked_refs(self.model.modules())))
    @rule(silently=st.booleans(), seed=seeds)
    def average(self, silently: bool, seed: int) -> None:
        """Average with another mask and copy back, as trainers do, with or without a new version."""
        average = AveragedModel(self.model, use_buffers=True)
        for module in average.module.modules():
            for key, buffer in module._buffers.items():
                if key.endswith("_mask"):
                    generator = torch.Generator().manual_seed(seed)
                    buffer.copy_(torch.rand(buffer.shape, generator=generator) > 0.4)
        average.update_parameters(self.model)
        average.update_parameters(self.model)
        pairs = zip(self.model.buffers(), average.module.buffers(), strict=True)
        for own, averaged in pairs:
            (own.data if silently else own).copy_(averaged)
        self.look_for_fractions()

    @rule(name=names)
    def register_anew(self, name: str) -> None:
        """The same values as another Parameter, as conversions make them."""
        module, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(module)
        key = f"{leaf}_orig" if hasattr(owner, f"{leaf}_orig") else leaf
        new = nn.Parameter(getattr(owner, key).detach().clone())
        self.frozen.pop(name, None)
        owner._parameters[key] = new
        if name == "embed.weight":
            self.model.head._parameters[key] = new

    @rule(how=st.sampled_from(["copy", "pickle", "state", "deep state"]))
    def replace(self, how: str) -> None:
        self.frozen = {}  # which belong to the model object
        if how == "copy":
            self.model = copy.deepcopy(self.model)
        elif how == "pickle":
            file = io.BytesIO()
            torch.save(self.model, file)
            file.seek(0)
            self.model = torch.load(file, weights_only=False)
        elif not self.fractions:
            state = (
                copy.deepcopy(self.model.state_dict()) if how[0] == "d" else self.model.state_dict()
            )
            self.model = torch_rsst.prepare_from_state_dict(made(), state)
            self.model.load_state_dict(state)

    @rule(writes=st.sampled_from(["drop", "keep"]), fails=st.booleans())
    def write_densely(self, writes: Any, fails: bool) -> None:
        if self.fractions:
            return
        masks = torch_rsst.extract_mask(self.model)
        try:
            with torch_rsst.dense_weights(self.model, masked_writes=writes), torch.no_grad():
                self.model.mlp.weight.mul_(1.5).add_(0.1)
                if fails:
                    raise InterruptedError
        except InterruptedError:
            assert fails
        after = torch_rsst.extract_mask(self.model)
        assert masks.keys() == after.keys()
        assert all(torch.equal(masks[name], after[name]) for name in masks)

    @rule()
    def reparametrize_and_back(self) -> None:
        if not hasattr(self.model.mlp, "weight_mask"):
            parametrizations.spectral_norm(self.model.mlp)
            nn.utils.parametrize.remove_parametrizations(self.model.mlp, "weight")

    def look_for_fractions(self) -> None:
        """Also: what is masked anew is frozen no longer."""
        names = dict(self.model.named_parameters())
        self.frozen = {name: zeros for name, zeros in self.frozen.items() if name in names}
        masks = [ref.mask for ref in masked_refs(self.model.modules())]
        self.fractions = any(bool(((m != 0) & (m != 1)).any()) for m in masks if m is not None)

    @invariant()
    def agrees(self) -> None:
        if self.fractions:
            before = values(self.model)
            for call in (torch_rsst.extract_mask, torch_rsst.remove_all):
                with pytest.raises(ValueError, match=AVERAGED):
                    call(self.model)
            assert_unchanged(before, self.model)
            return
        assert_mask_invariants(self.model)
        masks, output = torch_rsst.extract_mask(self.model), self.model(TOKENS)
        for name, mask in masks.items():
            weight = self.model
            for part in name.split("."):
                weight = getattr(weight, part)
            assert not weight[~mask].any(), name
        again = torch_rsst.prepare_from_state_dict(made(), self.model.state_dict())
        again.load_state_dict(self.model.state_dict())
        assert torch.equal(again(TOKENS), output)
        plain = torch_rsst.remove_all(copy.deepcopy(self.model))
        assert torch.equal(plain(TOKENS), output)
        assert not any(key.endswith("_mask") for key in plain.state_dict())
        torch_rsst.apply_mask(plain, masks)
        assert torch.equal(plain(TOKENS), output)


def test_masks_checkpoints_removal_and_forward_pass_agree_after_any_sequence() -> None:
    run_state_machine_as_test(
        AnySequence, settings=settings(max_examples=40, stateful_step_count=12)
    )

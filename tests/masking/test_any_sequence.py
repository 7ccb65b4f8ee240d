"""After any sequence of calls, what tells of masks agrees, or the call refused and changed nothing.

The models are tied, averaged, frozen, masked by stock in some places only, and registered anew on the way.
Sharded ones have their own test in ``tests/distributed``.
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
from torch.nn.utils import prune as stock
from torch.optim.swa_utils import AveragedModel

import torch_rsst
from torch_rsst.masking.parameter_ref import masked_refs
from torch_rsst.testing import assert_mask_invariants

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch_rsst.UnfrozenZerosWarning"),
    pytest.mark.filterwarnings("ignore::torch_rsst.FractionalMaskWarning"),
]

TOKENS = torch.arange(6)
EXACTLY: Any = {"rtol": 0, "atol": 0, "equal_nan": True}
AVERAGED = r"mask of '.*': expected zeros and ones, got other values\. Averaging buffers"
HALF_TIED = r"tied parameter '.*': expected one mask for all that share it"
NAMES = ("embed.weight", "head.weight", "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "norm.weight")
OWNERS = ("embed", "head", "mlp.0", "mlp.2", "norm")


class Language(nn.Module):
    """The head's weight is that of the embedding; an MLP and a batch norm are between."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(6, 4), nn.BatchNorm1d(4)
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.head = nn.Linear(4, 6, bias=False)
        if tied:
            self.embed.weight = self.head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        return self.head(self.norm(hidden + self.mlp(hidden)))


def made(*, tied: bool = True) -> Language:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Language(tied=tied).eval()


GROUPS = torch_rsst.find_groups(made(), on_unsupported="ignore")


def values(model: nn.Module) -> list[Any]:
    """Everything that a refused call may not change: names, identities, values, classes, hooks."""
    own = [
        (name, id(tensor), tensor.clone())
        for name, tensor in model.state_dict(keep_vars=True).items()
    ]
    hooks = [(type(m), list(map(id, m._forward_pre_hooks.values()))) for m in model.modules()]
    return [*own, *hooks]


def assert_unchanged(before: list[Any], model: nn.Module) -> None:
    for old, new in zip(before, values(model), strict=True):
        assert old[:2] == new[:2]
        if len(old) == 3:
            torch.testing.assert_close(old[2], new[2], **EXACTLY)


class AnySequence(RuleBasedStateMachine):
    """One model, called in every way.

    ``fractions`` says that an average has spoiled its masks, ``half`` that stock has masked a tied weight in one
    place: then calls may refuse. ``zeros`` are entries that are frozen, ``latents`` parameters whose masked ones are.
    """

    names, owners, seeds = st.sampled_from(NAMES), st.sampled_from(OWNERS), st.integers(0, 9)

    @initialize()
    def start(self) -> None:
        self.model, self.tied = made(), True
        self.fractions = self.half = False
        self.zeros: dict[str, Tensor] = {}
        self.latents: list[nn.Parameter] = []

    @property
    def spoiled(self) -> bool:
        return self.fractions or self.half

    def attempt(self, call: Callable[[], object]) -> bool:
        """Call; where masks are spoiled it may refuse, and changes nothing then."""
        before = values(self.model)
        try:
            call()
        except ValueError:
            if not self.spoiled:
                raise
            assert_unchanged(before, self.model)
            return False
        finally:
            self.look()
        return True

    def look(self) -> None:
        """What state the masks are in; what is masked anew is frozen no longer."""
        names = dict(self.model.named_parameters())
        self.zeros = {name: zeros for name, zeros in self.zeros.items() if name in names}
        refs = masked_refs(self.model.modules())
        masks, masked = [ref.mask for ref in refs], {id(ref.original) for ref in refs}
        self.latents = [latent for latent in self.latents if id(latent) in masked]
        self.fractions = any(bool(((m != 0) & (m != 1)).any()) for m in masks if m is not None)
        embed, head = (getattr(m, "weight_mask", None) for m in (self.model.embed, self.model.head))
        same = embed is head or (
            embed is not None and head is not None and torch.equal(embed, head)
        )
        self.half = self.tied and not same

    def owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self.model.get_submodule(path), leaf

    def mask(self, name: str, seed: int) -> Tensor:
        owner, leaf = self.owner(name)
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(getattr(owner, leaf).shape, generator=generator) > 0.4

    @rule(name=names, seed=seeds)
    def apply(self, name: str, seed: int) -> None:
        mask = self.mask(name, seed)
        if self.attempt(lambda: torch_rsst.apply_mask(self.model, {name: mask})):
            owner, leaf = self.owner(name)
            assert torch.equal(getattr(owner, f"{leaf}_mask") != 0, mask)

    @rule(name=names, amount=st.sampled_from([0.3, 0.5]))
    def prune_one(self, name: str, amount: float) -> None:
        self.attempt(lambda: torch_rsst.l1_unstructured(*self.owner(name), amount))

    @rule(amount=st.sampled_from([0.25, 0.5]))
    def prune_globally(self, amount: float) -> None:
        layers = [(self.model.head, "weight"), (self.model.mlp[0], "weight")]
        self.attempt(
            lambda: torch_rsst.global_unstructured(layers, torch_rsst.GlobalL1, amount=amount)
        )

    @rule(owner=owners, seed=seeds)
    def prune_by_stock(self, owner: str, seed: int) -> None:
        """Which knows nothing of ties, fractions and freezes."""
        stock.custom_from_mask(
            self.model.get_submodule(owner), "weight", self.mask(f"{owner}.weight", seed)
        )
        self.look()

    @rule()
    def refresh(self) -> None:
        self.attempt(lambda: torch_rsst.refresh(self.model))

    @rule(name=names, rate=st.sampled_from([0.5, 1.0]))
    def give_back(self, name: str, rate: float) -> None:
        owner, leaf = self.owner(name)
        if hasattr(owner, f"{leaf}_mask"):
            self.attempt(lambda: torch_rsst.fillback(owner, leaf, rate))

    @rule(frozen=st.booleans(), part=st.sampled_from(["", "mlp", "head", "embed"]))
    def remove(self, frozen: bool, part: str) -> None:
        module = self.model.get_submodule(part)
        masks = {} if self.spoiled else torch_rsst.extract_mask(self.model)
        removed = self.attempt(lambda: torch_rsst.remove_all(module, freeze_zeros=frozen))
        if frozen and removed and masks:
            left = torch_rsst.extract_mask(self.model).keys()
            self.zeros |= {name: ~mask for name, mask in masks.items() if name not in left}

    @rule(name=names)
    def remove_one(self, name: str) -> None:
        owner, leaf = self.owner(name)
        if hasattr(owner, f"{leaf}_mask"):
            self.attempt(lambda: torch_rsst.remove(owner, leaf, freeze_zeros=False))

    @precondition(lambda self: any(ref.is_masked for ref in masked_refs(self.model.modules())))
    @rule()
    def freeze(self) -> None:
        if self.attempt(lambda: torch_rsst.freeze_masked(self.model)):
            self.latents = [ref.original for ref in masked_refs(self.model.modules())]

    @rule(coupled=st.booleans())
    def train(self, coupled: bool) -> None:
        kind = torch.optim.SGD if coupled else torch.optim.AdamW
        optimizer = kind(self.model.parameters(), lr=0.05, weight_decay=0.1)
        refs = [] if self.spoiled else masked_refs(self.model.modules())
        held = set(map(id, self.latents))
        before = [(ref, ref.original.detach().clone()) for ref in refs if id(ref.original) in held]
        for _ in range(2):
            self.model(TOKENS).square().mean().backward()
            optimizer.step()
        for name, zeros in self.zeros.items():
            assert not self.model.get_parameter(name)[zeros].any(), name
        for ref, latent in before:
            assert torch.equal(ref.original[ref.mask == 0], latent[ref.mask == 0]), ref

    @rule(method=st.sampled_from([torch_rsst.RSST, torch_rsst.Refill]))
    def a_round(self, method: Any) -> None:
        """Of the MLP's neurons, to its end; without an optimizer, so that nothing has shrunk."""
        if self.spoiled:
            with pytest.raises(ValueError, match=f"{AVERAGED}|{HALF_TIED}"):
                method(self.model, GROUPS, steps_per_round=1)
            return
        rounds = method(self.model, GROUPS, steps_per_round=1, rounds=1, amount=0.1)
        for rnd in rounds:
            rnd.pruner.step()
            kept = rnd.refill_mask["mlp.0.weight"]
        if method is torch_rsst.RSST:
            rounds.finalize(force=True)
        self.look()
        assert not self.model.mlp[0].weight[~kept].any()

    @precondition(lambda self: any(ref.is_masked for ref in masked_refs(self.model.modules())))
    @rule(silently=st.booleans(), seed=seeds)
    def average(self, silently: bool, seed: int) -> None:
        """Average with another mask and copy back, as trainers do, with or without a new version."""
        if self.half:
            return
        torch_rsst.refresh(self.model) if not self.fractions else None
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
        self.look()

    @rule(seed=seeds)
    def follow(self, seed: int) -> None:
        """A follower that has other masks gets the model's."""
        follower = made(tied=self.tied)
        torch_rsst.apply_mask(follower, {"mlp.2.weight": self.mask("mlp.2.weight", seed)})
        if not self.attempt(lambda: torch_rsst.follow(self.model, [follower])):
            return
        own, other = torch_rsst.extract_mask(self.model), torch_rsst.extract_mask(follower)
        assert all(torch.equal(own.pop(name, torch.ones(1, dtype=torch.bool)), mask) or bool(mask.all())
                   for name, mask in other.items())  # fmt: skip
        assert not own
        assert_mask_invariants(follower)

    @rule(name=names)
    def register_anew(self, name: str) -> None:
        """The same values as another Parameter, as conversions make them."""
        owner, leaf = self.owner(name)
        key = f"{leaf}_orig" if hasattr(owner, f"{leaf}_orig") else leaf
        new = nn.Parameter(getattr(owner, key).detach().clone())
        self.zeros.pop(name, None)
        owner._parameters[key] = new
        other = {"embed.weight": self.model.head, "head.weight": self.model.embed}.get(name)
        if other is not None and self.tied and not self.half:
            other._parameters[key] = new
        self.tied = self.tied and (other is None or not self.half)
        self.look()

    @precondition(lambda self: self.tied and not self.spoiled)
    @rule()
    def untie(self) -> None:
        """The embedding gets a parameter of its own; the mask stays the same tensor."""
        embed = self.model.embed
        key = "weight_orig" if hasattr(embed, "weight_orig") else "weight"
        embed._parameters[key] = nn.Parameter(getattr(embed, key).detach().clone())
        self.tied = False
        self.zeros.pop("embed.weight", None)

    @precondition(lambda self: not self.tied and not self.spoiled)
    @rule()
    def tie(self) -> None:
        """As transformers do, where a masked weight is in the way."""
        with torch_rsst.dense_weights(self.model, masked_writes="drop"):
            self.model.embed.weight = self.model.head.weight
        self.tied = True
        self.zeros.pop("embed.weight", None)
        self.zeros.pop("head.weight", None)
        self.look()
        assert not self.half

    @rule(how=st.sampled_from(["copy", "pickle", "state", "deep state"]))
    def replace(self, how: str) -> None:
        self.zeros, self.latents = {}, []  # which belong to the model object
        if self.half:
            return
        if not self.fractions:
            torch_rsst.refresh(self.model)  # what stock has stored cannot be copied
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
            self.model = torch_rsst.prepare_from_state_dict(made(tied=self.tied), state)
            self.model.load_state_dict(state)

    @rule(mask=st.sampled_from(["keep", "zeros", "remove"]), seed=seeds)
    def load_dense(self, mask: Any, seed: int) -> None:
        torch.manual_seed(seed)
        state = Language(tied=self.tied).state_dict()
        for name, parameter in made(tied=self.tied).named_parameters():
            state[name].mul_(torch.rand(parameter.shape) > 0.4)
        self.zeros, frozen = {}, self.zeros
        if not self.attempt(lambda: torch_rsst.load_dense_state_dict(self.model, state, mask=mask)):
            self.zeros = frozen

    @rule(writes=st.sampled_from(["drop", "keep"]), fails=st.booleans())
    def write_densely(self, writes: Any, fails: bool) -> None:
        if self.spoiled:
            with pytest.raises(ValueError, match=f"{AVERAGED}|{HALF_TIED}"):
                torch_rsst.dense_weights(self.model).__enter__()
            return
        masks = torch_rsst.extract_mask(self.model)
        try:
            with torch_rsst.dense_weights(self.model, masked_writes=writes), torch.no_grad():
                self.model.mlp[0].weight.mul_(1.5).add_(0.1)
                with pytest.raises(RuntimeError, match="expected a model whose masks are in place"):
                    torch_rsst.remove_all(self.model)
                if fails:
                    raise InterruptedError
        except InterruptedError:
            assert fails
        self.zeros.pop("mlp.0.weight", None)
        after = torch_rsst.extract_mask(self.model)
        assert masks.keys() == after.keys()
        assert all(torch.equal(masks[name], after[name]) for name in masks)

    @rule()
    def reparametrize_and_back(self) -> None:
        if not hasattr(self.model.mlp[0], "weight_mask"):
            parametrizations.spectral_norm(self.model.mlp[0])
            nn.utils.parametrize.remove_parametrizations(self.model.mlp[0], "weight")

    @invariant()
    def agrees(self) -> None:
        if self.spoiled:
            before = values(self.model)
            for call in (torch_rsst.extract_mask, torch_rsst.remove_all):
                with pytest.raises(ValueError, match=f"{AVERAGED}|{HALF_TIED}"):
                    call(self.model)
            assert_unchanged(before, self.model)
            return
        torch_rsst.refresh(self.model)
        assert_mask_invariants(self.model)
        masks, output = torch_rsst.extract_mask(self.model), self.model(TOKENS)
        for name, mask in masks.items():
            owner, leaf = self.owner(name)
            assert not getattr(owner, leaf)[~mask].any(), name
        again = torch_rsst.prepare_from_state_dict(made(tied=self.tied), self.model.state_dict())
        again.load_state_dict(self.model.state_dict())
        torch.testing.assert_close(again(TOKENS), output, **EXACTLY)
        plain = torch_rsst.remove_all(copy.deepcopy(self.model))
        torch.testing.assert_close(plain(TOKENS), output, **EXACTLY)
        assert not any(key.endswith("_mask") for key in plain.state_dict())
        torch_rsst.apply_mask(plain, masks)
        torch.testing.assert_close(plain(TOKENS), output, **EXACTLY)


def test_masks_checkpoints_removal_and_forward_pass_agree_after_any_sequence() -> None:
    run_state_machine_as_test(
        AnySequence, settings=settings(max_examples=40, stateful_step_count=12)
    )

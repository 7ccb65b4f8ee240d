"""After any sequence of calls, a model in parts on two ranks has the masks and outputs of a whole one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from ranks import on_ranks
from torch import Tensor, nn

import torch_rsst

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed"),
    pytest.mark.skipif(
        not hasattr(torch.cpu.Stream, "record_event"), reason="this torch runs FSDP2 on GPUs only"
    ),
]
# The same on every rank, so that all make the same calls.
SETTINGS = settings(
    max_examples=10,
    stateful_step_count=8,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
X = torch.linspace(-1, 1, 18).reshape(3, 6)


def made() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))


def sharded() -> nn.Sequential:
    from torch.distributed.fsdp import fully_shard

    model = made()
    for layer in (model[0], model[2]):
        fully_shard(layer)
    return fully_shard(model)


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class TwoModels(RuleBasedStateMachine):
    """Each call is made on the sharded model and on the whole one."""

    layers = st.sampled_from([0, 2])

    @initialize()
    def start(self) -> None:
        self.whole, self.parts = made(), sharded()
        self.zeros: dict[int, Tensor] = {}  # of layers whose removed masks are held

    def both(self, call: Any) -> None:
        for model in (self.whole, self.parts):
            call(model)

    @rule(amount=st.sampled_from([0.2, 0.5, 3]))
    def prune_globally(self, amount: float) -> None:
        self.both(
            lambda m: torch_rsst.global_unstructured(
                [(m[0], "weight"), (m[2], "weight")], torch_rsst.GlobalL1, amount=amount
            )
        )

    @rule(layer=layers)
    def prune_rows(self, layer: int) -> None:
        """Refused for parts; the invariant sees that nothing has changed."""
        with pytest.raises(ValueError, match="expected a whole tensor, got one in parts"):
            torch_rsst.ln_structured(self.parts[layer], "weight", 1, n=1, dim=0)

    @rule(amount=st.sampled_from([0.25, 0.5]))
    def regroup(self, amount: float) -> None:
        groups = torch_rsst.find_groups(self.whole)
        refill = torch_rsst.regroup(self.whole, groups, amount=amount)
        of_parts = torch_rsst.regroup(self.parts, groups, amount=amount)
        assert all(torch.equal(whole(of_parts[name]), mask) for name, mask in refill.items())
        torch_rsst.apply_mask(self.whole, refill)
        torch_rsst.apply_mask(self.parts, of_parts)

    @rule(layer=layers, rate=st.sampled_from([0.3, 1.0]))
    def give_back(self, layer: int, rate: float) -> None:
        if hasattr(self.whole[layer], "weight_mask"):
            self.both(lambda m: torch_rsst.fillback(m[layer], "weight", rate))

    @rule(frozen=st.booleans())
    def remove(self, frozen: bool) -> None:
        masks = torch_rsst.extract_mask(self.whole) if frozen else {}
        self.both(lambda m: torch_rsst.remove_all(m, freeze_zeros=frozen))
        self.zeros |= {
            layer: ~masks[name] for layer in (0, 2) if (name := f"{layer}.weight") in masks
        }

    @rule()
    def freeze(self) -> None:
        if torch_rsst.extract_mask(self.whole):
            self.both(torch_rsst.freeze_masked)

    @rule(layer=layers)
    def register_anew(self, layer: int) -> None:
        """The same values as another Parameter, in the whole model; the parts stay what FSDP has made."""
        owner = self.whole[layer]
        key = "weight_orig" if hasattr(owner, "weight_orig") else "weight"
        owner._parameters[key] = nn.Parameter(getattr(owner, key).detach().clone())

    @rule(layer=layers)
    def average(self, layer: int) -> None:
        """Fractions of a mask, in one part of it: refused on every rank, until the mask is set again."""
        if not hasattr(self.parts[layer], "weight_mask"):
            return
        masks = torch_rsst.extract_mask(self.parts)
        buffer = self.parts[layer].weight_mask
        own = buffer.to_local() if hasattr(buffer, "to_local") else buffer
        own[:1] *= 0.5
        if not bool(((whole(buffer) != 0) & (whole(buffer) != 1)).any()):
            return
        for call in (torch_rsst.extract_mask, torch_rsst.remove_all, torch_rsst.freeze_masked):
            with pytest.raises(ValueError, match="expected zeros and ones, got other values"):
                call(self.parts)
        torch_rsst.apply_mask(self.parts, masks)

    @rule()
    def dense(self) -> None:
        """Refused for parts."""
        if torch_rsst.extract_mask(self.parts):
            with pytest.raises(ValueError, match="expected a whole tensor, got one that is distr"):
                torch_rsst.dense_weights(self.parts).__enter__()

    @rule(decay=st.sampled_from([0.0, 0.5]))
    def train(self, decay: float) -> None:
        def step(model: nn.Module) -> None:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.125, weight_decay=decay)
            model(X).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        self.both(step)
        for layer, zeros in self.zeros.items():
            if not hasattr(self.parts[layer], "weight_mask"):
                assert not whole(self.parts[layer].weight)[zeros].any(), layer

    @rule()
    def reload(self) -> None:
        """A checkpoint of the sharded model, gathered, into a whole one."""
        state = {key: whole(value).clone() for key, value in self.parts.state_dict().items()}
        model = torch_rsst.prepare_from_state_dict(made(), state)
        model.load_state_dict(state)
        torch.testing.assert_close(model(X), self.whole(X))

    @invariant()
    def agree(self) -> None:
        self.zeros = {
            layer: zeros
            for layer, zeros in self.zeros.items()
            if not hasattr(self.whole[layer], "weight_mask")
        }
        masks, parts = torch_rsst.extract_mask(self.whole), torch_rsst.extract_mask(self.parts)
        assert masks.keys() == parts.keys()
        for name, mask in masks.items():
            assert torch.equal(whole(parts[name]), mask), name
        torch.testing.assert_close(self.parts(X), self.whole(X))
        zeros = copy.deepcopy(self.whole)
        assert torch.equal(torch_rsst.remove_all(zeros, freeze_zeros=False)(X), self.whole(X))


def _run(rank: int) -> str:
    run_state_machine_as_test(TwoModels, settings=SETTINGS)
    return "agreed"


@pytest.mark.filterwarnings("ignore::torch_rsst.UnfrozenZerosWarning")
def test_a_sharded_model_agrees_with_a_whole_one_after_any_sequence() -> None:
    assert on_ranks(2, _run) == ["agreed", "agreed"]

"""Whatever modules keep in their state, a run that should leave no trace leaves none; copies take all."""

from __future__ import annotations

import copy
import random
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from torch_rsst.utils.module_state import deep_copy, drop_caches, kept_state, undisturbed


@dataclass
class Cache:
    keys: Tensor
    length: int = 0


@dataclass(slots=True)
class SlottedCache:
    keys: Tensor
    length: int = 0


class Outer:
    def __init__(self) -> None:
        self.layers = [Cache(torch.zeros(3))]


# What a module holds from the start, and what its forward does to itself.
def attribute(module: Any, x: Tensor) -> None:
    module.count = module.count + 1
    module.shape = x.shape


def table_by_reference(module: Any, x: Tensor) -> None:
    module.table = torch.linspace(0, 1, x.shape[-1])


def table_in_place(module: Any, x: Tensor) -> None:
    module.table.add_(1)
    module.table.data = torch.ones(5)


def deleted(module: Any, x: Tensor) -> None:
    module.__dict__.pop("to_delete", None)
    module._buffers.pop("spare", None)


def lists(module: Any, x: Tensor) -> None:
    module.seen.append(x)
    module.seen[0] = "changed"
    module.nested["inner"].append(1)
    module.nested["inner"][0]["deep"] = x


def dicts(module: Any, x: Tensor) -> None:
    module.by_shape[tuple(x.shape)] = x * 2
    module.by_shape.pop("first", None)
    module.ordered.move_to_end("a")
    module.ordered["c"] = 3


def sets_and_queues(module: Any, x: Tensor) -> None:
    module.names.add(x.shape[0])
    module.names.discard("one")
    module.queue.append(x)


def buffer_in_place(module: Any, x: Tensor) -> None:
    module.scale.mul_(3)


def buffer_registered(module: Any, x: Tensor) -> None:
    module.register_buffer("made", torch.ones(2), persistent=False)
    module.scale = torch.full((4,), 7.0)


def submodule(module: Any, x: Tensor) -> None:
    module.lazy = nn.Linear(3, 3)
    module.inner = nn.Identity()


def parameter(module: Any, x: Tensor) -> None:
    module.weight = nn.Parameter(torch.zeros(1))
    module.register_parameter("bias", None)
    module.inner.weight.data = torch.zeros(1, 1)


def non_leaf(module: Any, x: Tensor) -> None:
    with torch.enable_grad():
        module.biases[x.device] = module.weight * 2
        module.product = module.inner.weight[:1]


def hooks(module: Any, x: Tensor) -> None:
    module.register_forward_hook(lambda *_: None)
    module.inner.register_forward_pre_hook(lambda *_: None)


def objects(module: Any, x: Tensor) -> None:
    module.cache.keys[0] = 5.0
    module.cache.length += 1
    module.cache.note = "new"
    module.slotted.keys = x
    module.slotted.length += 1
    module.outer.layers[0].keys.add_(1)
    module.outer.layers.append(Cache(x))


def modules_in_a_list(module: Any, x: Tensor) -> None:
    module.unregistered[0].note = x
    module.unregistered[0].scale.add_(1)


def modes_and_dice(module: Any, x: Tensor) -> None:
    module.train(not module.training)
    module.inner.requires_memory = True
    torch.manual_seed(x.numel())
    random.seed(3)
    torch.randn(1, generator=module.generator)
    module.dice.random()
    for dice in module.arrays_dice:
        dice.normal()


HABITS = [
    *(attribute, table_by_reference, table_in_place, deleted, lists, dicts, sets_and_queues),
    *(buffer_in_place, buffer_registered, submodule, parameter, non_leaf, hooks, objects),
    *(modules_in_a_list, modes_and_dice),
]


class WithScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.arange(4.0))


class Hoarder(nn.Module):
    """Keeps things in itself in every way; its forward does what its habits say."""

    table = None

    def __init__(self, habits: list[Callable[[Any, Tensor], None]]) -> None:
        super().__init__()
        self.habits = habits
        self.count, self.to_delete = 0, "here"
        self.table = torch.zeros(3)
        self.seen, self.nested = ["first", torch.zeros(2)], {"inner": [{"deep": 1}]}
        self.by_shape, self.ordered = {"first": 1}, OrderedDict(a=1, b=2)
        self.names, self.queue = {"one", "two"}, deque([1, 2], maxlen=2)
        self.biases: dict[Any, Tensor] = {}
        self.cache, self.slotted, self.outer = (
            Cache(torch.ones(2)),
            SlottedCache(torch.ones(2)),
            Outer(),
        )
        self.unregistered = [WithScale()]
        self.generator, self.dice = torch.Generator(), random.Random(1)
        self.arrays_dice = [np.random.default_rng(1), np.random.RandomState(1)]
        self.weight = nn.Parameter(torch.ones(2))
        self.bias = nn.Parameter(torch.ones(2))
        self.inner = nn.Linear(2, 2)
        self.register_buffer("scale", torch.arange(4.0))
        self.register_buffer("spare", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        for habit in self.habits:
            habit(self, x)
        return x


def picture(value: Any) -> Any:
    """All that a value holds, to any depth: identities of objects, orders and values."""
    if isinstance(value, Tensor):
        return id(value), value.detach().clone().tolist(), value.data_ptr(), tuple(value.shape)
    if isinstance(value, dict):
        return id(value), [(k, picture(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return id(value), [picture(v) for v in value]
    if isinstance(value, set):
        return id(value), frozenset(value)
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, (np.random.Generator, np.random.RandomState)):
        is_new = isinstance(value, np.random.Generator)
        return repr(value.bit_generator.state if is_new else value.get_state())
    if isinstance(value, SlottedCache):
        return id(value), picture(value.keys), value.length
    if isinstance(value, (nn.Module, Cache, Outer)):
        return id(value), picture(vars(value))
    return value


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(HABITS), max_size=4), min_size=1, max_size=3), st.booleans()
)
def test_a_run_leaves_no_trace_whatever_modules_keep(
    habits: list[list[Callable[..., None]]], fails: bool
) -> None:
    model = nn.Sequential(*(Hoarder(own) for own in habits))
    before, dice, python = picture(model), torch.get_rng_state().tolist(), random.getstate()
    with pytest.raises(KeyError) if fails else copy.copy(torch.no_grad()), undisturbed(model):
        assert not any(part.training for part in model.modules())
        for width in (3, 5):
            model(torch.randn(2, width))
        if fails:
            raise KeyError
    assert picture(model) == before
    assert (torch.get_rng_state().tolist(), random.getstate()) == (dice, python)


@pytest.mark.parametrize("habit", HABITS)
def test_each_habit_does_leave_a_trace_otherwise(habit: Callable[..., None]) -> None:
    model = nn.Sequential(Hoarder([habit]))
    before = picture(model)
    model(torch.randn(2, 3))
    assert picture(model) != before


def test_graphs_that_wait_for_backward_go_on() -> None:
    norm = nn.BatchNorm1d(3).eval()
    loss = norm(torch.randn(4, 3, requires_grad=True)).sum()
    with undisturbed(norm):
        norm(torch.randn(4, 3))
    loss.backward()


def test_tensors_of_a_graph_are_copied_without_it() -> None:
    hoarder = Hoarder([non_leaf])
    hoarder(torch.ones(2))
    hoarder.alias = [hoarder.product]
    made = deep_copy(hoarder)
    assert torch.equal(made.product, hoarder.product)
    assert made.product.is_leaf
    assert made.alias[0] is made.product
    assert made.biases[torch.device("cpu")] is not hoarder.biases[torch.device("cpu")]


def test_what_cannot_be_copied_is_shared_and_all_else_copied() -> None:
    module = nn.Linear(2, 2)
    module.lock, module.jobs = threading.Lock(), {"iterator": (i for i in range(3)), "seen": []}
    memo: dict[int, Any] = {}
    made = deep_copy(module, memo)
    assert made.lock is module.lock
    assert made.jobs["iterator"] is module.jobs["iterator"]
    assert made.jobs["seen"] is not module.jobs["seen"]
    assert memo[id(module.weight)] is made.weight is not module.weight


def test_what_still_fails_to_copy_raises_its_own_error() -> None:
    class Stubborn(nn.Module):
        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            raise ValueError("not me")

    with pytest.raises(ValueError, match="not me"):
        deep_copy(nn.Sequential(Stubborn()))


def test_caches_of_eval_mode_are_dropped_and_modes_kept() -> None:
    class Cached(nn.Module):
        def train(self, mode: bool = True) -> nn.Module:
            if mode:
                self.cache = {}
            return super().train(mode)

    model = nn.Sequential(Cached(), nn.Dropout()).eval()
    model[0].cache, model[1].training = {"cpu": 1}, True
    drop_caches(model)
    assert model[0].cache == {}
    assert [part.training for part in model.modules()] == [False, False, True]


def test_the_mode_is_put_back_by_kept_state_too() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    with kept_state(model):
        model.eval()
    assert all(part.training for part in model.modules())

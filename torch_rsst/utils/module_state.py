"""The state of modules, whatever they keep in it: put back after a run, or copied."""

from __future__ import annotations

import copy
import itertools
import operator
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from torch_rsst.utils.errors import refuse

_Undo = Callable[[], object]
_ATOMS = (
    *(int, float, complex, str, bytes, type(None), type, range, slice),
    *(FunctionType, BuiltinFunctionType, MethodType, ModuleType, torch.dtype, torch.device),
)
"""Never changed in place, or none of a module's own."""
_OBJECTS_DEEP = 2
"""A cache may hold layers that hold tensors; a trainer behind more objects is not a module's state."""


@contextmanager
def kept_state(module: nn.Module, *, managed: bool = False) -> Iterator[None]:
    """Put everything that the modules hold back after the block, in place.

    Attributes, buffers, submodules and hooks that the block adds are deleted, those that it deletes or
    sets come back, in their order; lists, dicts, sets, deques, arrays, tensors and objects among them get their
    old contents. What has not changed is not written to. Values of parameters are not kept: only
    whether a parameter is the same, on the same memory.

    Args:
        module: whose state is kept.
        managed: whether something else manages the parameters, as FSDP does: which there are, and
            objects other than containers, is then left to it.
    """
    undo = _snapshot(module, managed)
    try:
        yield
    finally:
        with torch.no_grad():
            for put_back in undo:
                put_back()


@contextmanager
def undisturbed(module: nn.Module, *, managed: bool = False) -> Iterator[None]:
    """Run the block in eval mode without gradients or compilation; keep the state of modules and random numbers.

    Args:
        module: whose modules run in the block.
        managed: see :func:`kept_state`.
    """
    state = kept_state(module, managed=managed), kept_random_state(module)
    with state[0], torch.no_grad(), state[1], _eagerly():
        module.eval()
        yield


def _eagerly() -> AbstractContextManager[object]:
    """Lets compiled modules run as they were written: the compiler refuses hooks that are put on them."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and to import it takes seconds
        return nullcontext()
    return cast(AbstractContextManager[object], torch.compiler.set_stance("force_eager"))


@contextmanager
def kept_random_state(module: nn.Module) -> Iterator[None]:
    """Put the states of random number generators back after the block: Python's, NumPy's and PyTorch's.

    Args:
        module: on whose devices PyTorch's are kept.
    """
    devices = list({p.device for p in module.parameters() if p.device.type == "cuda"})
    dice, numpy = random.getstate(), sys.modules.get("numpy")
    numpy_dice = numpy.random.get_state() if numpy is not None else None
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(dice)
        if numpy is not None:
            numpy.random.set_state(numpy_dice)


def deep_copy(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy of a module, whatever it holds.

    Tensors that are part of a graph, which PyTorch does not copy, are copied without it; objects
    that cannot be copied (locks, streams) are shared.

    Args:
        module: not changed.
        memo: as of :func:`copy.deepcopy`; filled.

    Raises:
        ValueError: for tensors that a ``__deepcopy__`` shares: what is done to a copy would be done to them.
    """
    memo = {} if memo is None else memo
    given = {id(value) for value in memo.values()}
    for shared in _sharings(module):
        attempt = memo | shared()
        try:
            with _WithoutGraph():
                made = copy.deepcopy(module, attempt)
        except Exception as failure:
            error = failure
            continue
        memo.update(attempt)
        _check_apart(module, made, given)
        return made
    raise error


def _check_apart(module: nn.Module, made: nn.Module, given: Container[int]) -> None:
    """Refuse copies that hold tensors of the module, but for those whose ids are given."""
    own = {id(tensor) for tensor in itertools.chain(made.parameters(), made.buffers())}
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if id(tensor) in own and id(tensor) not in given:
            got = "one that a __deepcopy__ shares with the copy"
            remedy = "Let that __deepcopy__ copy its parameters and buffers."
            refuse(ValueError, name, "a tensor that copy.deepcopy copies", got, remedy)


def drop_caches(module: nn.Module) -> None:
    """Let modules drop what they computed once for eval mode, as they do when the mode changes.

    For whoever changes weights in place. The modes are as before afterwards.
    """
    modes = [(part, part.training) for part in module.modules()]
    for mode in (not module.training, module.training):
        module.train(mode)
    for part, mode in modes:
        part.training = mode


def contents_back(value: Any) -> _Undo:
    """What puts the contents of a container back, in place; what has not changed is not written to.

    Args:
        value: a dict, list, bytearray, set or deque.
    """
    if isinstance(value, dict):
        return partial(_refill_dict, value, list(value.items()))
    return partial(_refill, value, list(value))


def _sharings(module: nn.Module) -> Iterator[Callable[[], dict[int, Any]]]:
    """What to share, from nothing to every object that cannot be copied."""
    yield dict
    for inner in (True, False):
        yield partial(_not_copyable, module, inner)


def _not_copyable(module: nn.Module, inner: bool) -> dict[int, Any]:
    """Id → object that copy.deepcopy refuses; the ``inner`` ones alone, which hold no others."""
    found: dict[int, Any] = {}
    for value in _reachable(module):
        if isinstance(value, (nn.Module, Tensor, list, tuple, dict)) or (inner and _fields(value)):
            continue
        try:
            with _WithoutGraph():
                copy.deepcopy(value)
        except Exception:
            found[id(value)] = value
    return found


class _WithoutGraph(TorchFunctionMode):
    """Lets copy.deepcopy copy tensors that are no leaves."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """See :class:`torch.overrides.TorchFunctionMode`."""
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            memo[id(tensor)] = made = memo.get(id(tensor), tensor.detach().clone())
            return made
        return func(*args, **(kwargs or {}))


def _snapshot(module: nn.Module, managed: bool) -> list[_Undo]:
    undo: list[_Undo] = []
    numpy = sys.modules.get("numpy")
    places = [part._parameters for part in module.modules()] if managed else []
    skipped = {id(value) for value in (*places, *(p for d in places for p in d.values()))}
    for value in _reachable(module, 0 if managed else _OBJECTS_DEEP):
        if id(value) in skipped:
            continue
        if isinstance(value, Tensor):
            if not is_lazy(value):
                undo.append(_of_tensor(value))
        elif isinstance(value, (dict, list, bytearray, set, deque)):
            undo.append(contents_back(value))
        elif isinstance(value, torch.Generator):
            undo.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            undo.append(partial(value.setstate, value.getstate()))
        elif numpy is not None and isinstance(value, numpy.ndarray):
            undo.append(partial(numpy.copyto, value, value.copy()))
        elif numpy is not None and isinstance(value, numpy.random.RandomState):
            undo.append(partial(value.set_state, value.get_state()))
        elif numpy is not None and isinstance(value, numpy.random.Generator):
            undo.append(partial(setattr, value.bit_generator, "state", value.bit_generator.state))
        elif slots := _slots(value):
            undo.append(partial(_put_slots, value, slots))
    return undo


def _reachable(module: nn.Module, objects_deep: int = _OBJECTS_DEEP) -> Iterator[Any]:
    """Everything a module holds that can change in place, once each; dicts of attributes, too."""
    waiting: list[tuple[Any, int]] = [(module, 0)]
    seen: dict[int, Any] = {}  # held, so that ids stay unique
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, _ATOMS) or id(value) in seen:
            continue
        seen[id(value)] = value
        yield value
        if isinstance(value, dict):
            inside = [*value.values()]
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            inside = [*value]
        elif isinstance(value, Tensor):
            continue
        else:
            depth += not isinstance(value, nn.Module)
            inside = _fields(value) if depth <= objects_deep else []
        waiting += [(part, depth) for part in inside]


def _fields(value: Any) -> list[Any]:
    """The dict of an object's attributes, and the values of its slots."""
    attributes = getattr(value, "__dict__", None)
    return [*([attributes] if isinstance(attributes, dict) else []), *_slots(value).values()]


def _slots(value: Any) -> dict[str, Any]:
    if type(value).__module__ in ("builtins", "collections"):
        return {}
    names = (vars(cls).get("__slots__", ()) for cls in type(value).__mro__)
    flat = [name for n in names for name in ((n,) if isinstance(n, str) else n)]
    return {name: getattr(value, name) for name in flat if hasattr(value, name)}


def _put_slots(value: Any, before: dict[str, Any]) -> None:
    now = _slots(value)
    for name in now.keys() - before.keys():
        object.__delattr__(value, name)
    for name, held in before.items():
        if name not in now or now[name] is not held:
            object.__setattr__(value, name, held)


def _of_tensor(tensor: Tensor) -> _Undo:
    """A parameter gets its memory back; other tensors their values, too."""
    before = tensor.detach()
    valued = not isinstance(tensor, nn.Parameter) and tensor.layout is torch.strided
    value = before.clone() if valued and not tensor.is_meta else None

    def put_back() -> None:
        if _memory(tensor) != _memory(before):
            tensor.data = before
        # Writing what is there already would disturb graphs that wait for backward.
        if value is not None and not torch.equal(before, value):
            tensor.copy_(value)

    return put_back


def _memory(tensor: Tensor) -> tuple[object, ...]:
    if tensor.layout is not torch.strided:
        return tensor.shape, tensor.dtype
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr()


def _refill_dict(now: dict[Any, Any], before: list[tuple[Any, Any]]) -> None:
    if len(now) == len(before) and all(
        k is a and v is b for (k, v), (a, b) in zip(now.items(), before, strict=True)
    ):
        return
    # Of the base class: some subclasses refuse to be changed.
    base: Any = OrderedDict if isinstance(now, OrderedDict) else dict
    base.clear(now)
    for key, value in before:
        base.__setitem__(now, key, value)


def _refill(now: Any, before: list[Any]) -> None:
    if len(now) == len(before) and not any(map(operator.is_not, now, before)):
        return
    if isinstance(now, (set, deque)):
        now.clear()
        add = now.update if isinstance(now, set) else now.extend
        add(before)
    else:
        now[:] = before

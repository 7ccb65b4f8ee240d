"""How the layers that consume units are used, seen while the model runs on one batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from torch_rsst.importance.input_hooks import HookedInput, recorded
from torch_rsst.importance.recorder import plain
from torch_rsst.masking.live_weight import product
from torch_rsst.masking.parameter_ref import ParameterRef
from torch_rsst.reconstruction.linear_form import LinearForm, linear_form, outputs_of
from torch_rsst.utils.errors import refuse

# Of the norm of the outputs: more than rounding changes (in TF32, in 16 bits), less than another formula.
_TOLERANCE, _TOLERANCE_16_BITS = 5e-3, 5e-2


@dataclass(frozen=True, eq=False)
class Consumer:
    """A layer that consumes units.

    Attributes:
        name: of its weight.
        inputs: the places where the weight is used: one, or several where it is tied.
        form: the layer as a linear map.
        bias: its bias; None where it has none, or tied weights have several.
        norm: the batch norm that all its outputs go to, for a layer without a bias; None where they go
            elsewhere too.
    """

    name: str
    inputs: tuple[HookedInput, ...]
    form: LinearForm
    bias: ParameterRef | None
    norm: nn.Module | None

    @property
    def ref(self) -> ParameterRef:
        """The reference to its weight."""
        return self.inputs[0].ref


class Survey:
    """Watches the consumers of units in one run of the model: in which order, with which outputs.

    The model runs within :meth:`watching`; :meth:`consumers` is for afterwards.
    """

    def __init__(self, inputs: Sequence[HookedInput]) -> None:
        """Find the linear form of each layer.

        Raises:
            ValueError: for a layer that is not linear in its weight and input as far as is known.
        """
        self._places: dict[str, list[HookedInput]] = {}
        self._forms: dict[str, LinearForm] = {}
        for hooked in inputs:
            if (form := linear_form(hooked.ref.module, hooked.dim)) is None:
                _refuse(hooked, f"that of a {type(hooked.ref.module).__name__}")
            self._forms[hooked.name] = form
            self._places.setdefault(hooked.name, []).append(hooked)
        self._order: dict[str, None] = {}
        self._uses = _Uses()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the run that is made in this block.

        Raises:
            ValueError: for a layer whose outputs are not those of its linear form.
        """
        values: dict[int, Tensor] = {}

        def record(hooked: HookedInput, value: Tensor) -> Tensor:
            self._order[hooked.name] = None
            values[id(hooked)] = plain(value).clone()  # the layer or its callers may write to it
            return value

        with ExitStack() as stack:
            # Nested in this order, outputs are known before the next function is called.
            stack.enter_context(self._uses)
            every = [hooked for places in self._places.values() for hooked in places]
            stack.enter_context(recorded(every, record))
            for hooked in every:

                def after(_: nn.Module, __: Any, output: Any, hooked: HookedInput = hooked) -> None:
                    self._check(hooked, values.pop(id(hooked)), output)
                    self._uses.outputs[id(output)] = (hooked.name, output)

                stack.callback(hooked.ref.module.register_forward_hook(after).remove)
            yield

    def _check(self, hooked: HookedInput, value: Tensor, output: Any) -> None:
        """Raise unless a layer computes what its class suggests."""
        module, form = hooked.ref.module, self._forms[hooked.name]
        kind = type(module).__name__
        if not isinstance(output, Tensor):
            _refuse(hooked, f"that of a {kind}, which returns a {type(output).__name__}")
        weight, bias = weight_and_bias(hooked.ref)
        expected = outputs_of(form, form.features(value.double()), weight, bias)
        got = form.flat(plain(output).double())
        narrow = output.dtype in (torch.float16, torch.bfloat16)
        allowed = (_TOLERANCE_16_BITS if narrow else _TOLERANCE) * got.norm() + 1e-6
        # Of numbers that are not finite, none is larger: the sums will tell.
        if got.shape != expected.shape or bool((expected - got).norm() > allowed):
            _refuse(hooked, f"that of a {kind}, which computes something else")

    def consumers(self, model: nn.Module) -> list[Consumer]:
        """The consumers, in the order in which they ran.

        Raises:
            ValueError: for one that did not run.
        """
        for name in self._places:
            if name not in self._order:
                remedy = "Pass a forward that runs it, or leave its groups out."
                expected, got = "a layer that runs", "one that did not run on the first batch"
                refuse(ValueError, f"reconstruct: {name!r}", expected, got, remedy)
        norms = {
            id(mean): module
            for module in model.modules()
            if (mean := module._buffers.get("running_mean")) is not None
        }
        found = []
        for name in self._order:
            places = self._places[name]
            biases = [bias_of(each.ref.module) for each in places]
            same = len({None if b is None else id(b.original) for b in biases}) == 1
            bias = biases[0] if same else None
            norm = None if any(biases) else norms.get(self._uses.only_running_mean(name))
            found.append(Consumer(name, tuple(places), self._forms[name], bias, norm))
        return found


class _Uses(TorchFunctionMode):
    """Notes what the outputs of layers are passed to."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[int, tuple[str, Tensor]] = {}  # tensors, held so that ids stay theirs
        self._by_name: dict[
            str, list[int]
        ] = {}  # the running mean of each use; 0: not a batch norm
        self._norm_calls: Counter[int] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """See :class:`torch.overrides.TorchFunctionMode`."""
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        mean = 0
        if func is F.batch_norm:
            mean = id(args[1] if len(args) > 1 else kwargs.get("running_mean"))
            self._norm_calls[mean] += 1
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(made)):  # no question of its shape
            for leaf in tree_leaves((args, kwargs)):
                if id(leaf) in self.outputs:
                    self._by_name.setdefault(self.outputs[id(leaf)][0], []).append(mean)
        return made

    def only_running_mean(self, name: str) -> int:
        """The id of the running mean of the batch norm that takes this layer's outputs alone, or 0."""
        uses = self._by_name.get(name, [])
        outputs = sum(owner == name for owner, _ in self.outputs.values())
        alone = len(set(uses)) == 1 and len(uses) == outputs == self._norm_calls[uses[0]]
        return uses[0] if alone else 0


def bias_of(module: nn.Module) -> ParameterRef | None:
    """The bias of a layer; None where it has none."""
    ref = ParameterRef(module, "bias")
    return ref if ref.is_masked or module._parameters.get("bias") is not None else None


def weight_and_bias(ref: ParameterRef) -> tuple[Tensor, Tensor | None]:
    """What a layer computes with, in float64: masked entries are 0; a bias that is not there is None."""
    bias = None if bias_of(ref.module) is None else plain(product(ref.module, "bias")).double()
    return plain(product(ref.module, ref.name)).double(), bias


def _refuse(hooked: HookedInput, got: str) -> NoReturn:
    expected = "the weight of a linear layer or a convolution"
    remedy = "Leave out the groups that this layer consumes, or mask them with apply_mask."
    refuse(ValueError, f"reconstruct: {hooked.name!r}", expected, got, remedy)

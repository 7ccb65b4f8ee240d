"""What flows from one layer of a module to the next: which of their features meet, told by derivatives.

A module is run with noise in the place of what each product with its parameters puts out. So every such
product is followed by itself, whatever its inputs are, and whatever the module computes between.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from torch_rsst.discovery.adapter import Call
from torch_rsst.discovery.probe import run_call
from torch_rsst.discovery.trial import tensors_in
from torch_rsst.utils.module_state import kept_random_state

PRODUCTS = {
    *(F.linear, torch.addmm, torch.mm, torch.bmm, torch.baddbmm, torch.matmul, torch.einsum),
    *(Tensor.mm, Tensor.bmm, Tensor.matmul, torch.tensordot, F.conv1d, F.conv2d, F.conv3d),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
}
"""Functions that multiply activations by matrices of parameters."""
_SCORES = {
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), 1),
    F.scaled_dot_product_attention: 2,
}
"""Functions that do not see what is added to all scores → how many of their tensors make these."""
_FLAT = {
    *(F.relu, torch.relu, Tensor.relu, F.relu6, F.hardtanh, F.hardswish, F.hardsigmoid),
    *(torch.clamp, Tensor.clamp),
}
"""Functions whose derivatives are zero in places, where nothing would tell what flows through them."""
_CONTRACTIONS = ("Bmm", "Mm", "Mv", "Baddbmm", "Addmm", "Dot", "ScaledDotProduct")
"""How nodes of a graph begin that multiply activations and sum over a dimension."""

Masks = Mapping[int, Tensor]
"""Place of a product among all → bool, of the shape of what it puts out."""
Reached = dict[str, tuple[Tensor, ...]]
"""Name of a parameter or buffer → for each of its dimensions, which indices have an entry that takes part."""


@dataclass(frozen=True, eq=False)
class Product:
    """A product of activations with parameters.

    Attributes:
        again: makes it of other activations.
        given: the activations, in the graph that they were made in.
        out: what it puts out, in a graph that reaches its parameters only.
        noise: what went on instead.
    """

    again: Callable[[Tensor], Tensor]
    given: Tensor
    out: Tensor
    noise: Tensor


def contracts(out: Tensor, leaves: Collection[Tensor]) -> bool:
    """Whether a tensor was made by multiplying tensors and summing over a dimension.

    A product with what is neither of the leaves nor a product itself does not count: a recurrent layer
    multiplies what it remembers by its parameters.
    """
    known = set(map(id, leaves))
    counts: dict[Any, bool] = {}
    waiting = [out.grad_fn] if out.grad_fn is not None else []
    while waiting:
        node = waiting[-1]
        before = [n for n, _ in node.next_functions if n is not None]
        if missing := [n for n in before if n not in counts]:
            waiting += missing
            continue
        waiting.pop()
        factors, is_product = sum(counts[n] for n in before), node.name().startswith(_CONTRACTIONS)
        if is_product and factors > 1:
            return True
        is_leaf = id(getattr(node, "variable", None)) in known
        counts[node] = is_product or is_leaf or factors > 0
    return False


class Flow:
    """The products in one run of a module, and what reaches them from each other.

    Args:
        module: in eval mode; its parameters, and buffers, are made to require gradients.
        call: its arguments.

    Attributes:
        tensors: its parameters and buffers of floats, by name.
        products: in the order in which they ran.
        scores: what attention weights were made of: scores, or queries and keys.
        whole: the name of a function that computes a whole attention from its parameters, if one ran.
        out: what it puts out.
    """

    def __init__(self, module: nn.Module, call: Call) -> None:
        self.module, self.call = module, call
        self.tensors: dict[str, Tensor] = {
            name: tensor.requires_grad_()
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
            if tensor.is_floating_point()
        }
        noisy, self.out = self._run()
        self.products, self.scores, self.whole = noisy.products, noisy.scores, noisy.whole

    def _run(self, known: Sequence[Tensor] = (), seed: int = -3) -> tuple[_Noisy, Any]:
        noisy = _Noisy([*self.module.parameters()], known, seed)
        kept = kept_random_state(self.module)
        with torch.enable_grad(), kept, _copies(self.module), noisy:
            torch.manual_seed(0)
            out = run_call(self.module, self.call)
        return noisy, out

    def reach(self, place: int, mask: Tensor) -> tuple[dict[int, Tensor], Reached]:
        """What a part of the activations of a product depends on.

        Args:
            place: of the product.
            mask: of its activations, broadcastable to them.

        Returns:
            of the products before it, and of parameters and buffers used between.
        """
        before = {i: self.products[i].noise for i in range(place)}
        gradients = _gradients(
            self.products[place].given, mask, [*before.values(), *self.tensors.values()]
        )
        outs = {
            i: g != 0
            for i, g in zip(before, gradients, strict=False)
            if g is not None and bool((g != 0).any())
        }
        return outs, _reached(self.tensors, gradients[len(before) :])

    def gives(self, place: int, mask: Tensor) -> Reached:
        """The entries of parameters that make a part of what a product puts out."""
        gradients = _gradients(self.products[place].out, mask, [*self.tensors.values()])
        return _reached(self.tensors, gradients)

    def takes(self, place: int, mask: Tensor) -> Reached:
        """The entries of parameters that a part of the activations of a product is multiplied by."""
        product = self.products[place]
        with torch.enable_grad():
            out = product.again(product.given.detach() * mask)
        return _reached(self.tensors, _gradients(out, None, [*self.tensors.values()]))

    def moved(self, place: int, added: Masks, seed: int = -3) -> Tensor:
        """The activations of a product where something is added to what products before it put out.

        Or where all scores are others, by another seed.
        """
        made = [p.noise.detach() + added.get(i, 0.0) for i, p in enumerate(self.products)]
        return self._run(made, seed)[0].products[place].given.detach()

    def scored(self, place: int, mask: Tensor, own: Masks) -> bool | None:
        """Whether some features make the scores by which a part of a product's activations is attended.

        Args:
            place: of the product.
            mask: of its activations, broadcastable to them.
            own: of what products before it put out.

        Returns:
            None where no scores make a difference to this part.
        """
        found: bool | None = None
        for scores, used in self.used(place, mask):
            reached = _gradients(scores, used, [self.products[i].noise for i in own])
            pairs = zip(reached, own.values(), strict=True)
            found = found or any(g is not None and bool((g * o).any()) for g, o in pairs)
        return found

    def used(self, place: int, mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Scores that make a difference to a part, and which of their entries do."""
        gradients = _gradients(self.products[place].given, mask, self.scores)
        for scores, gradient in zip(self.scores, gradients, strict=True):
            if gradient is not None and bool((used := gradient != 0).any()):
                yield scores, used


class _Noisy(TorchFunctionMode):
    """Puts noise in the place of every product with parameters."""

    def __init__(self, parameters: Sequence[Tensor], known: Sequence[Tensor], seed: int) -> None:
        super().__init__()
        self.products: list[Product] = []
        self.scores: list[Tensor] = []
        self.whole = ""
        self._weights = {id(p): p for p in parameters}  # held, so that ids stay unique
        self._known, self._seed = known, seed

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """See :class:`torch.overrides.TorchFunctionMode`."""
        kwargs = kwargs or {}
        if func is Tensor.detach:  # as before it is kept for the next run
            out: Tensor = args[0]
            return out
        # Not the number of an expert, say, by which one matrix of a stack is picked.
        tensors = [t for t in tensors_in((args, kwargs)) if t.ndim or t.is_floating_point()]
        weights = [tensor for tensor in tensors if id(tensor) in self._weights]
        given = [tensor for tensor in tensors if id(tensor) not in self._weights]
        # A grouped convolution maps no features to others: it is followed through.
        is_product = func in PRODUCTS and len(given) == 1 and any(w.ndim > 1 for w in weights)
        if is_product and _groups(args, kwargs) == 1:
            return self._noise(func, args, kwargs, given[0])
        if func in _SCORES:  # otherwise a bias of all keys had no gradient
            *queries, scores = tensors[: _SCORES[func]]
            uneven = scores * noise(scores.shape, seed=self._seed).exp().to(scores)
            args, kwargs = tree_map(lambda v: uneven if v is scores else v, (args, kwargs))
            self.scores += [t for t in (*queries, uneven) if t.requires_grad]
        if func is F.multi_head_attention_forward:
            self.whole = func.__name__
        is_flat = func in _FLAT and bool(args) and args[0].is_floating_point()
        slope = 0.1 * args[0] if is_flat else None  # before it is changed in place
        out = _normalized(*args, **kwargs) if func is F.batch_norm else func(*args, **kwargs)
        out = out if slope is None else out + slope
        if weights and not given:  # made of parameters alone
            self._weights.update({id(tensor): tensor for tensor in tensors_in(out)})
        return out

    def _noise(self, func: Any, args: Any, kwargs: Any, given: Tensor) -> Tensor:
        def again(x: Tensor) -> Tensor:
            changed = tree_map(lambda value: x if value is given else value, (args, kwargs))
            out: Tensor = func(*changed[0], **changed[1])
            return out

        place = len(self.products)
        if place < len(self._known):
            out = made = self._known[place]
        else:
            out = again(given.detach())
            made = noise(out.shape, seed=place).to(out.detach()).requires_grad_()
        self.products.append(Product(again, given, out, made))
        return made.clone()  # which may be written to


@contextmanager
def _copies(module: nn.Module) -> Iterator[None]:
    """Copies in the place of buffers, which a forward may write to."""
    held = [(part, dict(part._buffers)) for part in module.modules()]
    copies = {
        buffer: buffer.clone() for _, own in held for buffer in own.values() if buffer is not None
    }
    try:
        for part, own in held:
            part._buffers.update({k: copies[b] for k, b in own.items() if b is not None})
        yield
    finally:
        for part, own in held:
            part._buffers.update(own)


def noise(shape: Sequence[int], *, seed: int) -> Tensor:
    """Normal random numbers, on the CPU; others for another seed."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def _gradients(
    out: Tensor, mask: Tensor | None, inputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """Of a random sum over a part of a tensor, so that nothing cancels."""
    if not (out.requires_grad and inputs):
        return [None] * len(inputs)
    weights = noise(out.shape, seed=-2).to(out)
    if mask is not None:
        weights = weights * mask
    return torch.autograd.grad(out, inputs, weights, retain_graph=True, allow_unused=True)


def _reached(tensors: Mapping[str, Tensor], gradients: Sequence[Tensor | None]) -> Reached:
    found: Reached = {}
    for name, gradient in zip(tensors, gradients, strict=True):
        if gradient is not None and bool((hit := gradient != 0).any()):
            dims = range(hit.ndim)
            found[name] = tuple(any_but(hit, dim).cpu() for dim in dims)
    return found


def any_but(hit: Tensor, dim: int) -> Tensor:
    """Along one dimension, whether any entry is True."""
    return hit.movedim(dim, 0).flatten(1).any(1) if hit.ndim > 1 else hit


def _normalized(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """What a batch norm puts out: PyTorch's has no gradients of its statistics."""
    if training or mean is None or var is None:
        return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    shape = (-1, *[1] * (x.ndim - 2))
    out = (x - mean.view(shape)) * (var.view(shape) + eps).rsqrt()
    out = out if weight is None else out * weight.view(shape)
    return out if bias is None else out + bias.view(shape)


def _groups(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Of a convolution; 1 for other functions."""
    groups = kwargs.get("groups", args[6] if len(args) > 6 else 1)
    return groups if isinstance(groups, int) else 1

"""One parameter and its mask: find it, mask it, restore it; all or nothing.

This is the only room that touches PyTorch's reparametrization: ``weight`` becomes the parameter
``weight_orig`` (the same object, at the same place in the parameter order), the buffer
``weight_mask`` and their product ``weight``, with a pruning hook as PyTorch leaves one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod, PruningContainer

from torch_rsst.errors import listing, message
from torch_rsst.fsdp import reshard, tell_of_new_name
from torch_rsst.live_weight import MASK, ORIG, make_live, make_plain, product
from torch_rsst.shards import is_sharded, local, placed_like
from torch_rsst.workers import Workers

MASKABLE = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

Parameter: TypeAlias = tuple[nn.Module, str]
"""How PyTorch's pruning calls name a parameter."""

_PACKED = 1 << 20  # entries of a mask that are packed to bits together

NewMask: TypeAlias = Tensor | Callable[[Tensor], object]
"""A mask of zeros and ones, or what writes it into a tensor: then it exists once, where it is used."""


@dataclass(frozen=True)
class Site:
    """A place that holds a parameter: ``module`` and the parameter's dense name in it."""

    module: nn.Module
    name: str

    @property
    def original(self) -> nn.Parameter:
        """The trainable parameter, ``weight_orig`` where masked, else ``weight``."""
        parameters = self.module._parameters
        found = parameters.get(self.name + ORIG) if self.is_masked else parameters.get(self.name)
        assert found is not None, "check_site() lets no other parameter in"
        return found

    @property
    def is_masked(self) -> bool:
        """Whether ``weight_orig`` and ``weight_mask`` both exist."""
        has_orig = self.module._parameters.get(self.name + ORIG) is not None
        return has_orig and self.module._buffers.get(self.name + MASK) is not None

    @property
    def mask(self) -> Tensor | None:
        """The mask buffer, in the parameter's dtype; None where dense."""
        return self.module._buffers[self.name + MASK] if self.is_masked else None

    @property
    def alive(self) -> Tensor | None:
        """The current mask as bool, distributed as the parameter is; None where dense (all alive)."""
        return None if self.mask is None else placed_like(self.mask != 0, self.original)

    def __str__(self) -> str:
        return f"'{self.name}' of {type(self.module).__name__}"


def dense_name(module: nn.Module, key: str) -> str:
    """The name that parameter ``key`` of ``module`` has when nothing is pruned."""
    name = key.removesuffix(ORIG)
    return name if name != key and Site(module, name).is_masked else key


def check_site(module: object, name: object) -> Site:
    """The site of a parameter that can be masked.

    Raises:
        TypeError: unless given a module and a string.
        ValueError: where the name is no maskable parameter; says which are.
    """
    if not isinstance(module, nn.Module) or not isinstance(name, str):
        got = f"({type(module).__name__}, {name!r})"
        remedy = "Pass for example (model.fc, 'weight')."
        raise TypeError(
            message("parameter", expected="a (module, name) pair", got=got, remedy=remedy)
        )
    site = Site(module, name)
    reshard([module])
    if site.is_masked:
        return site
    subject = f"parameter {site}"
    own = [dense_name(module, key) for key, p in module._parameters.items() if p is not None]
    if parametrize.is_parametrized(module, name):
        remedy = "Call torch.nn.utils.parametrize.remove_parametrizations first."
        raise ValueError(
            message(subject, expected="a plain parameter", got="a parametrized one", remedy=remedy)
        )
    if name.endswith(ORIG) and name.removesuffix(ORIG) in own:
        remedy = f"Pass {name.removesuffix(ORIG)!r}: masks of one parameter combine."
        got = "the original of a parameter that is masked already"
        raise ValueError(
            message(subject, expected="a dense parameter name", got=got, remedy=remedy)
        )
    parameter = module._parameters.get(name)
    if parameter is None:
        remedy = f"It has {listing(own)}." if own else "It has no parameters of its own."
        raise ValueError(
            message(subject, expected="one of the module's parameters", got="none", remedy=remedy)
        )
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        remedy = "Run one forward pass first, so that its shape is known."
        raise ValueError(
            message(subject, expected="an initialized parameter", got="a lazy one", remedy=remedy)
        )
    if parameter.layout != torch.strided:
        got, remedy = str(parameter.layout), "Call to_dense() first."
        raise ValueError(message(subject, expected="a dense tensor", got=got, remedy=remedy))
    if any(
        n > 1 and step == 0 for n, step in zip(parameter.shape, parameter.stride(), strict=True)
    ):
        expected, got = "entries with memory of their own", "an expanded tensor"
        remedy = "Clone it first: its entries cannot be masked one by one."
        raise ValueError(message(subject, expected=expected, got=got, remedy=remedy))
    if parameter.dtype not in MASKABLE:
        expected = f"one of {', '.join(map(str, MASKABLE))}"
        remedy = "Cast it first, or leave it out: only such weights can be pruned."
        raise ValueError(message(subject, expected=expected, got=parameter.dtype, remedy=remedy))
    return site


def parameter_list(parameters: object) -> list[Any]:
    """What a user lists to be ranked, as a list; any iterable but a string will do.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(parameters, str) or not isinstance(parameters, Iterable):
        raise TypeError(_not_pairs(type(parameters).__name__))
    return list(parameters)


def site_of(pair: object) -> Site:
    """The site of a (module, name) pair.

    Raises:
        TypeError, ValueError: for no such pair, or as :func:`check_site` does.
    """
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
        raise TypeError(_not_pairs(repr(pair)))
    return check_site(*pair)


def _not_pairs(got: str) -> str:
    remedy = "Pass a list such as [(model.fc, 'weight')]."
    return message("parameters", expected="(module, name) pairs", got=got, remedy=remedy)


class _Masked(BasePruningMethod):
    """How a hook of ours gives the masked weight and makes it permanent."""

    def __call__(self, module: nn.Module, inputs: object) -> None:
        """Before a forward pass; only recurrent layers, which read a list of weights, need it."""
        if isinstance(module, nn.RNNBase):
            setattr(module, self._tensor_name, self.apply_mask(module))

    def apply_mask(self, module: nn.Module) -> Tensor:
        """The masked weight; see :func:`torch_rsst.live_weight.product`."""
        return product(module, self._tensor_name)

    def remove(self, module: nn.Module) -> None:
        """Make the pruning permanent: ``weight`` is a parameter again, zero where it was masked.

        As with the stock methods, the caller deletes the hook: :func:`torch.nn.utils.prune.remove`
        and other libraries do.
        """
        make_permanent(Site(module, self._tensor_name))


class MaskHook(_Masked):
    """The hook that marks a parameter as masked, and what our pruning methods share.

    Unlike the stock methods it holds no tensor, keeps the order of parameters, scores
    ``weight_orig`` instead of the product, changes nothing when it fails, and replaces its own
    earlier state instead of stacking. Subclasses override :meth:`compute_mask`, which is pure;
    what they leave in the model is a plain hook, so that a pruned model pickles whatever
    arguments they had.
    """

    PRUNING_TYPE = "global"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The mask as it is."""
        return default_mask

    @classmethod
    def apply(
        cls,
        module: nn.Module,
        name: str,
        *args: Any,
        importance_scores: Tensor | None = None,
        **kwargs: Any,
    ) -> BasePruningMethod:
        """Mask one parameter, as :meth:`torch.nn.utils.prune.BasePruningMethod.apply` does."""
        method = cls(*args, **kwargs)
        method._apply_to(check_site(module, name), importance_scores)
        return method

    def _apply_to(self, site: Site, importance_scores: Tensor | None) -> None:
        scores = check_scores(site, importance_scores)
        default = torch.ones_like(site.original) if site.mask is None else site.mask.clone()
        mask = self._new_mask(scores, default.detach(), given=importance_scores is not None)
        install([(site, mask != 0)])
        self._tensor_name = site.name

    def _new_mask(self, scores: Tensor, mask: Tensor, *, given: bool) -> Tensor:
        """The mask from the weights, or from scores that the caller has given."""
        return self.compute_mask(scores, default_mask=mask)


class MaskContainer(_Masked, PruningContainer):
    """Stock methods that came first and ours, as PyTorch composes them."""


def check_has_values(site: Site) -> None:
    """Raise a ValueError for a parameter on the meta device: it can be masked, but not ranked."""
    if site.original.is_meta:
        remedy = "Materialize the model first: load_state_dict(…, assign=True), or to_empty."
        got = "a parameter on the meta device"
        raise ValueError(message(f"parameter {site}", expected="values", got=got, remedy=remedy))


def check_scores(site: Site, scores: Tensor | None) -> Tensor:
    """What a site is ranked by: ``weight_orig``, or the scores that were given.

    Raises:
        TypeError: unless given a tensor of numbers.
        ValueError: for another shape than the parameter's.
    """
    if scores is None or site.is_masked:
        check_has_values(site)
    if scores is None:
        return site.original.detach()
    subject = f"importance_scores for {site}"
    remedy = "Give every entry of the parameter one score."
    if not isinstance(scores, Tensor) or scores.is_complex() or scores.dtype == torch.bool:
        got = str(scores.dtype) if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(message(subject, expected="a tensor of numbers", got=got, remedy=remedy))
    if scores.shape != site.original.shape:
        expected = f"shape {tuple(site.original.shape)}"
        got = f"shape {tuple(scores.shape)}"
        raise ValueError(message(subject, expected=expected, got=got, remedy=remedy))
    return scores.detach()


def install(masks: Sequence[tuple[Site, NewMask]]) -> None:
    """Set masks exactly, in place, all or none.

    Args:
        masks: sites and new masks of their parameters' shapes.
    """
    sites = [site for site, _ in masks]
    # A mask made in inference mode could not be changed outside it.
    with torch.inference_mode(False), rolled_back_on_failure(sites):
        shared: dict[int, Tensor] = {}  # tied parameters share one mask as they share one original
        for site, alive in masks:
            original = id(site.original)
            if original not in shared:
                shared[original] = _mask_buffer(site, alive)
            _reparametrize(site, shared[original])
            hook = _set_hook(site)
            hook(site.module, ())


def _mask_buffer(site: Site, alive: NewMask) -> Tensor:
    """The site's mask, holding ``alive``; written in place where there is one already."""
    with torch.no_grad():
        mask = torch.empty_like(site.original) if site.mask is None else site.mask
        if is_sharded(site.original) and not is_sharded(mask):
            mask = placed_like(mask, site.original).clone()  # masked before it was sharded
        if isinstance(alive, Tensor):
            mask.copy_(placed_like(alive, mask))
        else:
            alive(mask)
    return mask


def as_tensor(site: Site, mask: NewMask) -> Tensor:
    """The new mask of a site by itself."""
    if isinstance(mask, Tensor):
        return mask
    alive = torch.empty_like(site.original, dtype=torch.bool)
    mask(alive)
    return alive


def find_hook(site: Site) -> tuple[int, BasePruningMethod] | None:
    """The pruning hook of a site and its key."""
    for key, hook in site.module._forward_pre_hooks.items():
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == site.name:
            return key, hook
    return None


def _reparametrize(site: Site, mask: Tensor) -> None:
    if not site.is_masked:
        _rename(site.module._parameters, site.name, site.name + ORIG)
        tell_of_new_name(site.module, site.name, site.name + ORIG)
        site.module.register_buffer(site.name + MASK, mask)
    elif site.mask is not mask:
        site.module._buffers[site.name + MASK] = mask
    make_live(site.module, site.name)


def _set_hook(site: Site) -> _Masked:
    """Leave one hook of ours, alone or behind the stock methods that came before."""
    found = find_hook(site)
    if found is not None and isinstance(found[1], MaskHook):
        return found[1]
    hook = MaskHook()
    hook._tensor_name = site.name
    if found is None:
        site.module.register_forward_pre_hook(hook)
        return hook
    key, present = found
    earlier = tuple(present) if isinstance(present, PruningContainer) else (present,)
    stock = [method for method in earlier if not isinstance(method, MaskHook)]
    container = MaskContainer()
    container._tensor_name = site.name
    for method in (*stock, hook):
        container.add_pruning_method(method)
    site.module._forward_pre_hooks[key] = container
    return container


def _rename(ordered: dict[str, Any], old: str, new: str) -> None:
    """Rename a key where it stands: optimizers address parameters by position."""
    items = [(new if key == old else key, value) for key, value in ordered.items()]
    ordered.clear()
    ordered.update(items)


def restore(sites: Sequence[Site]) -> None:
    """Make the pruning of masked sites permanent and delete their hooks, ours or stock; all or none."""
    masked = {id(site.original): (site.original, site.mask) for site in sites}.values()
    latents: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.no_grad(), rolled_back_on_failure(sites):
        for site in sites:
            found = find_hook(site)
            _make_plain(site)
            if found is not None:
                del site.module._forward_pre_hooks[found[0]]
        try:
            for original, mask in masked:
                own, dead = local(original), local(_dead(original, mask))
                latents.append((own, dead, own[dead]))
                zero(original, mask)
        except BaseException:
            for own, dead, values in latents:
                own[dead] = values
            raise


def make_permanent(site: Site) -> None:
    """Undo the reparametrization in place: the parameter keeps its identity, place and gradient."""
    original, mask = site.original, site.mask
    _make_plain(site)
    zero(original, mask)


def zero(original: nn.Parameter, mask: Tensor | None) -> None:
    """Set a parameter to 0 where its mask is 0."""
    with torch.no_grad():
        local(original).masked_fill_(local(_dead(original, mask)), 0.0)


def _dead(original: nn.Parameter, mask: Tensor | None) -> Tensor:
    assert mask is not None, "only masked sites are made permanent"
    return placed_like(mask == 0, original)


def _make_plain(site: Site) -> None:
    """The parameter under its dense name, at its place; no mask, no property, no stored product."""
    module, original = site.module, site.original
    tell_of_new_name(module, site.name + ORIG, site.name)
    make_plain(module, site.name)
    module.__dict__.pop(site.name, None)
    del module._buffers[site.name + MASK]
    with place_kept(site):
        del module._parameters[site.name + ORIG]
        # Through setattr, which recurrent layers listen to.
        setattr(module, site.name, original)


@contextmanager
def place_kept(site: Site) -> Iterator[None]:
    """Put the parameter back to its place in the module, whatever name the block gives it."""
    registry = site.module._parameters

    def key() -> str | None:
        return next((k for k in (site.name + ORIG, site.name) if k in registry), None)

    old = key()
    order = list(registry)
    yield
    new = key()
    if old is None or new is None or list(registry)[order.index(old)] == new:
        return
    # In place: hooks, optimizers and parametrizations may hold the registry itself.
    for other in [new, *order[order.index(old) + 1 :]]:
        registry[other] = registry.pop(other)


@contextmanager
def rolled_back_on_failure(sites: Sequence[Site]) -> Iterator[None]:
    """Put modules back exactly as they were if the block raises, interrupts included."""
    modules = {id(site.module): site.module for site in sites}.values()
    saved = [(module, type(module), _shallow(module)) for module in modules]
    present = {id(site.mask): local(site.mask) for site in sites if site.mask is not None}
    masks = list(present.values())

    def pack(turn: int, turns: int) -> list[tuple[Tensor, Tensor]]:
        return [(mask, _packed(mask)) for mask in masks[turn::turns]]

    values = Workers(sum(mask.numel() for mask in masks) // _PACKED).run(pack)
    try:
        yield
    except BaseException:
        for module, cls, state in saved:
            module.__class__ = cls
            _put_back(module, state)
        for site in sites:
            now, other = site.name, site.name + ORIG
            if other in site.module._parameters:
                now, other = other, now
            tell_of_new_name(site.module, other, now)
        with torch.no_grad():
            for mask, bits in chain(*values):
                mask.copy_(_unpacked(bits, mask.shape))
        raise


def _packed(mask: Tensor) -> Tensor:
    """Which entries are not zero, one bit each."""
    flat = mask.reshape(-1)
    spare = torch.empty(
        2, -(-min(flat.numel(), _PACKED) // 8), dtype=mask.dtype, device=mask.device
    )
    return torch.cat([_bits(part, *spare) for part in torch.split(flat, _PACKED)])


def _bits(part: Tensor, bits: Tensor, alive: Tensor) -> Tensor:
    if part.numel() % 8:
        part = nn.functional.pad(part, (0, -part.numel() % 8))
    planes = part.view(8, -1)
    bits, alive = (spare[: planes.shape[1]] for spare in (bits, alive))
    bits.zero_()
    # In the mask's dtype, which holds 0 to 255: into bools and bytes takes several times as long.
    for place, plane in enumerate(planes):
        bits.add_(torch.ne(plane, 0, out=alive), alpha=1 << place)
    return bits.to(torch.uint8)


def _unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    parts = [
        torch.stack([part >> place & 1 for place in range(8)]).view(-1)
        for part in torch.split(bits, _PACKED // 8)
    ]
    return torch.cat(parts)[: shape.numel()].view(shape)


def _shallow(module: nn.Module) -> dict[str, Any]:
    """A module's attributes, registries (and a recurrent layer's list of weights) copied."""
    return {
        key: value.copy() if isinstance(value, (dict, list)) else value
        for key, value in module.__dict__.items()
    }


def _put_back(module: nn.Module, state: dict[str, Any]) -> None:
    for key in module.__dict__.keys() - state.keys():
        del module.__dict__[key]
    for key, value in state.items():
        present = module.__dict__.get(key)
        if isinstance(present, dict) and isinstance(value, dict):
            # In place: hook handles hold weak references to these registries.
            present.clear()
            present.update(value)
        else:
            module.__dict__[key] = value


def masked_sites(modules: Iterable[nn.Module]) -> list[Site]:
    """Every site of the modules that is masked, by whatever pruning method."""
    return [
        Site(module, key.removesuffix(ORIG))
        for module in modules
        for key in module._parameters
        if key.endswith(ORIG) and Site(module, key.removesuffix(ORIG)).is_masked
    ]

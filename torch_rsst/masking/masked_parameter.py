"""One parameter and its mask: mask it, restore it; all or nothing.

This is the only room that touches PyTorch's reparametrization: ``weight`` becomes the parameter
``weight_orig`` (the same object, at the same place in the parameter order), the buffer
``weight_mask`` and their product ``weight``, with a pruning hook as PyTorch leaves one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod, PruningContainer

from torch_rsst.distributed.dtensor import is_sharded, local, placed_like
from torch_rsst.distributed.fsdp import tell_of_new_name
from torch_rsst.masking.freezing import end_freeze, frozen_now
from torch_rsst.masking.live_weight import MASK, ORIG, is_live, make_live, make_plain, product
from torch_rsst.masking.parameter_ref import Site, check_scores, check_site, masked_sites
from torch_rsst.masking.rollback import AllOrNothing, place_kept
from torch_rsst.masking.saved_masks import is_writable


@dataclass(frozen=True)
class NewMasks:
    """Masks that exist once, where they are used.

    Attributes:
        write: sets tensors to them, of whatever dtype.
        at_once: whether that is one operation for given tensors, which happens or does not.
    """

    write: Callable[[Sequence[Tensor]], object]
    at_once: Callable[[Sequence[Tensor]], bool] = lambda outs: False

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> NewMasks:
        """Tensors of zeros and ones."""

        def write(outs: Sequence[Tensor]) -> None:
            for out, alive in zip(outs, tensors, strict=True):
                out.copy_(placed_like(alive, out))

        return cls(write)

    def as_tensors(self, sites: Sequence[Site]) -> list[Tensor]:
        """By themselves, as bool, one for each parameter."""
        originals = {id(site.original): site.original for site in sites}
        alive = [torch.empty_like(each, dtype=torch.bool) for each in originals.values()]
        self.write(alive)
        return alive


class _Masked(BasePruningMethod):
    """How a hook of ours gives the masked weight and makes it permanent."""

    def __call__(self, module: nn.Module, inputs: object) -> None:
        """Before a forward pass; only recurrent layers, which read a list of weights, need it."""
        if isinstance(module, nn.RNNBase):
            setattr(module, self._tensor_name, self.apply_mask(module))

    def apply_mask(self, module: nn.Module) -> Tensor:
        """The masked weight; see :func:`torch_rsst.masking.live_weight.product`."""
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
        install([site], NewMasks.of([mask != 0]))
        self._tensor_name = site.name

    def _new_mask(self, scores: Tensor, mask: Tensor, *, given: bool) -> Tensor:
        """The mask from the weights, or from scores that the caller has given."""
        return self.compute_mask(scores, default_mask=mask)


class MaskContainer(_Masked, PruningContainer):
    """Stock methods that came first and ours, as PyTorch composes them."""


def install(sites: Sequence[Site], new: NewMasks) -> None:
    """Set masks exactly, in place, all or none.

    Args:
        sites: where to; those that share a parameter share its mask.
        new: the masks, one for each parameter in the order of ``sites``.
    """
    # A mask made in inference mode could not be changed outside it.
    with torch.inference_mode(False), torch.no_grad():
        originals = [id(site.original) for site in sites]
        masks: dict[int, Tensor] = {}
        for original, site in zip(originals, sites, strict=True):
            if original not in masks:
                masks[original] = _mask_buffer(site)
        mask_of = list(zip(sites, (masks[original] for original in originals), strict=True))
        changing = [(site, mask) for site, mask in mask_of if not _holds(site, mask)]
        changed = [site for site, _ in changing]
        dense = [site for site in changed if not site.is_masked]
        outs = list(masks.values())
        # Where a write is one operation and the last one, nothing can be half done.
        written = [] if not changed and new.at_once(outs) else sites
        with AllOrNothing(changed, written=written) as undo:
            undo.append(frozen_now(dense))
            for site, mask in changing:
                _reparametrize(site, mask)
            hooks = [_set_hook(site) for site in changed]
            new.write(outs)
            for site, hook in zip(changed, hooks, strict=True):
                hook(site.module, ())
            for site in dense:
                end_freeze(site)


def _holds(site: Site, mask: Tensor) -> bool:
    """Whether a site has this mask, and all else that we leave in a module."""
    if site.mask is not mask or isinstance(site.module, nn.RNNBase):
        return False
    found = find_hook(site)
    return found is not None and isinstance(found[1], _Masked) and is_live(site.module, site.name)


def _mask_buffer(site: Site) -> Tensor:
    """The site's mask, new where there is none."""
    mask, original = site.mask, site.original
    if mask is None:
        return torch.empty_like(original, requires_grad=False)
    if is_sharded(original) and not is_sharded(mask):
        return placed_like(mask, original).clone()  # masked before it was sharded
    return mask if is_writable(mask) else mask.clone(memory_format=torch.contiguous_format)


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


def restore(sites: Sequence[Site], *, hold_zeros: Callable[[], object] | None = None) -> None:
    """Make the pruning of masked sites permanent and delete their hooks, ours or stock; all or none.

    Args:
        sites: masked ones.
        hold_zeros: freezes what was masked, as the last step.
    """
    masked = [(site.original, site.mask) for site in sites]  # tied ones may differ in their masks
    with torch.no_grad(), AllOrNothing(sites) as undo:
        undo.append(frozen_now(sites))
        for site in sites:
            found = find_hook(site)
            _make_plain(site)
            if found is not None:
                del site.module._forward_pre_hooks[found[0]]
        for original, mask in masked:
            if not _is_full(mask):
                own, dead = local(original), local(_dead(original, mask))
                undo.append(partial(own.index_put_, (dead,), own[dead]))
                zero(original, mask)
        if hold_zeros is not None:
            hold_zeros()


def make_permanent(site: Site) -> None:
    """Undo the reparametrization in place: the parameter keeps its identity, place and gradient."""
    original, mask = site.original, site.mask
    _make_plain(site)
    zero(original, mask)


def zero(original: nn.Parameter, mask: Tensor | None) -> None:
    """Set a parameter to 0 where its mask is 0."""
    with torch.no_grad():
        local(original).masked_fill_(local(_dead(original, mask)), 0.0)


def stored_products(model: nn.Module) -> dict[int, Tensor]:
    """A memo for copies of a model: products that stock hooks have stored, which are no leaves."""
    stored = [(s.module.__dict__.get(s.name)) for s in masked_sites(model.modules())]
    return {id(t): t.detach().clone() for t in stored if isinstance(t, Tensor)}


def _is_full(mask: Tensor | None) -> bool:
    """Whether nothing is masked here; told faster than where."""
    assert mask is not None, "only masked sites are made permanent"
    part = local(mask)
    return not part.numel() or bool(part.amin() > 0)


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

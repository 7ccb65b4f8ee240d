"""Refits the consumers of a masked model, one after the other, towards a reference model's outputs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torch_rsst.distributed.replicas import agreed, from_first, summed
from torch_rsst.groups.groups import Groups
from torch_rsst.importance.batches import DataSource
from torch_rsst.importance.input_hooks import HookedInput, hooked_inputs, recorded, undisturbed
from torch_rsst.importance.recorder import plain
from torch_rsst.masking.mask_sets import extract_mask
from torch_rsst.masking.parameter_ref import ParameterRef
from torch_rsst.reconstruction.least_squares import FitSums, solve
from torch_rsst.reconstruction.linear_form import outputs_of
from torch_rsst.reconstruction.survey import Consumer, Survey, weight_and_bias
from torch_rsst.utils.errors import refuse
from torch_rsst.utils.module_state import kept_random_state


class Refit:
    """One reference model, one masked model and the data that both run on."""

    def __init__(
        self,
        reference: nn.Module,
        cut: nn.Module,
        groups: Groups,
        data: DataSource,
        replicas: dist.ProcessGroup | None,
    ) -> None:
        """Take what the refit needs; nothing runs yet.

        Args:
            reference: whose outputs are wanted; not changed.
            cut: a masked model of the same structure; its consumers are refitted in place.
            groups: whose consumers.
            data: what both run on.
            replicas: ranks whose sums are added up.
        """
        self._reference, self._cut, self._groups = reference, cut, groups
        self._data, self._replicas = data, replicas
        self._reference_masks = extract_mask(reference)
        self._batches: list[Any] = []
        self._targets: dict[str, list[HookedInput]] = {}
        for hooked in hooked_inputs(reference, groups):
            self._targets.setdefault(hooked.name, []).append(hooked)

    def run(self, *, means_only: bool, damping: float) -> list[Tensor]:
        """Refit all consumers; returns the parameters and buffers of the masked model that changed.

        Args:
            means_only: fit the constants alone.
            damping: see :func:`torch_rsst.reconstruction.least_squares.solve`.
        """
        changed: list[Tensor] = []
        consumers = agreed(
            self._replicas,
            self._survey,
            lambda found: [(f"{i}: {c.name}", torch.ones(1)) for i, c in enumerate(found)],
        )
        for consumer in consumers:
            sums = agreed(self._replicas, partial(self._sums, consumer), lambda _: ())
            for tensor in sums.tensors:
                summed(tensor, self._replicas)
            changed += self._refit(consumer, sums, means_only=means_only, damping=damping)
        return changed

    def _survey(self) -> list[Consumer]:
        """Draw the batches, and look at how consumers run on the first."""
        survey = Survey(hooked_inputs(self._cut, self._groups))
        with undisturbed(self._cut, extract_mask(self._cut)):
            self._batches = list(self._data.draw())
            if not self._batches:
                remedy = "Pass a list, a DataLoader or a function."
                refuse(ValueError, "batches", "at least one", "none", remedy)
            tensors = [each for each in tree_leaves(self._batches) if isinstance(each, Tensor)]
            if tensors and not any(each.numel() for each in tensors):
                remedy = "Pass batches of data that hold some."
                refuse(ValueError, "batches", "at least one sample", "none", remedy)
            with survey.watching():
                self._data.output(self._cut, self._batches[0])
            return survey.consumers(self._cut)

    def _sums(self, consumer: Consumer) -> FitSums:
        """What all batches add up to at one consumer, on this rank."""
        form, kept = consumer.form, _kept(consumer)
        own = {id(each): weight_and_bias(each.ref) for each in consumer.inputs}
        targets = self._targets[consumer.name]
        wanted = {id(each): weight_and_bias(each.ref) for each in targets}
        groups, outputs, _ = form.matrix(own[id(consumer.inputs[0])][0]).shape
        sums = FitSums.zeros(groups, outputs, int(kept.sum()), kept.device)
        waiting: list[Tensor] = []  # the reference's outputs for the present batch, part by part

        def remember(hooked: HookedInput, value: Tensor) -> Tensor:
            for part in form.chunks(plain(value).double()):
                waiting.append(outputs_of(form, form.features(part), *wanted[id(hooked)]))
            return value

        def add(hooked: HookedInput, value: Tensor) -> Tensor:
            matrix, bias = own[id(hooked)]
            narrow = form.matrix(matrix)[..., kept]
            for part in form.chunks(plain(value).double()):
                features = form.features(part)[..., kept]
                output = features @ narrow.mT
                if bias is not None:
                    output += bias.view(groups, 1, -1)
                if not waiting or waiting[0].shape != output.shape:
                    _refuse_other_inputs(consumer)
                sums.add(features, waiting.pop(0) - output)
            return value

        # What modules remember of earlier batches is the same in both models: both begin anew here.
        with (
            undisturbed(self._reference, self._reference_masks),
            undisturbed(self._cut, extract_mask(self._cut)),
        ):
            for batch in self._batches:
                # Both models run with the same random numbers.
                with kept_random_state(self._reference), recorded(targets, remember):
                    self._data.output(self._reference, batch)
                with recorded(consumer.inputs, add):
                    self._data.output(self._cut, batch)
                if waiting:
                    _refuse_other_inputs(consumer)
        return sums

    def _refit(
        self, consumer: Consumer, sums: FitSums, *, means_only: bool, damping: float
    ) -> Iterator[Tensor]:
        """Change one consumer unless its squared error would not fall."""
        if not all(bool(tensor.isfinite().all()) for tensor in sums.tensors):
            remedy = (
                "Look at the batches, or where training diverged; float16 overflows beyond 65504."
            )
            subject = f"reconstruct: inputs of {consumer.name!r}"
            refuse(ValueError, subject, "finite numbers", "NaN or infinity", remedy)
        form, kept, weight = consumer.form, _kept(consumer), consumer.ref.original
        alive = form.matrix(consumer.ref.alive_entries)[..., kept]
        constant, sign, rows = _constant(consumer, weight)
        fitted = torch.zeros_like(alive) if means_only else alive
        free = torch.cat([fitted, rows.view(*alive.shape[:2], 1)], 2)
        change = solve(sums, free.to(sums.cross.device), damping)
        from_first(change, self._replicas)
        # What is stored is rounded: the error is that of the values which the layer would have.
        whole = torch.zeros(
            *alive.shape[:2], kept.numel(), dtype=torch.float64, device=change.device
        )
        whole[..., kept] = change[..., :-1]
        new = (weight.double() + form.weight(whole)).to(weight.dtype)
        change[..., :-1] = form.matrix(new.double() - weight.double())[..., kept]
        pairs: list[tuple[Tensor, Tensor]] = [(weight, new)]
        if constant is not None:
            shifted = (constant.double() + sign * change[..., -1].flatten()).to(constant.dtype)
            moved = sign * (shifted.double() - constant.double())
            change[..., -1] = moved.view(change.shape[:2])
            pairs.append((constant, shifted))
        if sums.error_after(change) < float(sums.error):
            for tensor, value in pairs:
                tensor.copy_(value)
                yield tensor


def _constant(consumer: Consumer, weight: Tensor) -> tuple[Tensor | None, float, Tensor]:
    """What a fitted constant is added to, with which sign, and for which outputs it may be."""
    if consumer.bias is not None:
        return consumer.bias.original, 1.0, consumer.bias.alive_entries
    if consumer.norm is not None:
        mean = consumer.norm._buffers["running_mean"]
        assert mean is not None, "the survey has found it"
        scale = ParameterRef(consumer.norm, "weight")
        rows = scale.alive_entries if scale.is_masked else torch.ones_like(mean, dtype=torch.bool)
        return mean, -1.0, rows
    outputs = consumer.form.matrix(weight)[..., 0].numel()
    return None, 0.0, torch.zeros(outputs, dtype=torch.bool, device=weight.device)


def _kept(consumer: Consumer) -> Tensor:
    """Which features some alive weight reads."""
    return consumer.form.matrix(consumer.ref.alive_entries).any(1).any(0)


def _refuse_other_inputs(consumer: Consumer) -> None:
    expected, got = "the same number of positions before and after the cut", "others"
    remedy = "Leave its groups out: this layer receives other samples once units are masked."
    refuse(ValueError, f"reconstruct: inputs of {consumer.name!r}", expected, got, remedy)

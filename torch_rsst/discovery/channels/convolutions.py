"""Channels of convolutions, wherever they lead."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map

from torch_rsst.discovery.adapter import Unsupported
from torch_rsst.discovery.channels.base import Place, Survey, WholeModelAdapter
from torch_rsst.discovery.channels.layers import layers_of, must_stay, reasons_of
from torch_rsst.discovery.channels.ledger import Ledger
from torch_rsst.discovery.channels.tracer import follow
from torch_rsst.discovery.channels.verify import Trials
from torch_rsst.discovery.examples import small_guesses
from torch_rsst.discovery.probe import ON_META, Probe, is_on_meta, run_on
from torch_rsst.discovery.trial import one_line, randomized
from torch_rsst.masking.names import named_weights

KIND = "channels"
LARGE = 300_000_000
"""Models of more parameters are checked in single precision, for memory."""


class ConvolutionChannels(WholeModelAdapter):
    """Follows each channel through one run of the model, then checks all that it found at once.

    A unit is a channel with everything that it touches: rows of the convolutions that put it out
    (several, where they are added), norms, gates, columns of all layers that take it in; a whole group
    of a grouped convolution; as many as are split or reshaped evenly. Channels that reach an output, a
    norm over channels or an attention, or whatever else is not known to keep them apart, stay.
    So do those of the stem, the convolution that reads the model's input (one for each of its branches).
    """

    kind = KIND
    least = 1

    def survey(self, probe: Probe, taken: Collection[Place], kinds: Collection[str]) -> Survey:
        """See :class:`torch_rsst.discovery.channels.base.WholeModelAdapter`."""
        model, example_inputs = probe.model, probe.example_inputs
        convolutions = [m for m in model.modules() if isinstance(m, _ConvNd)]
        # Where neurons are not asked for: weights of convolutions that are made by a function.
        least = 2 if "neurons" in kinds else 3
        patches = all(map(_is_patch_embedding, convolutions))
        if patches and not _feed_others(model, taken, least):
            return Survey()
        if is_on_meta(model):
            return _refused(convolutions, ON_META)
        devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=devices):
            traced = _traced(model, example_inputs)
            if isinstance(traced, str):
                remedy = "; pass example_inputs" if example_inputs is None else ""
                return _refused(convolutions, f"it cannot be run ({traced}){remedy}")
            ledger, trials = traced
            layers, refused, trials.candidates = layers_of(ledger, type(self).__name__, taken)
            exact = trials.exact([replace(x, least=must_stay(x, model)) for x in layers])
        return Survey(tuple(exact), (*refused, *trials.refused), reasons_of(ledger))


def _is_patch_embedding(convolution: _ConvNd) -> bool:
    """Whether it cuts its input into patches, as vision transformers begin."""
    size = convolution.kernel_size
    return convolution.stride == size and max(size) > 1


def _feed_others(model: nn.Module, taken: Collection[Place], ndim: int) -> bool:
    """Whether outputs of layers that are no convolutions may be units that other kinds do not hold.

    Told by widths, as following a transformer whose residual stream alone is left would be for nothing.
    """
    patches = {p for m in model.modules() if isinstance(m, _ConvNd) for p in m.parameters(False)}
    weights = {n: w for n, w in named_weights(model).items() if w.ndim >= ndim and w not in patches}
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    if ndim == 2 and (recurrent or len(weights) == 1):  # which may be used both ways
        return True
    normalized = {
        weight.shape[-1]
        for module in model.modules()
        if not isinstance(module, (_NormBase, nn.PReLU, nn.GroupNorm))
        for weight in module.parameters(recurse=False)
        if (weight.ndim == 1 and getattr(module, "bias", None) is None)
        or isinstance(module, nn.LayerNorm)
    }
    giving = {n: w.shape[0] for n, w in weights.items() if w.shape[0] > 1 and (n, 0) not in taken}
    taking = {n: w.shape[1] for n, w in weights.items() if (n, 1) not in taken}
    return any(
        one != other and given not in normalized and not wide % given
        for one, given in giving.items()
        for other, wide in taking.items()
    )


def _refused(convolutions: list[_ConvNd], reason: str) -> Survey:
    """Said of the whole model, where there would be channels."""
    return Survey(refused=(Unsupported(reason, "", KIND),) if len(convolutions) > 1 else ())


def _traced(model: nn.Module, example_inputs: Any) -> tuple[Ledger, Trials] | str:
    """What a run shows, and a copy of the model to make trials on; or why it does not run."""
    error = "no example fits it"
    copies = _copies(model)
    while True:
        try:
            copy = next(copies)
        except StopIteration:
            return error
        except Exception as failure:  # not every model can be copied
            return one_line(failure)
        trials: Trials | None = None
        for example in (example_inputs,) if example_inputs is not None else small_guesses(model):
            ledger = Ledger()
            run = _Run(copy, _like(example, copy))
            try:
                follow(copy, ledger, (run.training, run.evaluating))
            except Exception as failure:
                error = error if trials else one_line(failure)
                continue
            run.settle()
            trials = trials or Trials(copy, model, run.call, run.trains)
            if run.trains or not ledger.unseen:
                return ledger, trials
            error = f"in training mode, where alone some of it is used: {run.error}"


def _copies(model: nn.Module) -> Iterator[nn.Module]:
    """Dense ones with random weights, in double precision if that runs and is not too large."""
    copy = randomized(model)
    small = sum(parameter.numel() for parameter in model.parameters()) < LARGE
    if small and all(p.device.type in ("cpu", "cuda") for p in model.parameters()):
        yield copy.double()
    yield copy.float()


def _like(example: Any, model: nn.Module) -> Any:
    """Example inputs, copied, in the precision of a model."""
    parameter = next(model.parameters())

    def converted(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return (
            value.detach().clone().to(parameter.dtype if value.is_floating_point() else value.dtype)
        )

    return tree_map(converted, example)


class _Run:
    """Runs of a model on the same inputs, in both modes."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model = model
        self.example = example
        self.trains = False
        self.error = ""
        self.statistics: dict[Tensor, Tensor] = {}

    def call(self, model: nn.Module) -> Any:
        """The outputs of a model for copies of the inputs."""
        copied = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, self.example)
        return run_on(model, copied)

    def training(self) -> Any:
        """In training mode, where parts of the model may run that do not otherwise; if it can."""
        norms = [m for m in self.model.modules() if isinstance(m, _NormBase)]
        for norm in norms:
            norm.momentum = 1.0
        try:
            out = self.call(self.model.train())
        except Exception as failure:
            self.error = one_line(failure)
            return None
        self.trains = True
        self.statistics = {b: b.clone() for n in norms for b in n.buffers() if b.ndim}
        return out

    def settle(self) -> None:
        """Let the statistics of batch norms be those of the run in training mode: no channel drowns."""
        for buffer, value in self.statistics.items():
            if bool(value.isfinite().all()):
                buffer.copy_(value)

    def evaluating(self) -> Any:
        """In eval mode."""
        return self.call(self.model.eval())

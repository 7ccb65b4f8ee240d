"""Channels of convolutions, wherever they lead."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from torch_rsst.discovery.adapter import Unsupported
from torch_rsst.discovery.channels.base import Place, Survey, WholeModelAdapter
from torch_rsst.discovery.channels.layers import Parts, layers_of, must_stay, reasons_of
from torch_rsst.discovery.channels.ledger import Ledger
from torch_rsst.discovery.channels.runs import Run, copies, like
from torch_rsst.discovery.channels.tracer import follow
from torch_rsst.discovery.channels.verify import Trials
from torch_rsst.discovery.examples import small_guesses
from torch_rsst.discovery.probe import ON_META, Probe, is_on_meta
from torch_rsst.discovery.trial import one_line
from torch_rsst.masking.names import named_weights

KIND = "channels"
_GATES = (2, 3, 4)
"""How many times each feature may be put out by one layer, as by gates."""


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

    def survey(
        self,
        probe: Probe,
        taken: Collection[Place],
        kinds: Collection[str],
        refused: Collection[Unsupported],
    ) -> Survey:
        """See :class:`torch_rsst.discovery.channels.base.WholeModelAdapter`."""
        model, example_inputs = probe.model, probe.example_inputs
        convolutions = [m for m in model.modules() if isinstance(m, _ConvNd)]
        # Where neurons are not asked for: weights of convolutions that are made by a function.
        least = 2 if "neurons" in kinds else 3
        patches = all(map(_is_patch_embedding, convolutions))
        mistaken = any(item.open for item in refused)
        if patches and not mistaken and not _feed_others(model, taken, least):
            return Survey()
        if is_on_meta(model):
            return _refused(convolutions, ON_META)
        traced = _traced(model, example_inputs)
        if isinstance(traced, str):
            remedy = "; pass example_inputs" if example_inputs is None else ""
            return _refused(convolutions, f"it cannot be run ({traced}){remedy}")
        ledger, trials = traced
        parts = Parts.of(ledger)
        layers, refused, trials.candidates = layers_of(parts, type(self).__name__, taken)
        exact = trials.exact([replace(x, least=must_stay(x, model)) for x in layers])
        reasons = {**reasons_of(parts), **trials.reasons}
        return Survey(tuple(exact), (*refused, *trials.refused), reasons)


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
    recurrent = any(isinstance(m, (nn.RNNBase, nn.RNNCellBase)) for m in model.modules())
    if ndim == 2 and (recurrent or len(weights) == 1):  # which may be used both ways
        return True
    normalized = {
        weight.shape[-1]
        for module in model.modules()
        if not isinstance(module, (_NormBase, nn.PReLU, nn.GroupNorm))
        if all(weight.ndim < 2 for weight in module.parameters(recurse=False))
        for weight in module.parameters(recurse=False)
        if (weight.ndim == 1 and getattr(module, "bias", None) is None)
        or isinstance(module, nn.LayerNorm)
    }
    giving = {n: w.shape[0] for n, w in weights.items() if w.shape[0] > 1 and (n, 0) not in taken}
    taking = {n: w for n, w in weights.items() if (n, 1) not in taken}

    def feeds(given: int, other: Tensor) -> bool:
        wide = other.shape[1]
        is_layer = other.ndim == 2 and wide not in normalized  # no table that is added to tokens
        gates = is_layer and given in [number * wide for number in _GATES]
        return given not in normalized and (not wide % given or gates)

    return any(
        one != name and feeds(given, other)
        for one, given in giving.items()
        for name, other in taking.items()
    )


def _refused(convolutions: list[_ConvNd], reason: str) -> Survey:
    """Said of the whole model, where there would be channels."""
    refused = (Unsupported(reason, "", KIND),) if len(convolutions) > 1 else ()
    return Survey(refused=refused, not_run=reason)


def _traced(model: nn.Module, example_inputs: Any) -> tuple[Ledger, Trials] | str:
    """What a run shows, and a copy of the model to make trials on; or why it does not run."""
    error = "no example fits it"
    attempts = copies(model)
    while True:
        try:
            copy = next(attempts)
        except StopIteration:
            return error
        except Exception as failure:  # not every model can be copied
            return one_line(failure)
        trials: Trials | None = None
        for example in (example_inputs,) if example_inputs is not None else small_guesses(model):
            ledger = Ledger()
            run = Run(copy, like(example, copy))
            try:
                follow(copy, ledger, (run.training, run.evaluating))
            except Exception as failure:
                error = error if trials else one_line(failure)
                continue
            run.settle()
            trials = trials or Trials(copy, model, run.call, run.trains, True)
            if run.trains or not ledger.unseen:
                return ledger, trials
            error = f"in training mode, where alone some of it is used: {run.error}"

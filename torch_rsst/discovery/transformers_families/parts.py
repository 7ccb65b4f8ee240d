"""What the modules of transformers have in common."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torch_rsst.discovery.adapter import Unsupported
from torch_rsst.discovery.emptied import BiasOnly, returns_tuple
from torch_rsst.groups.groups import GroupLayer

_PACKAGES = (
    "transformers",
    "transformers_modules",
)  # the latter holds code that comes with weights

Answer = GroupLayer | Unsupported | None


class NoHeads(BiasOnly):
    """An attention without heads, called as any of transformers: its output and no weights."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """The bias at every position of the hidden states, and None."""
        return super().forward(_hidden_states(args, kwargs)), None


class NothingAttended(nn.Module):
    """An attention without heads whose output layer stands elsewhere: no features, and no weights."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """A tensor without features for every position of the hidden states, and None."""
        return _hidden_states(args, kwargs)[..., :0], None


def _hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What an attention gets first, or by that name."""
    hidden_states: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden_states


def is_of_transformers(module: nn.Module) -> bool:
    """Whether the class of a module, or one it derives from, is one of transformers."""
    return any(cls.__module__.split(".")[0] in _PACKAGES for cls in type(module).__mro__)


def may_be_emptied(module: nn.Module) -> bool:
    """Whether an attention that is gone can be left out: it keeps no cache, and returns a pair."""
    return getattr(module, "is_causal", True) is False and returns_tuple(module)


def returns_weights(module: nn.Module) -> str | None:
    """Why heads cannot be told by outputs: an eager attention puts out the weights of each head."""
    config = getattr(module, "config", None)
    if getattr(config, "_attn_implementation", "") != "eager":
        return None
    return (
        "its eager implementation returns the weights of every head; where the model has another, "
        "call model.set_attn_implementation('sdpa') first, and set it back once the model is compacted"
    )

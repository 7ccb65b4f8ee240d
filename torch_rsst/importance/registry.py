"""The names of importances. This is the one place that a new one is added to.

The choices of the command line, the texts of errors and the tests of completeness read it.
"""

from __future__ import annotations

from dataclasses import is_dataclass

from torch_rsst.importance.data_importance import ActivationL1, ActivationL2, Taylor, Variance
from torch_rsst.importance.obs import OBS
from torch_rsst.importance.weights import Importance, magnitude, remain
from torch_rsst.utils.errors import refuse, unknown_choice

IMPORTANCES: dict[str, Importance] = {
    "magnitude": magnitude,
    "remain": remain,
    "variance": Variance(),
    "obs": OBS(),
    "activation_l1": ActivationL1(),
    "activation_l2": ActivationL2(),
    "taylor": Taylor(),
}
"""Name → importance. Add one with one line."""

ALIASES = {"l1": "activation_l1", "l2": "activation_l2", "saliency": "taylor"}
"""Other name → name."""

AUTO = "auto"
"""The name that stands for the best importance there is data for, see :func:`choose_importance`."""


def importance_names() -> list[str]:
    """Every name that ``importance=`` takes, without aliases.

    >>> importance_names()[:3]
    ['auto', 'magnitude', 'remain']
    """
    return [AUTO, *IMPORTANCES]


def auto_name(data: bool, rounds: bool = False) -> str:
    """What ``"auto"`` stands for.

    Args:
        data: whether there are batches to run the model on; without, it is ``"magnitude"``.
        rounds: whether training follows, in which other units can take over what one did: ``"obs"``; else
            ``"variance"``.
    """
    if not data:
        return "magnitude"
    return "obs" if rounds else "variance"


def resolve_importance(importance: str | Importance) -> Importance:
    """The importance of a name; a callable is returned as it is.

    ``"auto"`` is that without data; see :func:`choose_importance`.

    Raises:
        ValueError: for an unknown name.
        TypeError: for neither a name nor a callable.
    """
    if isinstance(importance, str):
        name = auto_name(data=False) if importance == AUTO else ALIASES.get(importance, importance)
        if name not in IMPORTANCES:
            raise ValueError(unknown_choice("importance", importance, importance_names()))
        return IMPORTANCES[name]
    if isinstance(importance, type) or not callable(importance):
        remedy = "A callable takes (layer, weights, masks) and returns one score per unit."
        got = repr(importance)
        refuse(TypeError, "importance", "a name or a callable", got, remedy)
    return importance


def name_of(importance: str | Importance) -> str:
    """How messages and resumable settings call an importance.

    >>> name_of("saliency"), name_of(magnitude)
    ('taylor', 'magnitude')
    """
    found = resolve_importance(importance)
    known = next((name for name, shipped in IMPORTANCES.items() if shipped is found), None)
    if known is not None:
        return known
    if is_dataclass(found):
        return repr(found)
    return str(getattr(found, "__qualname__", type(found).__qualname__))  # repr may hold an address

"""What every message says: the thing, what was expected, what was given, the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn


class RSSTWarning(UserWarning):
    """Base class of this library's warnings: silence or escalate them all with one filter."""


class InertPenaltyWarning(RSSTWarning):
    """A penalty that was meant to shrink weights did not."""


class RoundWarning(RSSTWarning):
    """The rounds were driven in a way that will not give what was asked for."""


class FractionalMaskWarning(RSSTWarning):
    """A mask of a model holds other values than 0 and 1, as averaging of buffers leaves them."""


class ReplicaWarning(RSSTWarning):
    """Ranks that hold replicas of a model may have chosen different masks."""


class UnfrozenZerosWarning(RSSTWarning):
    """Masks were removed, and nothing holds their zeros under further training."""


class CompactionWarning(RSSTWarning):
    """Dead units could not be cut out of a model exactly, and stay in it."""


class UnsupportedModuleWarning(RSSTWarning):
    """A module looks prunable, but its units cannot be removed exactly."""


class MissingNameError(KeyError):
    """For a name that is not there: a KeyError that shows its text as it was written.

    Example:
        >>> print(KeyError("a: no such name"), MissingNameError("a: no such name"))
        'a: no such name' a: no such name
    """

    def __str__(self) -> str:
        return str(self.args[0]) if len(self.args) == 1 else super().__str__()


def message(subject: str, *, expected: str, got: object, remedy: str) -> str:
    """Compose one error text.

    >>> print(message("amount", expected="a fraction in [0, 1]", got=1.5, remedy="Try 0.5."))
    amount: expected a fraction in [0, 1], got 1.5. Try 0.5.
    """
    return f"{subject}: expected {expected}, got {got}. {remedy}"


def refuse(
    error: type[Exception], subject: str, expected: str, got: object, remedy: str
) -> NoReturn:
    """Raise an error with a text of :func:`message`.

    >>> refuse(ValueError, "amount", "a fraction in [0, 1]", 1.5, "Try 0.5.")
    Traceback (most recent call last):
    ValueError: amount: expected a fraction in [0, 1], got 1.5. Try 0.5.
    """
    raise error(message(subject, expected=expected, got=got, remedy=remedy))


def refuse_name(subject: str, names: Iterable[str], hint: str = "") -> NoReturn:
    """Raise a MissingNameError for a parameter that is not among ``names``, those of a model."""
    remedy = f"{hint}It has {listing(names)}."
    refuse(MissingNameError, subject, "a parameter of the model", "no such name", remedy)


def shown(value: object) -> str:
    """A value for a message: what it is, where all that it holds would be long.

    >>> shown(("weight", 3)), shown(torch.ones(4, 5)), shown(list(range(100)))
    ("('weight', 3)", 'a Tensor of shape (4, 5)', 'a list of 100')
    """
    kind = f"a {type(value).__name__}"
    if isinstance(value, (tuple, list)):
        if len(value) > 3 or any(isinstance(each, (tuple, list)) for each in value):
            return f"{kind} of {len(value)}"
        text = ", ".join(map(shown, value))
        return f"({text})" if isinstance(value, tuple) else f"[{text}]"
    try:
        return f"{kind} of shape {tuple(value.shape)}"  # type: ignore[attr-defined]
    except Exception:  # most things have none, some do not say
        text = repr(value)
    return text if len(text) <= 80 and "\n" not in text else kind


def check_type(
    value: object, kind: type | tuple[type, ...], subject: str, expected: str, remedy: str
) -> None:
    """Raise a TypeError unless a value is of a kind."""
    if not isinstance(value, kind):
        refuse(TypeError, subject, expected, type(value).__name__, remedy)


def missing_package(error: ModuleNotFoundError, subject: str, remedy: str) -> ModuleNotFoundError:
    """The error for a package that is not there, with what to do about it."""
    text = message(subject, expected=str(error.name), got="none", remedy=remedy)
    return ModuleNotFoundError(text, name=error.name)


def unknown_choice(subject: str, got: object, choices: Iterable[str]) -> str:
    """The error text for a name that is not one of ``choices``, with the nearest one suggested.

    >>> print(unknown_choice("scope", "layr", ["layer", "type", "global"]))
    scope: expected one of 'layer', 'type', 'global', got 'layr'. Did you mean 'layer'?
    """
    names = list(choices)
    near = closest(str(got), names)
    remedy = f"Did you mean {near!r}?" if near else "Choose one of these."
    listed = ", ".join(map(repr, names))
    return message(subject, expected=f"one of {listed}", got=shown(got), remedy=remedy)


def check_choice(
    subject: str, got: object, choices: Iterable[str], error: type[Exception] = ValueError
) -> None:
    """Raise with the text of :func:`unknown_choice` unless a name is one of ``choices``."""
    names = list(choices)
    if not isinstance(got, str) or got not in names:  # arrays compare entry by entry
        raise error(unknown_choice(subject, got, names))


def one_line(error: BaseException) -> str:
    """An error's text without line breaks and a full stop at its end: as part of a sentence."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split())[:300].rstrip(".") or type(error).__name__


def closest(got: str, names: Iterable[str], alike: float = 0.6) -> str | None:
    """The name that was probably meant, None where none is like it.

    >>> closest("blocks.0.wieght", ["blocks.0.weight", "blocks.0.bias"])
    'blocks.0.weight'
    """
    return next(iter(difflib.get_close_matches(got, list(names), n=1, cutoff=alike)), None)


def check_keys(state: object, keys: Iterable[str], subject: str) -> None:
    """Raise a ValueError unless ``state`` is a mapping that holds ``keys``."""
    missing = [k for k in keys if k not in state] if isinstance(state, Mapping) else list(keys)
    if missing:
        got = f"none for {listing(missing)}" if isinstance(state, Mapping) else type(state).__name__
        remedy = "Pass what state_dict() has returned."
        refuse(ValueError, subject, "a complete state", got, remedy)


def check_kinds(state: Mapping[str, Any], kinds: Mapping[str, type], subject: str) -> None:
    """Raise a ValueError unless what ``state`` holds under these names is of these very types."""
    for name, kind in kinds.items():
        if type(state[name]) is not kind:
            expected, got = f"{name} of type {kind.__name__}", repr(state[name])
            refuse(ValueError, subject, expected, got, "The file is damaged: load another one.")


def listing(names: Iterable[str], limit: int = 5) -> str:
    """Names for a message, the first few of them.

    >>> listing(["a", "b", "c"], limit=2)
    "'a', 'b' and 1 more"
    """
    names = list(names)
    shown = ", ".join(map(repr, names[:limit]))
    rest = len(names) - limit
    return f"{shown} and {rest} more" if rest > 0 else shown

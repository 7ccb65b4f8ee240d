"""A KeyError that can be read."""

from __future__ import annotations


class MissingNameError(KeyError):
    """For a name that is not there: a KeyError that shows its text as it was written.

    Example:
        >>> print(KeyError("a: no such name"), MissingNameError("a: no such name"))
        'a: no such name' a: no such name
    """

    def __str__(self) -> str:
        return str(self.args[0]) if len(self.args) == 1 else super().__str__()

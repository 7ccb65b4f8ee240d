"""Files: writes that a crash cannot tear, links that lead elsewhere, digests."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from torch_rsst.utils.errors import refuse, shown

_TORN, _NEXT = ".tmp", ".next"
_BLOCK = 1 << 20


def write_text(path: Path, text: str) -> None:
    """Replace a file's text, whole or not at all."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write beside the file, then move: a reader or a crash sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TORN}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_together(folder: Path, contents: Mapping[str, bytes], index: str, text: str) -> None:
    """Replace several files as one: whatever stops it, all of them are the old ones or the new ones.

    ``text`` goes to the file ``index`` and must name the :func:`digest` of each of the others. The moment
    it is there, the new files count: :func:`find_written` finds them, under a name of their own until they
    have been moved.

    Args:
        folder: exists.
        contents: of the other files, by name.
        index: the name of the file that says which others belong to it.
        text: its content.
    """
    waiting = {name: _waiting(folder, name, digest(content)) for name, content in contents.items()}
    for name, content in contents.items():
        write_atomically(waiting[name], lambda file, content=content: file.write(content))  # type: ignore[misc]
    write_text(folder / index, text)
    for name, path in waiting.items():
        path.replace(folder / name)
    for name in (*contents, index):  # what writes that were stopped have left behind
        for left in [*folder.glob(f".{name}.*"), *folder.glob(f"..{name}.*")]:
            if left.suffix in (_TORN, _NEXT):
                left.unlink(missing_ok=True)


def find_written(folder: Path, name: str, digest: str) -> Path:
    """Where a file of :func:`write_together` with this digest is, if it is there at all."""
    waiting = _waiting(folder, name, digest)
    return waiting if waiting.is_file() else folder / name


def _waiting(folder: Path, name: str, digest: str) -> Path:
    return folder / f".{name}.{digest[:16]}{_NEXT}"


def digest(content: bytes) -> str:
    """The SHA-256 of some bytes.

    >>> digest(b"")[:8]
    'e3b0c442'
    """
    return hashlib.sha256(content).hexdigest()


def digest_of_file(path: Path) -> str:
    """The SHA-256 of a file, read piece by piece."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            hasher.update(block)
    return hasher.hexdigest()


def as_folder(folder: object, remedy: str) -> Path:
    """A folder's path as a :class:`pathlib.Path`.

    Raises:
        TypeError: for anything else than a path.
        ValueError: for an empty one, which would be the working directory.
    """
    if not isinstance(folder, (str, os.PathLike)):
        refuse(TypeError, "folder", "the path of a folder", shown(folder), remedy)
    if not os.fspath(folder):
        refuse(ValueError, "folder", "the path of a folder", repr(folder), remedy)
    return Path(folder)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Let one process at a time write to a folder; others wait for it.

    Nobody waits where the system or the file system locks no folders.
    """
    with ExitStack() as stack:
        with suppress(ImportError, OSError):
            import fcntl  # not on Windows

            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def check_writable(folder: Path) -> None:
    """Raise an OSError unless a file can be written to a folder, or to where it would be made.

    A file without a name is written there: rights alone do not tell of read-only file systems.
    """
    place = next(str(each) for each in (folder, *folder.absolute().parents) if os.path.exists(each))
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"-")
    except OSError as error:
        got = f"{error.strerror or type(error).__name__} at {place}"
        remedy = "Pass another folder, or make this one writable."
        refuse(type(error), str(folder), "a folder that can be written to", got, remedy)


def check_links(folder: Path) -> None:
    """Raise a ValueError where a link in a folder leads out of it.

    A folder from a stranger must not make us write or read elsewhere.
    """
    inside = folder.resolve()
    for entry in folder.iterdir():
        if entry.is_symlink() and not entry.resolve().is_relative_to(inside):
            expected, got = "files of its own", f"a link to {entry.resolve()}"
            refuse(ValueError, str(entry), expected, got, "Delete the link.")

"""Files that are written whole or not at all.

A run that is stopped while it writes must leave the old file or the new one, never half of one. The
content goes to a temporary file in the same folder (so on the same file system), is forced to disk,
and takes the final name by ``os.replace``, which POSIX makes atomic. It is locked meanwhile: what a
killed process left is not, and the next one that writes the same file removes it.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import glob
import io
import os
import secrets
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["as_csv", "check_archive", "load_checked", "save_atomically", "write_atomically"]

# A file younger than this may be about to be locked.
SECONDS_TO_LOCK = 60


def write_atomically(
    path: str | os.PathLike[str], writer: Callable[[Any], object], *, text: bool = False
) -> None:
    r"""Write a file whole or not at all.

    Parameters
    ----------
    path : str or os.PathLike
        The file to write. Its folder must exist. A symbolic link is followed, not replaced. A file
        that is there already keeps its permissions.
    writer : callable
        Called once with an open file: binary, readable too, or text in UTF-8 with ``\n`` line
        ends. Whatever it raises is passed on, after the temporary file is removed; an old file
        then stays as it was.
    text : bool, default False
        Open the file for text.

    Raises
    ------
    FileNotFoundError
        If the folder of `path` does not exist.
    IsADirectoryError
        If `path` is a folder.
    OSError
        If `path` is something other than a regular file, such as a device, or cannot be written;
        its ``filename`` is `path`, unless it has one.

    Examples
    --------
    >>> write_atomically("report.txt", lambda file: file.write("done"), text=True)  # doctest: +SKIP
    """
    target = os.path.realpath(os.fspath(path))
    folder, name = os.path.split(target)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"path must lie in a folder that exists, got {os.fspath(path)!r}")
    if os.path.isdir(target):
        raise IsADirectoryError(f"path must be a file, got the folder {os.fspath(path)!r}")
    replaces = os.path.exists(target)
    if replaces and not os.path.isfile(target):
        raise OSError(f"path must be a regular file, got {os.fspath(path)!r}")

    _remove_left_behind(folder, name)
    # Not tempfile.mkstemp: it makes files that only their owner can read. The name is cut so that
    # the temporary one stays within the 255 bytes that file systems allow.
    temporary = os.path.join(folder, f".{name[:40]}.{secrets.token_hex(8)}.tmp")
    try:
        with (
            open(temporary, "x", encoding="utf-8", newline="\n")
            if text
            else open(temporary, "x+b") as file
        ):
            _lock(file)
            writer(file)
            file.flush()
            os.fsync(file.fileno())
        if replaces:
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except BaseException as error:  # also KeyboardInterrupt: that is when files are cut in half
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = os.fspath(path)
        raise


def save_atomically(path: str | os.PathLike[str], state: Any) -> None:
    """Write what ``torch.load`` reads whole or not at all; raises as :func:`write_atomically`.

    By way of memory: where a disk is full, torch's writer raises an error of its own in place of
    the system's.
    """
    content = io.BytesIO()
    torch.save(state, content)
    write_atomically(path, lambda file: file.write(content.getbuffer()))


class _LineFeeds:
    """What a csv.writer writes rows to, which then end in a line feed.

    The writer itself ends them in CR LF: only then does every version of Python quote a text with a
    carriage return, which most readers would take for the end of a row.
    """

    def __init__(self, file: Any):
        self.file = file

    def write(self, row: str) -> None:
        self.file.write(row[:-2] + "\n")


def as_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Callable[[Any], None]:
    """Return what writes a table to a file open for text, for :func:`write_atomically`.

    Texts are written as they are, so that readers get them back: also one like ``=A1+A2``, which a
    spreadsheet takes for a formula unless its column is imported as text.
    """

    def write(file: Any) -> None:
        table = csv.writer(_LineFeeds(file), lineterminator="\r\n")
        table.writerow(header)
        table.writerows(rows)

    return write


def check_archive(path: str | os.PathLike[str]) -> None:
    """Raise ValueError unless every part of a file of ``torch.save`` has its checksum.

    The file holds them, but ``torch.load`` does not look at them. Raises OSError if it cannot be
    read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except OSError:
        raise
    except Exception as error:  # zipfile raises of all kinds
        damaged = type(error).__name__
    if damaged is not None:
        raise ValueError(
            f"{os.fspath(path)!r} must be a whole file of torch.save, but is damaged ({damaged})"
        )


def load_checked(path: str | os.PathLike[str]) -> Any:
    """Read tensors and plain values that ``torch.save`` wrote, on the CPU, if every byte is right.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is damaged, was not written by ``torch.save``, or holds other objects.
    """
    check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises of all kinds
        raise ValueError(
            f"{os.fspath(path)!r} must hold tensors and plain values, but is damaged or holds "
            f"others ({type(error).__name__})"
        ) from error


def _lock(file: Any) -> bool:
    """Whether the open file is locked now; never where another process has, or on some disks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_left_behind(folder: str, name: str) -> None:
    """Remove what killed processes have left of their writing of a file."""
    for half in Path(folder).glob(f".{glob.escape(name[:40])}.{'[0-9a-f]' * 16}.tmp"):
        with contextlib.suppress(OSError), open(half, "rb") as file:
            if time.time() - os.fstat(file.fileno()).st_mtime > SECONDS_TO_LOCK and _lock(file):
                half.unlink()

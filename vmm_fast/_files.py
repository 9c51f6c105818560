"""Files that are written whole or not at all.

A run that is stopped while it writes must leave the old file or the new one, never half of one. The
content goes to a temporary file in the same folder (so on the same file system), is forced to disk,
and takes the final name by ``os.replace``, which POSIX makes atomic; then the folder is forced to
disk. The temporary file is locked meanwhile: what a killed process left is not, and the next one
that writes the same file removes it.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import glob
import hashlib
import io
import json
import os
import secrets
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None  # type: ignore[assignment]

DIGEST = "sha256"
# A temporary file younger than this may belong to a process that has not locked it yet.
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
    >>> write_atomically("report.txt", lambda file: file.write("done"), text=True)
    """
    target = os.path.realpath(os.fspath(path))
    folder, name = os.path.split(target)
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            f"path must lie in a folder that exists, but is {os.fspath(path)!r}"
        )
    if os.path.isdir(target):
        raise IsADirectoryError(f"path must be a file, but is the folder {os.fspath(path)!r}")
    replaces = os.path.exists(target)
    if replaces and not os.path.isfile(target):
        raise OSError(f"path must be a regular file, but is {os.fspath(path)!r}")

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
        _sync_folder(folder)
    except BaseException as error:  # also KeyboardInterrupt: that is when files are cut in half
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = os.fspath(path)
        raise


def _sync_folder(folder: str) -> None:
    """Force a folder's entries to disk, on file systems that can do so."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_atomically(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write tensors and plain values to a file, whole or not at all, for :func:`load_checked`.

    Raises what :func:`write_atomically` raises. The content is built in memory first: on a full
    disk, torch's own writer would replace the system's error by another.

    Parameters
    ----------
    path : str or os.PathLike
    state : dict
        Tensors and plain values. Their digest is stored with them.
    """
    content = io.BytesIO()
    torch.save({**state, DIGEST: _digest(state)}, content)
    write_atomically(path, lambda file: file.write(content.getbuffer()))


def load_checked(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what :func:`save_atomically` wrote, on the CPU, after checking its digest.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is damaged or was changed, was not written by `save_atomically`, or holds objects
        other than tensors and plain values.
    """
    with open(path, "rb") as file:
        try:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
            right = state.pop(DIGEST) == _digest(state)
        except Exception as error:  # torch raises errors of many kinds
            raise ValueError(
                f"{os.fspath(path)!r} must hold tensors and plain values with their digest, but "
                f"is damaged or of another kind ({type(error).__name__})"
            ) from error
    if not right:
        raise ValueError(f"{os.fspath(path)!r} is damaged, its values are not those of its digest")
    return state


def write_json(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write a table to a JSON file, whole or not at all, for :func:`read_json`.

    Raises what :func:`write_atomically` raises.
    """
    read_back = json.loads(json.dumps(content))
    text = json.dumps({**read_back, DIGEST: _digest(read_back)}, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text), text=True)


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what :func:`write_json` wrote, after checking its digest.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is damaged or was changed, or was not written by `write_json`.
    """
    with open(path, encoding="utf-8") as file:
        try:
            content: dict[str, Any] = json.load(file)
            right = content.pop(DIGEST) == _digest(content)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{os.fspath(path)!r} must hold a table with its digest, but is damaged or of "
                f"another kind ({type(error).__name__})"
            ) from error
    if not right:
        raise ValueError(f"{os.fspath(path)!r} is damaged, its values are not those of its digest")
    return content


def _digest(state: Any) -> str:
    """Return the SHA-256 of tensors and plain values, in dicts, lists and tuples."""
    found = hashlib.sha256()

    def take(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            x = value.detach().cpu().contiguous()
            found.update(f"tensor {x.dtype} {list(x.shape)}:".encode())
            found.update(x.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            found.update(f"dict {len(value)}:".encode())
            for pair in value.items():
                take(list(pair))
        elif isinstance(value, list | tuple):
            found.update(f"{type(value).__name__} {len(value)}:".encode())
            for one in value:
                take(one)
        else:
            found.update(f"{type(value).__name__} {value!r};".encode())

    take(state)
    return found.hexdigest()


class _LineFeeds:
    """A file for csv.writer that ends each row in a line feed instead of CR LF.

    The writer is set to end rows in CR LF: only then does every version of Python quote a text that
    holds a carriage return. Most readers would take an unquoted one for the end of a row.
    """

    def __init__(self, file: Any):
        self.file = file

    def write(self, row: str) -> None:
        self.file.write(row[:-2] + "\n")


def as_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Callable[[Any], None]:
    """Return a function that writes a table as CSV, for :func:`write_atomically` in text mode.

    Texts are written unchanged, so that readers get them back. That includes texts like ``=A1+A2``,
    which a spreadsheet takes for a formula unless the column is imported as text.
    """

    def write(file: Any) -> None:
        table = csv.writer(_LineFeeds(file), lineterminator="\r\n")
        table.writerow(header)
        table.writerows(rows)

    return write


def check_archive(path: str | os.PathLike[str]) -> None:
    """Raise ValueError unless every part of a file from ``torch.save`` matches its checksum.

    The file holds the checksums, but ``torch.load`` does not verify them. Raises OSError if the
    file cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except OSError:
        raise
    except Exception as error:  # zipfile raises errors of many kinds
        damaged = type(error).__name__
    if damaged is not None:
        raise ValueError(
            f"{os.fspath(path)!r} must be a whole file of torch.save, but is damaged ({damaged})"
        )


class Lock:
    """A lock file that one process at a time can hold, and that is free once the process has ended.

    On a disk that has no locks, every process gets it.

    Parameters
    ----------
    path : str or os.PathLike
        The lock file: created if absent, removed by :meth:`release`.
    text : str
        Who holds the lock, written into the file.

    Raises
    ------
    BlockingIOError
        If another process holds it; ``strerror`` is the text of that process.
    """

    def __init__(self, path: str | os.PathLike[str], text: str) -> None:
        self.path = path
        while True:
            self._file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  closed by release
            if not _lock(self._file) and _is_locked(self._file):
                self._file.seek(0)
                with self._file:
                    raise BlockingIOError(errno.EWOULDBLOCK, self._file.read(), os.fspath(path))
            # The previous holder may have removed the file after it was opened here.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file.fileno()), os.stat(path)):
                    break
            self._file.close()
        self._file.truncate(0)
        self._file.write(text)
        self._file.flush()

    def release(self) -> None:
        """Remove the lock file, so that another process can take the lock."""
        if fcntl is None:  # Windows does not remove an open file
            self._file.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self._file.close()


def _is_locked(file: Any) -> bool:
    """Return whether another process has locked the open file; False on disks without locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    return False


def _lock(file: Any) -> bool:
    """Lock the open file; return False if another process holds it or the disk has no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_left_behind(folder: str, name: str) -> None:
    """Remove the temporary files that killed processes left while writing a file."""
    for half in Path(folder).glob(f".{glob.escape(name[:40])}.{'[0-9a-f]' * 16}.tmp"):
        with contextlib.suppress(OSError), open(half, "rb") as file:
            if time.time() - os.fstat(file.fileno()).st_mtime > SECONDS_TO_LOCK and _lock(file):
                half.unlink()

"""Files that are written whole or not at all.

A run that is stopped while it writes must leave the old file or the new one, never half of one. The
content goes to a temporary file in the same folder (so on the same file system), is forced to disk,
and takes the final name by ``os.replace``, which POSIX makes atomic.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable
from typing import Any

__all__ = ["write_atomically"]


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
        If `path` is something other than a regular file, such as a device, or cannot be written.

    Examples
    --------
    >>> write_atomically("report.txt", lambda file: file.write("done"), text=True)  # doctest: +SKIP
    >>> write_atomically("model.pt", lambda file: torch.save(state, file))  # doctest: +SKIP
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

    # Not tempfile.mkstemp: it makes files that only their owner can read. The name is cut so that
    # the temporary one stays within the 255 bytes that file systems allow.
    temporary = os.path.join(folder, f".{name[:40]}.{secrets.token_hex(8)}.tmp")
    try:
        with (
            open(temporary, "x", encoding="utf-8", newline="\n")
            if text
            else open(temporary, "x+b") as file
        ):
            writer(file)
            file.flush()
            os.fsync(file.fileno())
        if replaces:
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except BaseException:  # also KeyboardInterrupt: that is when files are cut in half
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise

"""The folder of a run's results.

``run.json`` is written first: it marks the folder as a run's, and says which input and settings the
checkpoint beside it belongs to. A folder that other files lie in, or another run, is left alone.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vmm_fast._errors import InputError
from vmm_fast._files import Lock, read_json, write_json
from vmm_fast._schema import check, rules_of, table, text

RUN = "run.json"
RECORD = table({"vmm_fast": text, "input": text, "settings": table({})})
RUNNING = ".running"  # locked while a run lasts


def digest(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file, or of every file in a folder and its name."""
    found = hashlib.sha256()
    if os.path.isdir(path):
        for file in sorted(p for p in Path(path).rglob("*") if p.is_file()):
            found.update(f"{file.relative_to(path)}\n{digest(file)}\n".encode())
    else:
        with open(path, "rb") as stream:
            while block := stream.read(1 << 20):
                found.update(block)
    return "sha256 " + found.hexdigest()


def must_hold_run(path: str | os.PathLike[str]) -> None:
    """Raise InputError unless a folder holds a run that can be resumed."""
    if not (Path(path) / RUN).exists():
        raise InputError(f"--resume: {path} holds no run; leave --resume out to start one")


def folder_of_model(path: str | os.PathLike[str]) -> Path:
    """Return the folder that holds model.pt: ``path`` itself, or the folder ``model`` in it.

    :meth:`VMMSCVI.save` writes the first kind, the command ``integrate`` the second.

    Raises
    ------
    InputError
        If neither holds one.
    """
    for folder in (Path(path), Path(path) / "model"):
        if (folder / "model.pt").is_file():
            return folder
    raise InputError(f"{path}: must be a folder that integrate wrote, holds no model.pt")


class Folder:
    """The folder of a run's results, locked for this run from :meth:`start` to the end of ``with``.

    Parameters
    ----------
    path : str
    command : str
        The command whose runs write here, for messages.
    settings : type
        Dataclass of the run's settings, whose fields are annotated with their rules.
    checkpoint : str
        Name of the checkpoint file in the folder.
    results : sequence of str
        Names of the files and folders that the run writes.
    changeable : sequence of str
        Settings that may change when a run is resumed; ``epochs`` may only be raised.
    """

    def __init__(
        self,
        path: str,
        *,
        command: str,
        settings: type,
        checkpoint: str,
        results: Iterable[str],
        changeable: Sequence[str] = (),
    ) -> None:
        self.path = Path(path)
        self.command = command
        self.checkpoint = self.path / checkpoint
        self.changeable = changeable
        self._names = (checkpoint, *results, RUN)
        self._settings = {field.name for field in fields(settings)}
        self._rules = table(rules_of(settings))
        self._lock: Lock | None = None
        # Runs of earlier versions may lack newer settings: these take their defaults.
        self._defaults = {f.name: f.default for f in fields(settings) if f.default is not MISSING}
        self.record = self._read_record()

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @property
    def input(self) -> str | None:
        """Input of the run in the folder, or None if there is no run."""
        return None if self.record is None else self.record["input"]

    def _read_record(self) -> dict[str, Any] | None:
        try:
            record = read_json(self.path / RUN)
            check(f"{RUN} of {self.path}", record, RECORD)
        except (OSError, ValueError):
            return None  # no run has marked this folder
        return {**record, "settings": {**self._defaults, **record["settings"]}}

    def must_not_hold(self, file: str | os.PathLike[str]) -> None:
        """Raise InputError if the run would write over its input, a file or a folder."""
        for name in self._names:
            with suppress(OSError):
                if os.path.samefile(self.path / name, file):
                    raise InputError(
                        f"--out {self.path}: {name} in it is the input, which is never written "
                        "to; choose another folder"
                    )
        out, source = self.path.resolve(), Path(file).resolve()
        if source.is_dir() and (out == source or source in out.parents):
            raise InputError(
                f"--out {self.path}: lies in the input, which is never written to; choose another "
                "folder"
            )

    def resumed(self, source: str, given: dict[str, Any]) -> dict[str, Any]:
        """Return the settings of the run to resume, updated by `given` where that is allowed."""
        must_hold_run(self.path)
        if self.record is None:
            raise InputError(f"--resume: {self.path / RUN} is damaged; choose another folder")
        if self.record["input"] != source:
            raise InputError(f"--resume: the run in {self.path} was started on another input")
        stored = self.record["settings"]
        if set(stored) != self._settings:
            raise InputError(
                f"--resume: the run in {self.path} is of another version of vmm_fast, with other "
                f"settings; replace it by {self.command} --overwrite"
            )
        try:
            check(f"{RUN} of {self.path}", {"settings": stored}, table({"settings": self._rules}))
        except ValueError as error:
            raise InputError(
                f"--resume: {error}; replace the run by {self.command} --overwrite"
            ) from None
        changed = {name: value for name, value in given.items() if value is not None}
        processes = stored.get("processes", 1)
        if changed.get("processes", processes) != processes:
            raise InputError(
                f"--resume: the run in {self.path} must go on in {processes} process"
                f"{'es, started by torchrun' * (processes > 1)}, but is given "
                f"{changed['processes']}"
            )
        for name, value in changed.items():
            if value != stored[name] and name not in self.changeable:
                option = "--" + name.replace("_", "-")
                was = "absent" if stored[name] is None else stored[name]
                raise InputError(
                    f"{option} must be {was} as in the run that --resume goes on with, "
                    f"but is {value}"
                )
        if changed.get("epochs", stored["epochs"]) < stored["epochs"]:
            raise InputError(
                f"--epochs must be at least {stored['epochs']} as in the run that --resume goes on "
                f"with, but is {changed['epochs']}"
            )
        return {**stored, **changed}

    def start(self, record: dict[str, Any], *, overwrite: bool, resume: bool = False) -> None:
        """Create and lock the folder, and mark it as this run's.

        With ``overwrite`` a folder that holds another run is taken over; that run's results stay
        until those of this run replace them.

        Raises
        ------
        InputError
            If another process uses the folder, or it holds another run and ``overwrite`` is False,
            or it cannot be written to.
        """
        if self.path.is_symlink() and not self.path.exists():
            raise InputError(f"--out {self.path}: must be a folder, but is a link to nothing")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._take()
            if not resume:
                self._take_over(overwrite)
            self._remove_halves()
            write_json(self.path / RUN, {"vmm_fast": version("vmm-fast"), **record})
        except BaseException as error:
            self.__exit__()
            if not isinstance(error, OSError):
                raise
            raise InputError(
                f"--out {self.path}: must be a folder that can be written to: "
                f"{error.strerror or error}"
            ) from None

    def _take(self) -> Lock:
        who = f"process {os.getpid()} on {socket.gethostname()} ({self.command})"
        try:
            return Lock(self.path / RUNNING, who)
        except BlockingIOError as error:
            raise InputError(
                f"--out {self.path}: is in use by {error.strerror}; wait until that has ended, or "
                "choose another folder"
            ) from None

    def _take_over(self, overwrite: bool) -> None:
        held = [name for name in self._names if os.path.lexists(self.path / name)]
        if not held:
            return
        if self.record is None:
            raise InputError(
                f"--out {self.path}: holds {held[0]}, which is of no run, as {RUN} is missing or "
                "damaged; choose another folder"
            )
        if not overwrite and held != [RUN]:  # a run that failed at its start left that alone
            raise InputError(
                f"--out {self.path}: holds another run; choose another folder, go on with it by "
                f"{self.command} --resume, or replace it by {self.command} --overwrite"
            )
        # Before the new record is written: with it, the old checkpoint would look like this run's.
        self.checkpoint.unlink(missing_ok=True)

    def _remove_halves(self) -> None:
        """Remove the temporary files that a killed run left behind."""
        for name in self._names:
            for pattern in (f".{name}.*.tmp", f"{name}/.*.tmp"):
                for half in self.path.glob(pattern):
                    shutil.rmtree(half) if half.is_dir() else half.unlink()

"""Settings in a TOML file: ``--config FILE.toml``, and ``settings.toml`` beside every result."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vmm_fast._errors import InputError
from vmm_fast._files import write_atomically
from vmm_fast._schema import rules_of
from vmm_fast._text import joined

VERSION = 1  # of these files


def read_config(path: str, settings: type) -> dict[str, Any]:
    """Return the settings in a TOML file, by their names in the dataclass ``settings``.

    Raises InputError if the file cannot be read, is of another version, or has an entry that is no
    setting or has a wrong value.
    """
    import tomllib  # of Python 3.11, which cells need

    where = f"--config {path}"
    try:
        # Windows' editors begin a file with a mark.
        found = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: must be a TOML file, but is none: {error}") from None
    version = found.pop("version", VERSION)
    if version != VERSION or isinstance(version, bool | float):
        raise InputError(
            f"{where}: must be of version {VERSION}, but is of {version!r}: use the vmm-fast that "
            "wrote it, or give its settings as options"
        )
    rules = {_key(name): rule for name, rule in rules_of(settings).items()}
    for key, value in found.items():
        if key not in rules:
            raise InputError(
                f"{where}: must hold settings alone, but has {key!r}; leave it out, these are "
                f"settings: {joined(list(rules), len(rules))}"
            )
        try:
            rules[key](key, value)
        except ValueError as error:
            raise InputError(f"{where}: {error}; change it or leave it out") from None
    return {key.replace("-", "_"): value for key, value in found.items()}


def write_config(path: Path, command: str, settings: Any) -> None:
    """Write settings to a TOML file, whole or not at all, for :func:`read_config`."""
    given = {_key(name): value for name, value in asdict(settings).items() if value is not None}
    lines = [
        f"# vmm-fast {command} CELLS --config {path.name} repeats the run.",
        f"version = {VERSION}",
        *(f"{key} = {_toml(value)}" for key, value in given.items()),
    ]
    content = ("\n".join(lines) + "\n").encode("utf-8", "replace")
    write_atomically(path, lambda file: file.write(content))


def _key(name: str) -> str:
    return name.replace("_", "-")


def _toml(value: Any) -> str:
    """Return a text, number, truth value or list of them as TOML, which for these is JSON."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")

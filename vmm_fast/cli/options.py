"""Options that several commands share, and functions that print their results."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from vmm_fast import _schema
from vmm_fast._errors import InputError
from vmm_fast._schema import MOST, Rule, options_of
from vmm_fast._text import counted

Option = tuple[str, str, Callable[[str], Any], str]  # name, symbol, type, help
CUT = ("resolution", "separation", "clusters")  # settings that change without training


class Parser(argparse.ArgumentParser):
    """A parser of arguments that raises InputError with a message of one line.

    Its help keeps the lines of description and epilog, and has one line for most options.
    """

    def __init__(self, **options: Any) -> None:
        help_format = partial(argparse.RawDescriptionHelpFormatter, max_help_position=28)
        super().__init__(formatter_class=help_format, **options)

    def error(self, message: str) -> NoReturn:
        """Raise InputError, which the command prints in one line."""
        raise InputError(f"{message}; see {self.prog} --help")


def add_options(parser: argparse.ArgumentParser, *options: Option) -> None:
    """Add options that take a value."""
    for name, symbol, kind, text in options:
        parser.add_argument(name, metavar=symbol, type=kind, help=text)


def add_settings(
    parser: Any, settings: type, leave_out: Collection[str] = (), usual: str | None = None
) -> None:
    """Add an option for every setting; ``usual``, if given, is what the help calls the default."""
    for name, option in options_of(settings).items():
        if name in leave_out:
            continue
        text = option.help if usual is None else re.sub(r"default: [^)]*", usual, option.help)
        parser.add_argument(
            "--" + name.replace("_", "-"),
            metavar=option.symbol,
            type=checked(option.rule, option.kind, option.several),
            help=text,
            **({"nargs": "+"} if option.several else {}),
        )


def cut_of(given: dict[str, Any]) -> dict[str, Any]:
    """Return where to cut the tree, given options or the settings of a run."""
    cut = {name: given[name] for name in CUT}
    if cut["clusters"] is not None and (cut["resolution"], cut["separation"]) != (None, None):
        raise InputError("--clusters must be given without --resolution and --separation")
    return cut


def with_cut(given: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of a resumed run, with the cut from the arguments if one is given."""
    cut = cut_of(vars(arguments))
    return {**given, **(cut_of(given) if set(cut.values()) == {None} else cut)}


def add_existing(parser: argparse.ArgumentParser, changeable: str) -> None:
    """Add the options --resume and --overwrite, of which one may be given."""
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help=f"go on with the run in DIR; {changeable} can change",
    )
    existing.add_argument(
        "--overwrite", action="store_true", help="replace the results of another run in DIR"
    )


def checked(rule: Rule, kind: type = float, several: bool = False) -> Callable[[str], Any]:
    """Return the type of an option: a value, or one of several, that keeps a rule."""

    def parse(text: str) -> Any:
        value: Any = text
        try:
            with suppress(ValueError):
                value = kind(text)
            rule("", [value] if several else value)
        except ValueError as error:
            message = str(error).removeprefix("its content ").removeprefix("[0] ")
            raise argparse.ArgumentTypeError(message) from None
        return value

    return parse


def whole(least: int, most: int = MOST) -> Callable[[str], int]:
    """Return the type of an option that is a whole number from `least` to `most`."""
    return checked(_schema.whole(least, most), int)


at_least_0 = checked(_schema.AT_LEAST_0)


def require(*modules: str, extra: str = "cli") -> None:
    """Raise InputError if a package is missing or too old, naming the extra that installs it."""
    if "scvi" in extra and sys.version_info < (3, 11):
        raise InputError(f"cells need Python >= 3.11, but this is {platform.python_version()}")
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            message = f"needs {name}, which is not installed: pip install 'vmm-fast[{extra}]'"
            raise InputError(message) from None
        except ImportError as error:
            cure = f"pip install --upgrade 'vmm-fast[{extra}]'"
            raise InputError(f"{error}: {cure}") from None


def must_exist(file: str) -> None:
    """Raise InputError unless a file or folder exists."""
    if not os.path.exists(file):
        raise InputError(f"{file}: no such file or folder")


def file_to_write(arguments: argparse.Namespace, suffix: str) -> Path:
    """Return the .h5ad file to write, after checking that it can and may be written."""
    file = arguments.file
    out = Path(arguments.out or f"{Path(file).resolve().stem}{suffix}.h5ad")
    if out.suffix != ".h5ad":
        raise InputError(f"--out {out}: must end in .h5ad")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK | os.X_OK):
        raise InputError(f"--out {out}: must lie in a folder that can be written to")
    if out.exists() and not out.is_file():
        raise InputError(
            f"--out {out}: must be a file, but is {'a folder' if out.is_dir() else 'none'}"
        )
    if out.exists() and os.path.exists(file) and out.samefile(file):
        raise InputError(f"--out {out}: is the input, which is never written to")
    if Path(file).resolve() in out.resolve().parents:
        raise InputError(f"--out {out}: lies in the input, which is never written to")
    if out.exists() and not arguments.overwrite:
        raise InputError(f"--out {out}: exists; choose another, or replace it by --overwrite")
    try:  # the folder's permissions allow it, but the disk may be read-only
        with tempfile.TemporaryFile(dir=out.resolve().parent):
            pass
    except OSError as error:
        raise InputError(
            f"--out {out}: must lie in a folder that can be written to: {error.strerror or error}"
        ) from None
    return out


def note_few(asked: int | None, found: int, what: str) -> None:
    """Print a note if there are fewer clusters than were asked for, or one alone."""
    if asked is not None and found < asked:
        some = counted(found, "cluster")
        print(f"note: {some}, not {asked}: more would leave some without {what}")
    elif found == 1 and asked is None:
        print(f"note: 1 cluster: after more --epochs the model may tell {what} apart")


def print_table(rows: list[tuple[str, str]], folder: Path, results: dict[str, str]) -> None:
    """Print results in two columns, and the files that were written."""
    left = max(len(title) for title, _ in rows)
    right = max(len(value) for _, value in rows)
    print("\n" + "-" * (left + right + 2))
    for title, value in rows:
        print(f"{title:<{left}}  {value:>{right}}")
    print("-" * (left + right + 2))
    print_files(folder, results)


def print_files(folder: Path, results: dict[str, str]) -> None:
    """Print the names and meanings of the files that were written."""
    print(f"\nin {folder}:")
    for name, meaning in results.items():
        print(f"  {name:<13} {meaning}")

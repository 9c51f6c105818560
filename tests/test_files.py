"""Files are written whole or not at all."""

import csv
import errno
import fcntl
import json
import os
import random
import stat

import pytest
import torch
from support import files_of_at_most, mutated, mutations

from vmm_fast._files import (
    SECONDS_TO_LOCK,
    Lock,
    as_csv,
    read_json,
    save_atomically,
    write_atomically,
    write_json,
)


def test_writes_bytes_and_text(tmp_path):
    write_atomically(tmp_path / "a.bin", lambda file: file.write(b"\x00\xff"))
    write_atomically(str(tmp_path / "a.txt"), lambda file: file.write("é\n"), text=True)
    assert (tmp_path / "a.bin").read_bytes() == b"\x00\xff"
    assert (tmp_path / "a.txt").read_bytes() == "é\n".encode()
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.txt"]


def test_old_content_stands_until_the_new_is_complete(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    seen = []

    def writer(file):
        file.write("new")
        file.flush()
        seen.append(path.read_text())

    write_atomically(path, writer, text=True)
    assert seen == ["old"]
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("old", [{}, {"a.txt": "old"}])
def test_a_failing_writer_changes_nothing(tmp_path, error, old):
    for name, text in old.items():
        (tmp_path / name).write_text(text)

    def writer(file):
        file.write("half")
        raise error("stopped")

    with pytest.raises(error, match="stopped"):
        write_atomically(tmp_path / "a.txt", writer, text=True)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == old


def test_content_is_on_disk_before_the_file_gets_its_name(tmp_path, monkeypatch):
    path, done = tmp_path / "a.txt", []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        status = os.fstat(descriptor)
        done.append("folder" if stat.S_ISDIR(status.st_mode) else status.st_size)
        fsync(descriptor)

    def replaced(source, target):
        assert os.path.dirname(source) == str(tmp_path) and not path.exists()
        done.append(str(target))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write_atomically(path, lambda file: file.write("content"), text=True)
    assert done == [7, str(path), "folder"]


def test_a_failing_replace_leaves_no_temporary_file(tmp_path, monkeypatch):
    def replace(source, target):
        raise PermissionError("no")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(PermissionError, match="no"):
        write_atomically(tmp_path / "a.txt", lambda file: file.write(b"x"))
    assert os.listdir(tmp_path) == []


def test_permissions_are_the_old_ones_or_the_usual(tmp_path):
    mask = os.umask(0o027)
    try:
        write_atomically(tmp_path / "new", lambda file: file.write(b"x"))
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    (tmp_path / "new").chmod(0o604)
    write_atomically(tmp_path / "new", lambda file: file.write(b"y"))
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o604


def test_a_symbolic_link_is_followed(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_atomically(tmp_path / "link", lambda file: file.write(b"new"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"


def test_a_relative_path_and_a_long_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_atomically("a", lambda file: file.write(b"x"))
    name = "ü" * 127  # 254 bytes of the 255 that a name may have
    write_atomically(name, lambda file: file.write(b"x"))
    assert sorted(os.listdir(tmp_path)) == ["a", name]


def test_errors_name_the_path(tmp_path):
    calls = []
    with pytest.raises(FileNotFoundError, match=r"folder that exists.*missing"):
        write_atomically(tmp_path / "missing" / "a", calls.append)
    with pytest.raises(IsADirectoryError, match="path must be a file"):
        write_atomically(tmp_path, calls.append)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(OSError, match="regular file"):
        write_atomically(fifo, calls.append)
    assert calls == []


def test_a_full_disk_is_told_with_the_file(tmp_path):
    path = tmp_path / "a.pt"
    save_atomically(path, {"a": torch.zeros(3)})
    with (
        files_of_at_most(5_000),
        pytest.raises(OSError, match=r"File too large: .*a\.pt") as caught,
    ):
        save_atomically(path, {"a": torch.zeros(10_000)})
    assert caught.value.filename == str(path)
    assert torch.equal(torch.load(path)["a"], torch.zeros(3))
    assert os.listdir(tmp_path) == ["a.pt"]


def test_what_killed_processes_left_is_removed(tmp_path):
    names = [f".a.txt.{letter * 16}.tmp" for letter in "abc"]
    killed, at_work, begun = (tmp_path / name for name in names)
    others = [tmp_path / f".{name}.tmp" for name in ("a.txt", f"b.txt.{'a' * 16}", "a.txt.mine")]
    for path in (killed, at_work, *others):
        path.touch()
        os.utime(path, (0, os.stat(path).st_mtime - 2 * SECONDS_TO_LOCK))
    begun.touch()
    with open(at_work, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_atomically(tmp_path / "a.txt", lambda file: file.write("new"), text=True)
    left = {at_work, begun, *others, tmp_path / "a.txt"}
    assert set(tmp_path.iterdir()) == left


def test_a_file_is_locked_while_it_is_written(tmp_path):
    def writer(file):
        (half,) = tmp_path.iterdir()
        os.utime(half, (0, 0))
        write_atomically(tmp_path / "a.txt", lambda file: file.write("other"), text=True)
        assert half.exists()
        file.write("this")

    write_atomically(tmp_path / "a.txt", writer, text=True)
    assert (tmp_path / "a.txt").read_text() == "this"


def test_a_lock_is_free_for_all_where_the_disk_has_none(tmp_path, monkeypatch):
    def absent(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    path = tmp_path / "lock"
    first = Lock(path, "first")
    with pytest.raises(BlockingIOError) as caught:
        Lock(path, "second")
    assert caught.value.strerror == "first"
    monkeypatch.setattr(fcntl, "flock", absent)
    second = Lock(path, "second")
    assert path.read_text() == "second"
    second.release()
    first.release()
    assert not path.exists()


@mutations(200)
def test_every_changed_entry_of_a_json_file_is_found(tmp_path, number):
    path, rng = tmp_path / "run.json", random.Random(0)
    content = {"name": "a", "rate": 0.1, "sizes": (1, 2), "deep": {"flag": True, "none": None}}
    write_json(path, content)
    assert read_json(path) == {**content, "sizes": [1, 2]}
    sound = json.loads(path.read_text())
    for _ in range(number):
        text = json.dumps(mutated(sound, rng)[0], default=str)
        if text == json.dumps(sound):
            continue
        path.write_text(text)
        with pytest.raises(ValueError, match=r"run\.json' (is damaged|must hold .* is damaged)"):
            read_json(path)
    for text in ("", "[]", "[" * 100_000, "1", '{"sha256": 1}', "\xff"):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match="is damaged"):
            read_json(path)


def test_tables_give_every_name_back(tmp_path):
    """A carriage return does not end a row, and no name is changed for a spreadsheet's sake."""
    names = [
        *("a\rb", "\r", "a\r\nb", "a\nb", "a,b", 'say "x"', "\ttab", " space ", "", "\u2028", "é☃"),
        *("=1+1", "+1", "-1", "@sum", "'", "\x0b"),
    ]
    rows = [[name, i, f"{-i / 7:.3f}"] for i, name in enumerate(names)]
    write_atomically(tmp_path / "a.csv", as_csv(["cell", "n", "x"], rows), text=True)
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [
            ["cell", "n", "x"],
            *([r[0], str(r[1]), r[2]] for r in rows),
        ]
    raw = (tmp_path / "a.csv").read_bytes()
    assert raw.startswith(b'cell,n,x\n"a\rb",0,0.000\n"\r",1,-0.143\n') and raw.endswith(b"\n")
    pandas = pytest.importorskip("pandas")
    table = pandas.read_csv(tmp_path / "a.csv", keep_default_na=False)
    assert table.cell.tolist() == names and table.x.dtype == float

"""The folder of a run's results: other files and the input are safe, a run goes on as it was."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

from vmm_fast import _folder
from vmm_fast._errors import InputError
from vmm_fast._files import read_json, write_json
from vmm_fast._folder import Folder, digest


@dataclass
class Settings:
    epochs: int
    batch_size: int
    layer: str | None = None


STORED = {"epochs": 4, "batch_size": 2, "layer": None}
RECORD = {"input": "sha256 1", "settings": STORED}
OTHER = {"input": "sha256 2", "settings": STORED}


def folder(path, **options):
    results = ("table.csv", "model")
    fixed = {"command": "integrate", "checkpoint": "checkpoint.pt", "results": results}
    return Folder(str(path), settings=Settings, **fixed, **options)


@pytest.fixture
def out(tmp_path):
    """Return the folder of a finished run, with one file that is not the run's."""
    path = tmp_path / "out"
    start(path, RECORD)
    (path / "model").mkdir()
    for name in ("checkpoint.pt", "table.csv", "model/model.pt", "notes.txt"):
        (path / name).write_text(name)
    return path


def start(path, record, **options):
    """Start and end a run in the folder."""
    with folder(path) as run:
        run.start(record, **{"overwrite": False, **options})


def contents(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_a_new_folder_is_made_and_marked_as_the_run_s(tmp_path):
    path = tmp_path / "deep" / "out"
    new = folder(path)
    assert new.input is None and not path.exists()
    with new:
        new.start(RECORD, overwrite=False)
    assert read_json(path / "run.json") == {"vmm_fast": version("vmm-fast"), **RECORD}
    assert folder(path).input == "sha256 1"
    assert folder(path).checkpoint == path / "checkpoint.pt"
    # A run that failed at its start left nothing else: another may take its place.
    start(path, OTHER)
    assert folder(path).input == "sha256 2"


def test_another_run_stays_until_it_is_overwritten(out):
    before = contents(out)
    with pytest.raises(InputError) as caught:
        start(out, OTHER)
    for text in (f"--out {out}: holds another run", "integrate --resume", "integrate --overwrite"):
        assert text in str(caught.value)
    assert contents(out) == before
    start(out, OTHER, overwrite=True)
    # Under the new record the old checkpoint would be taken for the new run's.
    after = contents(out)
    assert set(before) - set(after) == {"checkpoint.pt"}
    assert folder(out).input == "sha256 2"
    assert all(after[name] == before[name] for name in set(after) - {"run.json"})


@pytest.mark.parametrize(
    "record",
    [
        None,
        "",
        json.dumps(RECORD)[:-5],
        "[]",
        json.dumps({"input": "sha256 1"}),
        json.dumps({**RECORD, "input": 1}),
        json.dumps({**RECORD, "settings": {"epochs": 4}}),
        json.dumps({**RECORD, "settings": {**STORED, "more": 1}}),
        json.dumps({"vmm_fast": "0.1", **RECORD, "sha256": "0"}),
    ],
)
def test_files_of_no_run_are_left_alone(out, record):
    if record is None:
        (out / "run.json").unlink()
    else:
        (out / "run.json").write_text(record)
    before = contents(out)
    word = "holds no run" if record is None else r"run\.json is damaged"
    with pytest.raises(InputError, match=f"--resume: {out}.* ?{word}"):
        folder(out).resumed("sha256 1", {})
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"holds checkpoint\.pt, which is of no run, as run"):
            start(out, OTHER, overwrite=overwrite)
    assert contents(out) == before


def test_a_run_of_another_version_is_resumed_if_its_settings_are_known(out):
    record = read_json(out / "run.json")
    del record["settings"]["layer"]  # which has a default
    write_json(out / "run.json", record)
    assert folder(out).resumed("sha256 1", {"epochs": 4}) == STORED
    del record["settings"]["epochs"]
    write_json(out / "run.json", record)
    with pytest.raises(InputError, match="is of another version of vmm_fast, with other settings"):
        folder(out).resumed("sha256 1", {})
    start(out, OTHER, overwrite=True)
    assert folder(out).input == "sha256 2"


def test_links_and_folders_count_as_files_and_other_names_do_not(tmp_path):
    for name in ("model", "table.csv"):
        path = tmp_path / name
        path.mkdir()
        (path / "notes.txt").write_text("mine")
        start(path, RECORD)
        (path / "run.json").unlink()
        if name == "model":
            (path / name).mkdir()
        else:
            (path / name).symlink_to("nowhere")
        with pytest.raises(InputError, match=f"holds {name}, which is of no run"):
            start(path, RECORD, overwrite=True)


def test_a_run_that_goes_on_keeps_its_files_but_no_halves(out):
    before = contents(out)
    (out / "model" / ".abc.tmp").mkdir()
    for name in (".table.csv.1.tmp", ".run.json.2.tmp", "model/.abc.tmp/part", "model/.d.tmp"):
        (out / name).write_text("half")  # as a killed run leaves it
    for name in (".other.csv.1.tmp", "table.csv.tmp"):
        before[name] = b"mine"
        (out / name).write_text("mine")
    start(out, RECORD, resume=True)
    assert contents(out) == before and not (out / "model" / ".abc.tmp").exists()


def test_settings_to_go_on_with(out):
    run = folder(out, changeable=("epochs", "layer"))
    nothing = dict.fromkeys(STORED)
    assert run.resumed("sha256 1", nothing) == STORED
    given = {"epochs": 5, "batch_size": 2, "layer": "counts"}
    assert run.resumed("sha256 1", given) == given
    for source, changed, message in (
        ("sha256 2", {}, f"--resume: the run in {out} was started on another input"),
        (
            "sha256 1",
            {"batch_size": 9},
            "--batch-size must be 2 as in the run that --resume goes on with, but is 9",
        ),
        ("sha256 1", {"epochs": 3}, "--epochs must be at least 4 as in the run .* is 3"),
    ):
        with pytest.raises(InputError, match=message):
            run.resumed(source, {**nothing, **changed})
    for name, message in (
        ("layer", "--layer must be absent as in the run .* is counts"),
        ("epochs", "--epochs must be 4 as in the run .* is 5"),
    ):
        with pytest.raises(InputError, match=message):
            folder(out).resumed("sha256 1", {**nothing, name: given[name]})
    with pytest.raises(InputError, match="none holds no run; leave --resume out to start one"):
        folder(out / "none").resumed("sha256 1", nothing)


def test_a_folder_is_one_run_s_while_that_lasts(out):
    with folder(out) as run:
        run.start(OTHER, overwrite=True)
        (out / ".table.csv.1.tmp").write_text("half")
        before = contents(out)
        for options in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(InputError, match=f"is in use by process {os.getpid()} on .*integr"):
                start(out, RECORD, **options)
            assert contents(out) == before
    assert ".running" in before and ".running" not in contents(out)
    start(out, RECORD, overwrite=True)


def test_a_folder_is_free_when_its_run_was_killed(out):
    program = (
        "import sys; from test_folder import folder, OTHER; run = folder(sys.argv[1]); "
        "run.start(OTHER, overwrite=True); print(); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(out)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": Path(__file__).parent}
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.readline()
        with pytest.raises(InputError, match=f"is in use by process {process.pid} on "):
            start(out, RECORD, overwrite=True)
        process.kill()
        process.wait()
    start(out, RECORD, overwrite=True)
    assert folder(out).input == "sha256 1" and ".running" not in contents(out)


def test_the_input_is_no_result(out, tmp_path):
    outside = tmp_path / "cells.csv"
    outside.write_text("1")
    folder(out).must_not_hold(outside)
    folder(out).must_not_hold(tmp_path / "absent")
    folder(out).must_not_hold(out / "notes.txt")
    (tmp_path / "link").symlink_to(out / "table.csv")
    for file in (out / "table.csv", tmp_path / "link"):
        with pytest.raises(InputError, match=r"table\.csv in it is the input, which is never"):
            folder(out).must_not_hold(file)
    for path in (tmp_path, tmp_path / "below" / "deep"):
        with pytest.raises(InputError, match="lies in the input, which is never written to"):
            folder(path).must_not_hold(tmp_path)
    folder(tmp_path).must_not_hold(tmp_path / "out")  # a folder of cells beside the results


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError) as caught:
            start(path, RECORD, overwrite=True)
        assert f"--out {path}: must be a folder that can be written to: " in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(InputError, match="link: must be a folder, but is a link to nothing"):
        start(tmp_path / "link", RECORD)

    def refused(path, content):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(_folder, "write_json", refused)
    with pytest.raises(InputError, match="folder that can be written to: Permission denied"):
        start(tmp_path / "out", RECORD)


def test_digests_are_of_names_and_contents(tmp_path):
    content = os.urandom((1 << 20) + 5)  # more than is read together
    (tmp_path / "file").write_bytes(content)
    assert digest(tmp_path / "file") == f"sha256 {hashlib.sha256(content).hexdigest()}"
    cells = tmp_path / "cells"
    (cells / "below").mkdir(parents=True)
    for name in ("b", "a", "below/c"):
        (cells / name).write_text(name)
    first = digest(cells)
    os.utime(cells / "a", (0, 0))
    assert digest(str(cells)) == first
    seen = {first}
    (cells / "a").write_text("b")
    seen.add(digest(cells))
    (cells / "below" / "c").rename(cells / "c")
    seen.add(digest(cells))
    (cells / "c").unlink()
    seen.add(digest(cells))
    assert len(seen) == 4

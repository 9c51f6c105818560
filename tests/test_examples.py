"""The examples run."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch, capsys):
    """Run an example in this process; return its output."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_own_vae(example):
    pytest.importorskip("sklearn", reason="the example's digits come with scikit-learn")
    assert ", clusters: " in example("own_vae.py", "2")


@pytest.mark.filterwarnings("ignore")
def test_lightning_module(example):
    pytest.importorskip("lightning", reason="lightning is not installed")
    pytest.importorskip("sklearn", reason="the example's digits come with scikit-learn")
    sizes = re.search(
        r"clusters; held-out images in each: \[(.*)\]", example("lightning_module.py", "2")
    )
    assert sum(map(int, sizes[1].split(","))) == 297

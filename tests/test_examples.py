"""The examples run."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_own_vae(monkeypatch, capsys):
    pytest.importorskip("sklearn", reason="the example's digits come with scikit-learn")
    monkeypatch.setattr(sys, "argv", ["own_vae.py", "2"])
    runpy.run_path(str(EXAMPLES / "own_vae.py"), run_name="__main__")
    assert "clusters in use" in capsys.readouterr().out

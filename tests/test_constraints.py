"""The pinned versions resolve with torch from the package index, for every Python."""

import re
import subprocess
from pathlib import Path

import pytest

uv = pytest.importorskip("uv", reason="uv is not installed")

ROOT = Path(__file__).parents[1]
UNREACHED = re.compile("error sending request|dns error|Network connectivity|Failed to fetch")


@pytest.mark.slow("asks the package index about a hundred packages")
@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_constraints_resolve_with_torch_from_the_index(python, tmp_path):
    """Wheels that lie at hand are not looked at: they may ask for less than those of the index."""
    options = ["--no-config", "--no-annotate", "--python-platform", "linux", "--extra", "test"]
    options += ["--python-version", python, "--constraint", "constraints.txt"]
    resolved = tmp_path / "resolved.txt"
    run = subprocess.run(
        [uv.find_uv_bin(), "pip", "compile", *options, "--output-file", resolved, "pyproject.toml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode and UNREACHED.search(run.stderr):
        pytest.skip(f"no package index is reached: {run.stderr.strip().splitlines()[0]}")
    assert run.returncode == 0, run.stderr
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split(";")[0].strip() for line in pinned}
    found = {line for line in resolved.read_text().splitlines() if line[0] != "#"}
    assert found and not found - pinned

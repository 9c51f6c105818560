"""Versions: pinned ones are those of the hooks and resolve together; old ones are refused."""

import os
import re
import subprocess
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from vmm_fast import _checks

uv = pytest.importorskip("uv", reason="uv is not installed")

ROOT = Path(__file__).parents[1]


def pinned_versions():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {line.split(";")[0].strip() for line in lines}


def test_hooks_have_the_pinned_versions():
    hooks = re.findall(r"[\w-]+==[\w.]+", (ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks and not set(hooks) - pinned_versions()


def resolve(*options, **keywords):
    """Let uv resolve requirements as on any machine: by no file or variable of this one."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("UV_")}
    command = [uv.find_uv_bin(), "pip", "compile", "--no-config", "--no-annotate", *options]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, **keywords
    )


@pytest.fixture(scope="module")
def index():
    """Skip where no index is reached; whatever else fails is a failure."""
    run = resolve("--no-cache", "--no-deps", "-", input="torch")
    if "error sending request" in run.stderr:
        pytest.skip(f"no package index is reached: {' '.join(run.stderr.split())}")
    assert run.returncode == 0, run.stderr


@pytest.mark.slow("asks the package index about two hundred packages")
@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_constraints_resolve_with_torch_from_the_index(index, python, tmp_path):
    """Wheels that lie at hand are not looked at: they may ask for less than those of the index."""
    options = ["--python-platform", "linux", "--python-version", python, "--all-extras"]
    options += ["--prerelease", "disallow", "--constraint", "constraints.txt"]
    resolved = tmp_path / "resolved.txt"
    run = resolve(*options, "--output-file", resolved, "pyproject.toml")
    assert run.returncode == 0, run.stderr
    found = {line for line in resolved.read_text().splitlines() if line[0] != "#"}
    assert found and not found - pinned_versions()


@pytest.mark.parametrize(
    ("package", "found", "complaint"),
    [
        ("torch", "2.6.0", None),
        ("torch", "2.13.0+cpu", None),
        ("torch", "2.6.0a0+git12", None),
        ("torch", "2.5.1+cu124", "needs torch >= 2.6, but 2.5.1+cu124 is"),
        ("scvi-tools", "1.5.9", None),
        ("scvi-tools", "1.4.1", "needs scvi-tools >= 1.4.2, < 1.6, but 1.4.1 is"),
        ("torch", None, "needs torch >= 2.6, but None is"),
        ("scvi-tools", "1.6.0", "needs scvi-tools >= 1.4.2, < 1.6, but 1.6.0 is"),
    ],
)
def test_a_package_that_is_too_old_or_too_new_is_named(package, found, complaint, monkeypatch):
    monkeypatch.setattr(_checks, "version", {package: found}.get)
    if complaint is None:
        _checks.check_version(package)
    else:
        with pytest.raises(ImportError, match=re.escape(complaint)):
            _checks.check_version(package)


def test_a_package_that_is_missing_is_named(monkeypatch):
    def missing(package):
        raise PackageNotFoundError(package)

    with monkeypatch.context() as patch:
        patch.setattr(_checks, "requires", missing)
        with pytest.raises(ImportError, match=r"must be installed.*: pip install \."):
            _checks.check_version("torch")
    monkeypatch.setattr(_checks, "version", missing)
    with pytest.raises(
        ImportError, match=r"needs scvi-tools >= 1\.4\.2, < 1\.6.*none is installed"
    ):
        _checks.check_version("scvi-tools")

"""The code of README, site and docstrings runs, on small data; links lead somewhere."""

import ast
import doctest
import importlib
import re
import shlex
from importlib.metadata import metadata
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from support import separated_cells
from torch import nn
from torch.distributions import Normal

from vmm_fast import cli, operations
from vmm_fast._errors import InputError

ROOT = Path(__file__).parents[1]
FIRST = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES = {str(p.relative_to(ROOT)): p for p in [*FIRST, *ROOT.glob("docs/**/*.md")]}
FENCED = re.compile(r"^```(python|sh)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"^    ((?:\.venv/bin/)?(?:vmm-fast|make|pip) .*)$", re.MULTILINE)
INLINE = re.compile(r"`((?:make|pip install|python -m bench) [a-z.'][^`]*)`")
NAMED = re.compile(
    r"`((?!docs/_build)(?:bench|csrc|docs|examples|kernels|tests|vmm_fast)/[a-z0-9_./-]+)`"
)
RUN = "docs/start/file.md"  # its commands run, too
TRAINED = "docs/tutorials/tree.md"  # two epochs give one cluster, whose tree has nothing to cut
SLOW = {
    RUN: "draws pictures",
    TRAINED: "trains to the end",
    "docs/start/torch.md": "trains to the end",
    "docs/tutorials/cells.md": "trains, and draws a UMAP",
    "docs/tutorials/labels.md": "trains two models",
    "docs/tutorials/query.md": "trains two models",
}


EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(ROOT.glob("vmm_fast/**/*.py"))
    if ">>> " in path.read_text()
]


class Block(NamedTuple):
    """A fenced block of a page, and its line there."""

    language: str
    code: str
    line: int


def blocks(name):
    """Return the blocks of Python and of shell of a page, in order."""
    text = PAGES[name].read_text()
    return [Block(*m.groups(), text[: m.start()].count("\n") + 2) for m in FENCED.finditer(text)]


def split(shell):
    """Return program and arguments of every line of shell."""
    lines = [shlex.split(x, comments=True) for x in shell.replace("\\\n", " ").splitlines()]
    return [(Path(words[0]).name, words[1:]) for words in lines if words]


def commands(shell):
    """Return the arguments of every ``vmm-fast`` command of some lines of shell."""
    return [arguments for program, arguments in split(shell) if program == "vmm-fast"]


WITH_PYTHON = [
    pytest.param(name, marks=pytest.mark.slow(SLOW[name]) if name in SLOW else ())
    for name in PAGES
    if any(block.language == "python" for block in blocks(name))
]


def shortened(fit):
    return lambda *args, epochs, **options: fit(*args, epochs=2, **options)


@pytest.fixture
def folder(tmp_path, monkeypatch, name):
    """Change to a folder of the page's own and return it. Trainings have two epochs."""
    monkeypatch.chdir(tmp_path)
    for module in ("vmm_fast.models", "vmm_fast.arrays.clustering") if name != TRAINED else ():
        monkeypatch.setattr(f"{module}.fit", shortened(importlib.import_module(module).fit))
    return tmp_path


@pytest.fixture
def cells(folder, monkeypatch):
    """Write the files of cells that pages read."""
    scvi = pytest.importorskip("scvi", reason="scvi-tools is not installed")
    monkeypatch.setattr(scvi.settings, "logging_dir", folder / "logs")
    start = scvi.train.Trainer.__init__

    def start_short(self, *args, max_epochs=None, **options):
        start(self, *args, **{**options, "max_epochs": 2})

    monkeypatch.setattr(scvi.train.Trainer, "__init__", start_short)
    adata = separated_cells()
    random = np.random.default_rng(0)
    adata.obsm["protein_expression"] = random.poisson(5.0, (adata.n_obs, 6)).astype(np.float32)
    for name in ("cells", "atlas", "cite-seq"):
        adata.write_h5ad(f"{name}.h5ad")
    assigned = adata.copy()
    assigned.obs["vmm_cluster"], assigned.obs["vmm_novelty"] = adata.obs["batch"].array, 0.5
    assigned.write_h5ad("MORE-vmm.h5ad")
    from anndata import AnnData
    from mudata import MuData

    proteins = AnnData(adata.obsm["protein_expression"], adata.obs[[]])
    MuData({"rna": adata, "prot": proteins}).write("cite-seq.h5mu")
    return adata


def network():
    """Return the names that README's training loop takes for granted."""
    torch.manual_seed(0)
    body, decoder = nn.Linear(64, 16), nn.Linear(8, 64)
    x = torch.randn(120, 64)
    return {
        "x": x,
        "batches": x.split(40),
        "encoder": lambda x: Normal(body(x)[:, :8], body(x)[:, 8:].exp()),
        "reconstruction": lambda x, z: (x - decoder(z)).square().sum(1),
        "optimizer": torch.optim.Adam([*body.parameters(), *decoder.parameters()]),
    }


@pytest.mark.filterwarnings("ignore")  # of other packages, and that so short trainings give
@pytest.mark.parametrize("name", WITH_PYTHON)
def test_python_of_a_page_runs(name, folder, request):
    """Run a page's blocks in order, in one namespace, and the commands that have files there."""
    namespace = network()
    if "from vmm_fast.scvi" in PAGES[name].read_text():
        namespace["adata"] = request.getfixturevalue("cells")
    for block in blocks(name):
        if block.language == "python":
            lines = "\n" * (block.line - 1) + block.code  # so that an error tells the page's line
            exec(compile(lines, str(PAGES[name]), "exec"), namespace)
        elif name == RUN:
            assert {cli.main(arguments) for arguments in commands(block.code)} == {0}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_docstrings_run(name, tmp_path, monkeypatch):
    """A reader who has imported what the example is of, numpy and torch gets what it shows."""
    monkeypatch.chdir(tmp_path)
    if name.startswith("vmm_fast.scvi"):
        pytest.importorskip("scvi", reason="scvi-tools is not installed")
    module = importlib.import_module(name)
    own = {key: x for key, x in vars(module).items() if getattr(x, "__module__", None) == name}
    for example in doctest.DocTestFinder().find(module, globs={"np": np, "torch": torch, **own}):
        torch.manual_seed(0)
        assert doctest.DocTestRunner().run(example).failed == 0, example.name


def check_make(targets):
    known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {target for target in targets if "=" not in target} <= set(known)


def check_pip(arguments):
    extras = set(metadata("vmm-fast").get_all("Provides-Extra"))
    assert arguments[0] == "install"
    for wanted in re.findall(r"^\.\[(.*)\]$", "\n".join(arguments), re.MULTILINE):
        assert set(wanted.split(",")) <= extras


def check_python(arguments):
    if arguments[:2] == ["-m", "bench"]:
        from bench.__main__ import parser

        parser().parse_args(arguments[2:])
    else:
        assert arguments[0].endswith(".py")


CHECKS = {
    "vmm-fast": lambda arguments: cli._parser().parse_args(arguments),
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "torchrun": list,
    "sbatch": list,
}


def check_command(program, arguments):
    """Fail unless a program would understand its arguments and find the repository's files."""
    CHECKS[program](arguments)
    for before, word in pairwise(["", *arguments]):
        if before == "-c" or ("/" in word and (ROOT / word.split("/")[0]).is_dir()):
            assert (ROOT / word).is_file(), word


@pytest.mark.parametrize("name", PAGES)
def test_commands_of_a_page_are_understood(name):
    text = PAGES[name].read_text()
    shell = [block.code for block in blocks(name) if block.language == "sh"]
    for command in split("\n".join([*shell, *INDENTED.findall(text), *INLINE.findall(text)])):
        check_command(*command)


@pytest.mark.parametrize(
    "line",
    [
        "make demos",
        "pip install '.[cli,cells]'",
        "pip install -c constraint.txt .",
        "python -m bench spead",
        "python -m bench step --thread two",
        "python examples/absent.py",
        "vmm-fast integrate CELLS --label-column type",
        "vmm-slow integrate --example",
    ],
)
def test_a_command_that_would_fail_is_found(line):
    with pytest.raises((AssertionError, InputError, KeyError, SystemExit)):
        check_command(*split(line)[0])


@pytest.mark.parametrize("name", PAGES)
def test_files_that_a_page_names_exist(name):
    for path in NAMED.findall(PAGES[name].read_text()):
        assert (ROOT / path).exists(), path


def test_every_operation_has_a_section():
    headings = re.findall(r"^### (.*)$", PAGES["docs/inside.md"].read_text(), re.MULTILINE)
    named = [name for heading in headings for name in heading.split(", ")]
    assert [name for name in named if "_" in name] == [x.name for x in operations.OPERATIONS]


def test_commands_on_the_example_name_columns_that_it_has():
    pytest.importorskip("scanpy", reason="scanpy is not installed")
    from vmm_fast.cells import reading

    named = set()
    for name in PAGES:
        for arguments in commands("".join(b.code for b in blocks(name) if b.language == "sh")):
            given = vars(cli._parser().parse_args(arguments))
            if given.get("example"):
                for key in ("batch_key", "labels_key", "train_labels"):
                    named |= {given[key]} - {None}
                for key in ("categorical_covariates", "continuous_covariates"):
                    named.update(given[key] or ())
    assert named == {"bulk_labels", "phase", "percent_mito"} <= set(reading.example().adata.obs)


@pytest.mark.parametrize("name", PAGES)
def test_links_of_a_page_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", PAGES[name].read_text()):
        if not target.startswith("http"):
            assert (PAGES[name].parent / target).exists(), target


def texts_of(source):
    """Yield the texts of a module, with "…" for the fields of f-strings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [x.value if isinstance(x, ast.Constant) else "…" for x in node.values]
            yield "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


ERRORS = re.findall(r"^`(.+)`\n: ", PAGES["docs/errors.md"].read_text(), re.MULTILINE)


def test_errors_are_those_that_the_package_raises():
    texts = {text for path in ROOT.glob("vmm_fast/**/*.py") for text in texts_of(path.read_text())}

    def is_raised(message):
        pattern = re.compile(".*".join(map(re.escape, message.split("…"))))
        return any(map(pattern.search, texts))

    assert len(ERRORS) > 20 and [x for x in ERRORS if not is_raised(x)] == []


def test_pictures_are_small():
    sizes = {path.name: path.stat().st_size for path in (ROOT / "docs/images").iterdir()}
    assert sizes and max(sizes.values()) < 200_000, sizes

"""Run the tests on other versions of Python and of the packages, and with other compilers.

    nox --list                      # all of them
    nox -s core-3.12 cells-3.12     # newest packages: all tests but those of cells; these
    nox -s clang no-openmp          # the core, built by clang and without OpenMP
    nox -s core-3.12 -- -k kl       # with options of pytest's

``PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu`` installs torch without CUDA.
"""

import nox

nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_missing_interpreters = True

PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
# Versions that are not named here are the newest that fit, unlike those of ``make test``.
OLDEST = ["torch==2.6.*", "numpy<2"]
OLD_CELLS = ["scvi-tools==1.4.2", "anndata<0.13", "pandas<3"]
TOOLS = ["hypothesis", "mpmath", "pytest", "pytest-timeout", "pytest-xdist"]

KERNEL_TESTS = ["ops", "operations", "components", "counts", "empirical_bayes", "stick_breaking"]
CELLS_TOOLS = ["huggingface-hub", "loompy", "requests"]
# Stock SCVI does not train from annbatch 0.3.
ANNBATCH = ["annbatch==0.2.2; python_version >= '3.12'", "dask[array]", "zarrs"]
CELLS_TESTS = ["scvi", "scvi_models", "scanvi", "markers", "novelty", "abundance"]
CELLS_TESTS += ["integrate", "integrate_on_disk", "integrate_columns", "cell_columns", "assign"]
CELLS_TESTS += ["prepare", "store", "elements", "formats", "reading", "report", "loading"]
CELLS_TESTS += ["folder", "proteins_on_disk", "sweep"]


def run(session, requirements, tests=(), build=(), **compilers):
    """Install one build of the package and run tests: those that find their packages, if ()."""
    options = [f"--config-settings={x}" for x in ("cmake.define.VMM_CUDA=OFF", *build)]
    session.install(*options, "-e", *requirements, *TOOLS, env=compilers)
    files = [f"tests/test_{name}.py" for name in tests]
    session.run(
        *("python", "-m", "pytest", "-n", "logical", "--dist", "worksteal", "-m", "not slow"),
        *(*session.posargs, *files),
        env={"OMP_NUM_THREADS": "1"},
    )


@nox.session(python=PYTHONS)
def core(session):
    """Test all but cells."""
    run(session, [".[cli]"])


@nox.session(name="core-oldest", python="3.10")
def core_oldest(session):
    """Test all but cells, with the oldest torch."""
    run(session, [".[cli]", *OLDEST])


@nox.session(python=PYTHONS[1:])
def cells(session):
    """Test models of scvi-tools and files of cells."""
    run(session, [".[cli,scvi]", *CELLS_TOOLS, *ANNBATCH], [*CELLS_TESTS, "annbatch"])


@nox.session(name="cells-oldest", python=PYTHONS[1:])
def cells_oldest(session):
    """Test cells with the oldest scvi-tools."""
    run(session, [".[cli,scvi]", *CELLS_TOOLS, *OLD_CELLS], CELLS_TESTS)


@nox.session
def clang(session):
    """Build the core with clang, whose warnings are errors, and test the operations."""
    build = ["cmake.define.CMAKE_COMPILE_WARNING_AS_ERROR=ON", "build-dir=build/clang"]
    run(session, [".[cli]"], KERNEL_TESTS, build, CC="clang", CXX="clang++")


@nox.session(name="no-openmp")
def no_openmp(session):
    """Build the core for one thread, and test the operations."""
    build = ["cmake.define.CMAKE_DISABLE_FIND_PACKAGE_OpenMP=ON", "build-dir=build/no-openmp"]
    run(session, [".[cli]"], KERNEL_TESTS, build)

# Each target does everything that a fresh machine with Python >= 3.10 and a C++ compiler needs: a
# virtual environment, the compiled package with its extras, the tools, the command.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin

# The install is editable: a change of Python code counts at once, a change of these installs again.
SOURCES := $(wildcard csrc/*) CMakeLists.txt constraints.txt pyproject.toml

.PHONY: constraints demo docs lint sanitize test test-slow types

demo: $(VENV)/.installed
	$(RUN)/vmm-fast demo --out demo-output

# As many processes as cores, what failed last time first; `make test ARGS="--lf -k kl"` adds options.
PYTEST := $(RUN)/python -m pytest -n logical --dist worksteal --failed-first

test: $(VENV)/.installed
	$(PYTEST) -m "not slow" $(ARGS)

# What a change needs less often: large shapes, long trainings, processes that are killed, all GPUs.
test-slow: $(VENV)/.installed
	$(PYTEST) -m slow $(ARGS)

# The site, in docs/_build/html; a link that leads nowhere, or any other warning, is an error.
docs: $(VENV)/.docs
	$(RUN)/python -m sphinx --fail-on-warning --keep-going --nitpicky --quiet docs docs/_build/html

# Style of all code; the hooks in .pre-commit-config.yaml mend most of it.
PYTHON_CODE := vmm_fast kernels tests bench docs examples noxfile.py
CXX_CODE := $(wildcard csrc/*) $(wildcard bench/*.cpp)

lint: $(VENV)/.tools
	$(RUN)/ruff check $(PYTHON_CODE)
	$(RUN)/ruff format --check $(PYTHON_CODE)
	$(RUN)/clang-format --dry-run --Werror $(CXX_CODE)

types: $(VENV)/.tools $(VENV)/.installed
	$(RUN)/mypy

# The versions that all extras resolve to, for each Python: after a change of those in pyproject.toml.
# This torch and this scvi-tools are the ones that the figures in bench/results were measured with.
# Left to itself, uv takes the newest mpmath, which only a pre-release of sympy allows.
constraints: $(VENV)/.installed
	printf 'torch==2.13.0\nscvi-tools==1.4.2\n' | $(RUN)/uv pip compile --quiet --no-config --universal \
		--python-version 3.10 --all-extras --prerelease disallow --constraint /dev/stdin --no-annotate \
		--custom-compile-command 'make constraints' --output-file constraints.txt pyproject.toml

# The tests of kernels and of loading states, on a core that stops at a bad address or at undefined
# behaviour. It lies in an environment of its own, so that nothing else imports it; packages are those
# of $(VENV). The sanitizer's runtime must be loaded before all else, with the library whose exceptions
# it follows.
SANITIZE := build/sanitize
SANITIZED := LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 \
	$(SANITIZE)/bin/python
KERNEL_TESTS := $(patsubst %,tests/test_%.py,ops components counts empirical_bayes stick_breaking)

sanitize: $(VENV)/.installed
	$(RUN)/python -m venv --clear --without-pip $(SANITIZE)
	$(RUN)/python -c 'import sys; print(*(p for p in sys.path if "site-packages" in p), sep="\n")' \
		> $$(echo $(SANITIZE)/lib/python*/site-packages)/borrowed.pth
	$(RUN)/python -m pip --python $(SANITIZE)/bin/python install --quiet --no-deps -e . \
		-C build-dir=build/sanitized -C cmake.define.VMM_SANITIZE=ON -C cmake.define.VMM_CUDA=OFF
	$(SANITIZED) -c 'import sys; from vmm_fast import _core; \
		sys.exit(not _core.__file__.startswith(sys.prefix) and f"the core is {_core.__file__}")'
	$(SANITIZED) -m pytest -p no:cacheprovider --capture=sys $(KERNEL_TESTS)
	$(SANITIZED) -m pytest -p no:cacheprovider --capture=sys tests/test_prior_states.py

$(VENV)/.tools: constraints.txt
	test -x $(RUN)/pip || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet -c constraints.txt clang-format mypy ruff
	touch $@

$(VENV)/.docs: $(SOURCES)
	test -x $(RUN)/pip || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

$(VENV)/.installed: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
		"Python >= 3.10 is needed, $(PYTHON) is older: make PYTHON=...")'
	test -x $(RUN)/pip || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

# `make demo` and `make test` do everything that a fresh machine with Python >= 3.10 and a C++
# compiler needs: a virtual environment, the compiled package with its extras, then the command.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin

# The install is editable: a change of Python code counts at once, a change of these installs again.
SOURCES := $(wildcard csrc/*) CMakeLists.txt constraints.txt pyproject.toml

.PHONY: demo sanitize test

demo: $(VENV)/.installed
	$(RUN)/vmm-fast demo --out demo-output

test: $(VENV)/.installed
	$(RUN)/python -m pytest

# The kernel tests on a core that stops at a bad address or at undefined behaviour. It lies in an
# environment of its own, so that nothing else imports it; packages are those of $(VENV). The
# sanitizer's runtime must be loaded before all else, with the library whose exceptions it follows.
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

$(VENV)/.installed: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
		"Python >= 3.10 is needed, $(PYTHON) is older: make PYTHON=...")'
	test -x $(RUN)/pip || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

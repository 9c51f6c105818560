# `make demo` and `make test` do everything that a fresh machine with Python >= 3.10 and a C++
# compiler needs: a virtual environment, the compiled package with its extras, then the command.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin

# The install is editable: a change of Python code counts at once, a change of these installs again.
SOURCES := $(wildcard csrc/*) CMakeLists.txt constraints.txt pyproject.toml

.PHONY: demo test

demo: $(VENV)/.installed
	$(RUN)/vmm-fast demo --out demo-output

test: $(VENV)/.installed
	$(RUN)/python -m pytest

$(VENV)/.installed: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
		"Python >= 3.10 is needed, $(PYTHON) is older: make PYTHON=...")'
	test -x $(RUN)/pip || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

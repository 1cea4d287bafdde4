# make demo | paper | observability | test | coverage | mutation | faults | fuzz | matrix | audit | check | bench | gpu | docs | clean
# PYTHON=python3.12 picks the interpreter of a new .venv; ARGS="-k ess -x" is passed on to pytest.

PYTHON ?= python3
ARGS ?=
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
DEV := $(VENV)/.installed
DOCS := $(VENV)/.installed-docs
AUDIT := $(VENV)/audit/bin/pip-audit
MUTMUT := $(VENV)/mutmut

# Its layers are read in the tests. Without its CUDA extension, and without what only that extension needs.
ifeq ($(shell uname),Linux)
MAMBA_SSM := MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE $(PIP) install --no-build-isolation --no-deps mamba-ssm==2.3.2.post1
endif

.DEFAULT_GOAL := help
.PHONY: help demo paper observability test coverage mutation faults fuzz matrix audit check bench gpu docs clean

help:
	@sed -n '1,2s/^# //p' Makefile

demo: $(DEV)
	$(BIN)/python examples/demo.py

# Every finding of the paper, and the page docs/paper/. What was run before is kept in runs/paper. Figures need Chromium.
paper: $(DEV)
	$(BIN)/python -m examples.paper --page docs/paper $(ARGS)

observability: $(DEV)
	$(BIN)/python examples/observability.py

# A file's tests stay in one process, so that what they share is made once; tests/conftest.py says which file begins.
# WORKERS=0 runs all in this process.
DISTRIBUTED := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(DEV)
	$(BIN)/python -m pytest $(DISTRIBUTED) $(ARGS)

# Lines and branches; takes half as long again.
coverage: $(DEV)
	$(BIN)/python -m pytest $(DISTRIBUTED) --cov --cov-report=term $(ARGS)

# A quarter of an hour. mutmut has a folder of its own, so that its dependencies are none of ours.
mutation: $(DEV) $(MUTMUT)
	PYTHONPATH=$(CURDIR)/$(MUTMUT) $(BIN)/python .ci/mutation.py $(ARGS)

faults: $(DEV)
	$(BIN)/python -m tests.faults

# Many more inputs than the suite's, for what reads from outside.
fuzz: $(DEV)
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest tests/fuzz --hypothesis-show-statistics $(ARGS)

# Needs the internet and 4 GB below build/. Half a minute a version; ARGS="--lowest" takes four, ARGS="--only 5.6" one.
matrix: $(DEV)
	$(BIN)/python .ci/matrix.py $(ARGS)

# Needs the internet. pip-audit has an environment of its own, so that its dependencies are none of ours.
audit: $(DEV) $(AUDIT)
	$(BIN)/python .ci/audit.py --pip-audit $(AUDIT)

# mypy reaches integrations/ through the link ess_monitor/integrations, so that each file has one module name.
check: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy ess_monitor
	$(BIN)/codespell
	$(BIN)/python -m pytest --quiet tests/test_architecture.py tests/test_packaging.py -k "not build"

bench: $(DEV)
	$(BIN)/python -m benchmarks

gpu: $(DEV)
	$(BIN)/python -m benchmarks.gpu_check $(ARGS)

# Without the variable the theme prints its vendor's announcements into every build.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# torch comes first and alone, at its exact version: only then is a CPU build found beside the package index preferred.
$(DEV): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install "$$(grep '^torch==' constraints.txt)"
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	$(MAMBA_SSM)
	touch $@

$(AUDIT):
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip --quiet --disable-pip-version-check install pip-audit==2.10.1

$(MUTMUT):
	$(PIP) install --target $@ mutmut==3.8.1

$(DOCS): $(DEV)
	$(PIP) install --constraint constraints.txt --editable '.[docs]'
	touch $@

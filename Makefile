# Each target sets up what it needs in .venv; none needs another to have run. Needs Python >= 3.11, git and make.
# On a machine without a GPU, a CPU build of torch that .venv already holds is kept: no CUDA libraries are fetched.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-fast test-soak check clean

FAMILY ?= llava
PYTHONS ?= python3 python3.14 python3.13 python3.12 python3.11
# Two processes share the files of tests: most of the time goes into starting programs and waiting for ranks.
PYTEST := .venv/bin/python -m pytest --numprocesses 2 --dist loadfile
PIP_INSTALL := .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' Makefile

quickstart: .venv/installed ## draw data, train a tiny model on 2 cores, export it, caption pictures (FAMILY=llava)
	.venv/bin/python examples/quickstart/run.py --family $(FAMILY)

test: .venv/installed ## all tests but the soaks
	$(PYTEST) -m "not soak"

test-soak: .venv/installed ## what shows a race only when it is repeated hundreds of times
	.venv/bin/python -m pytest -m soak

test-fast: .venv/installed ## the tests that are not slow
	$(PYTEST)

check: .venv/installed ## style, types and the import contracts
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports

clean: ## remove the environment and the caches; runs/ stays
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist megamm.egg-info
	find megamm tests examples tools data_tools -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so that an interrupted installation is taken up again. torch and setuptools come first:
# with them in place, nothing that follows chooses another build of torch, and none builds in an environment of its own.
.venv/installed: pyproject.toml constraints.txt
	@for python in $(PYTHONS); do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "error: none of $(PYTHONS) is Python >= 3.11; name one: make PYTHONS=/path/to/python" >&2; exit 1; fi; \
	echo "setting up .venv with $$($$found --version); the downloads may take some minutes"; \
	$$found -m venv .venv
	$(PIP_INSTALL) torch setuptools
	$(PIP_INSTALL) --no-build-isolation --editable '.[test,dev]'
	@touch $@

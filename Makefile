# Each target makes the virtual environment .venv and installs what it needs; run any of them on a fresh clone.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-fast test test-peers check bench clean

demo: .venv/.installed        ## the whole pipeline on the bundled model, offline, in less than five minutes on 2 cores
	$(BIN)/mistudio demo --workspace workspace/demo --resume

demo-fast: .venv/.installed   ## the same in its shortest form, under a minute
	$(BIN)/mistudio demo --fast --workspace workspace/demo-fast --resume

test: .venv/.installed-dev    ## the tests
	$(BIN)/python -m pytest -n auto --dist loadfile

test-peers: .venv/.installed-dev .venv-peers/.installed   ## SAEs exchanged with SAELens, in its own environment
	$(BIN)/python -m pytest tests/test_formats_saelens.py

check: .venv/.installed-dev   ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/.installed-dev .venv-peers/.installed workspace/demo/summary.json   ## the benchmarks; each prints ratios measured in one run
	for script in $(filter-out benchmarks/quality.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done
	$(BIN)/python benchmarks/quality.py --small

workspace/demo/summary.json:
	$(MAKE) demo

clean:
	rm -rf .venv .venv-peers workspace

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/.installed-dev: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ .venv/.installed

.venv-peers/.installed: Makefile
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet 'torch>=2.6,<2.14'
	.venv-peers/bin/python -m pip install --quiet 'sae-lens==6.54.12'
	.venv-peers/bin/python -m pip install --quiet --no-deps 'dictionary-learning==0.1.0'  # its pins are of other times; only its trainers are used
	-.venv-peers/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

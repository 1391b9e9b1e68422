# Two commands do everything: `make run` and `make test`. Both make the environment first; a second call finds it made.
#
#   PYTHON   interpreter for a new environment; default: python3, or the newest of python3.10 to python3.13
#   TORCH    what pip installs as PyTorch, before and apart from everything else
#   VOLUME   what `make run` begins with, a file or a DICOM folder; default: a sample
#   PORT     where `make run` listens on this machine; 0: a free one
#   OUTPUT   where `make demo` writes

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PORT ?= 8080
OUTPUT ?= output
# The current torch where there is a GPU, else the version that the tests ran with. Which build of it, with CUDA or
# without, is up to pip's index (see README).
TORCH ?= $(if $(shell nvidia-smi -L 2>/dev/null),torch,torch==2.13.0)
export PYTHON TORCH

BIN := .venv/bin

.PHONY: help run demo test lint check unit test-view format environment environment-test environment-view \
    environment-test-view clean

help:  ## these lines
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 24

run: environment-view  ## segment in a browser, on http://localhost:8080: a sample volume and the shipped bundle; Ctrl+C ends it
	.venv-viewer/bin/ka2ersegment view $(if $(VOLUME),"$(VOLUME)",--sample) --port $(PORT)

demo: environment  ## segment the sample without a browser; mask and picture go to OUTPUT
	$(BIN)/ka2ersegment demo --output $(OUTPUT)

test: lint check unit test-view  ## linters, type check, import contracts, all tests

lint: environment-test  ## ruff format and ruff check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

check: environment-test  ## mypy and the import contracts
	$(BIN)/mypy --strict KA2ERSegment KA2ERViewer
	$(BIN)/lint-imports

# A process for each core, one thread each (Testing/conftest.py).
unit: environment-test  ## pytest, all but the viewer
	$(BIN)/python -m pytest --ignore Testing/viewer --numprocesses logical --maxprocesses 4 --dist worksteal

test-view: environment-test-view  ## pytest of the viewer, in its own environment and a real browser
	.venv-viewer/bin/python -m pytest Testing/viewer

format: environment-test  ## format the code and repair what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

environment: .venv/.made-for-demo  ## .venv with what `make demo` needs

environment-test: .venv/.made-for-test  ## .venv with what `make test` needs

environment-view: .venv-viewer/.made-for-run  ## .venv-viewer with what `make run` needs

# After .venv, of which it takes what it can.
environment-test-view: environment-test .venv-viewer/.made-for-test-view  ## .venv-viewer with what `make test-view` needs

.venv/.made-for-%: pyproject.toml .ci/environment
	.ci/environment $*

.venv-viewer/.made-for-%: pyproject.toml .ci/environment
	.ci/environment $*

clean:  ## remove the environment and all caches
	rm -rf .venv .venv-viewer .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist

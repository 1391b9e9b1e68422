# Two commands do everything: `make run` and `make test`. Both make the environment first; a second call finds it made.
#
#   PYTHON   interpreter for a new environment; default: python3, or the newest of python3.10 to python3.13
#   TORCH    what pip installs as PyTorch, before and apart from everything else
#   OUTPUT   where `make run` writes
#   VOLUME   what `make view` begins with; default: a sample

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

OUTPUT ?= output
# The current torch where there is a GPU, else the version that the tests ran with. Which build of it, with CUDA or
# without, is up to pip's index (see README).
TORCH ?= $(if $(shell nvidia-smi -L 2>/dev/null),torch,torch==2.13.0)
export PYTHON TORCH

BIN := .venv/bin

.PHONY: help run view test test-view lint check unit format environment environment-test environment-view clean

help:  ## these lines
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

run: environment  ## segment a structure in a real sample volume with the shipped bundle
	$(BIN)/ka2ersegment demo --output $(OUTPUT)

view: environment-view  ## segment in a browser: Slicer's views in a page of this machine
	.venv-viewer/bin/ka2ersegment view $(if $(VOLUME),"$(VOLUME)",--sample)

test: lint check unit  ## linters, type check, import contracts, all tests

lint: environment-test  ## ruff format and ruff check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

check: environment-test  ## mypy and the import contracts
	$(BIN)/mypy --strict KA2ERSegment KA2ERViewer
	$(BIN)/lint-imports

unit: environment-test  ## pytest
	$(BIN)/python -m pytest

test-view: environment-view  ## the viewer in a real browser, in its own environment
	.venv-viewer/bin/python -m pytest Testing/viewer

format: environment-test  ## format the code and repair what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

environment: .venv/.made-for-run  ## .venv with what `make run` needs

environment-test: .venv/.made-for-test  ## .venv with what `make test` needs

environment-view: .venv-viewer/.made-for-view  ## .venv-viewer with what `make view` and `make test-view` need

.venv-viewer/.made-for-view: pyproject.toml .ci/environment
	.ci/environment view

.venv/.made-for-run: pyproject.toml .ci/environment
	.ci/environment run

.venv/.made-for-test: pyproject.toml .ci/environment
	.ci/environment test

clean:  ## remove the environment and all caches
	rm -rf .venv .venv-viewer .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist

# Every verb sets up first; `make help` lists them. Settings are given as NAME=value after the verb.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
# Further words for pip where it installs torch, such as --index-url of the CPU builds (pytorch.org names it).
TORCH_PIP ?=
# Further words for the command itself: make demo ARGS="concept=ship seed=3"
ARGS ?=

PY := $(VENV)/bin/python
# The stamp is named after what was installed from, so a fresh checkout's file dates cost nothing and a changed pin is noticed.
KEY := $(shell { cat pyproject.toml constraints.txt; echo $(EXTRAS); } | cksum | tr ' ' '-')
STAMP := $(VENV)/.setup-$(KEY)

.DEFAULT_GOAL := help
.PHONY: help setup demo test slow check bench train sweep report

help: ## list these verbs
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install everything under the tested versions (PYTHON=python3.11 picks the interpreter)

$(STAMP):
	@test -x $(PY) || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing torch, the large part (minutes the first time)"
	@$(PY) -m pip install --quiet -c constraints.txt $(TORCH_PIP) torch torchvision
	@echo "installing realera and what else it needs"
	@$(PY) -m pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	@rm -f $(VENV)/.setup-*
	@touch $@

demo: setup ## erase "airplane" from the built-in model: nothing to download, ends by naming the page to open
	$(PY) -m realera.train task=object concept=airplane backbone=mini $(ARGS)

test: setup ## run the tests (seconds each, no network, no GPU)
	$(PY) -m pytest -m "not slow" $(ARGS)

slow: setup ## run the slow tests as well: builds the wheel, runs whole erasures
	$(PY) -m pytest $(ARGS)

check: setup ## lint, format check and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: setup ## measure the built-in model and its judge against the bars in its card
	$(PY) -m realera.miniature.check $(ARGS)

train: setup ## erase a concept: make train ARGS='task=object concept=ship method=uce'
	$(PY) -m realera.train $(ARGS)

sweep: setup ## several runs: make sweep ARGS='task=object concept=ship method.neighbours.m=1,5,10'
	$(PY) -m realera.train -m $(ARGS)

report: setup ## one page of one run or of several: make report ARGS='runs/...'
	$(PY) -m realera.report $(ARGS)

# Every verb sets up first; `make help` lists them. Settings are given as NAME=value after the verb.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
VENV ?= .venv
# The extras of pyproject.toml that are installed: EXTRAS=dev,build
comma := ,
EXTRAS ?= dev$(if $(filter card,$(MAKECMDGOALS)),$(comma)build)$(if $(filter docs,$(MAKECMDGOALS)),$(comma)docs)
# Further words for pip where it installs torch, such as --index-url of the CPU builds (pytorch.org names it).
TORCH_PIP ?=
# Further words for the command itself: make demo ARGS="concept=ship seed=3"
ARGS ?=

PY := $(VENV)/bin/python
# The stamp is named after what was installed, so a fresh checkout's file dates cost nothing and a changed pin is noticed.
KEY := $(shell cat pyproject.toml constraints.txt | cksum | tr ' ' '-')
STAMP := $(VENV)/.setup-$(KEY)-$(subst $(comma),-,$(EXTRAS))
# Of pip's lines those that say how far it is: a package each, and the unpacking, which is silent for a minute or two.
INSTALL := $(PY) -m pip install --progress-bar off -c constraints.txt
SHOW := sed -nuE -e 's/^ *(Downloading|Using cached|Processing) (.*\/)?([^/ ]+)( \([0-9][^)]*\))?.*/  \3\4/p' -e 's/^Installing.*/  unpacking/p'

.DEFAULT_GOAL := help
.PHONY: help setup demo test slow check docs bench card train sweep report

help: ## list these verbs
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install everything under the tested versions (PYTHON=python3.11 picks the interpreter)

# The stamp comes last: after a set-up that was stopped, the same verb goes on. What pip was just unpacking has no RECORD.
$(STAMP):
	@$(PY) -m pip --version > /dev/null 2>&1 || { $(MAKE_VENV); }
	@find $(VENV)/lib -name '*.dist-info' ! -exec test -e {}/RECORD \; -prune -exec rm -r {} +
	@echo "installing torch, the large part: about 3 GB to download and 6 GB on the disk, minutes the first time"
	@$(INSTALL) $(TORCH_PIP) torch torchvision | $(SHOW)
	@echo "installing realera and what else it needs: about 120 packages"
	@$(INSTALL) -e '.[$(EXTRAS)]' | $(SHOW)
	@find $(VENV) -maxdepth 1 -name '.setup-*' ! -name '.setup-$(KEY)-*' -delete
	@touch $@

define MAKE_VENV
say() { echo "error: $$*" >&2; exit 2; }; \
command -v $(PYTHON) > /dev/null || say "there is no $(PYTHON) here: install Python 3.10-3.13, or name one: make PYTHON=python3.11"; \
$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
	|| say "$$($(PYTHON) --version 2>&1) is not one of 3.10-3.13: name another, as in make PYTHON=python3.11"; \
free=$$(df -Pk . | awk 'NR == 2 {print int($$4 / 1e6)}'); \
test -n "$(TORCH_PIP)" -o "$${free:-99}" -ge 8 || echo "warning: $$free GB are free here and 8 may be needed" >&2; \
echo "making $(VENV) with $$($(PYTHON) --version 2>&1)"; \
$(PYTHON) -m venv $(VENV) > /dev/null 2>&1; \
$(PY) -m pip --version > /dev/null 2>&1 \
	|| say "$(PYTHON) -m venv $(VENV) makes no environment with pip: install python3-venv (Debian, Ubuntu), remove $(VENV) and try again"
endef

demo: setup ## erase "airplane" from the built-in model: nothing to download, ends by naming the page to open
	@echo "erasing \"airplane\" from the built-in model: two minutes on two cores"
	$(PY) -m realera.train task=object concept=airplane backbone=mini $(ARGS)

test: setup ## run the quick tests (about four minutes on two cores, no network, no GPU)
	@echo "running the quick tests, a worker a core: about four minutes on two cores"
	$(PY) -m pytest -m "not slow" $(ARGS)

slow: setup ## run the slow tests as well: builds the wheel, runs whole erasures
	$(PY) -m pytest $(ARGS)

check: setup ## lint, format check and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy --config-file tests/mypy.ini tests $(wildcard experiments/*.py experiments/*/*.py)

docs: setup ## build the documentation site in site/; broken links are errors
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict
	@echo "page to open: site/index.html"

bench: setup ## ratios of speed against plain code and diffusers on this CPU (makes a model of 4.3 GB once)
	PYTHON=$(PY) experiments/bench/run.sh

card: setup ## measure the built-in model and its judge against the bars in its card (needs npm, and the extra build)
	$(PY) -m realera.miniature.check $(ARGS)

train: setup ## erase a concept: make train ARGS='task=object concept=ship method=uce'
	$(PY) -m realera.train $(ARGS)

sweep: setup ## several runs: make sweep ARGS='task=object concept=ship method.neighbours.m=1,5,10'
	$(PY) -m realera.train -m $(ARGS)

report: setup ## one page of one run or of several: make report ARGS='runs/...'
	$(PY) -m realera.report $(ARGS)

# Two commands: `make book` and `make test`. Everything runs from this folder, and every path is relative or quoted, so
# the folder may lie below a directory with a space in its name. Works with GNU make 3.81 (macOS) and later.

.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
.PHONY: help env book pages test train runs claims confirm stale refresh lab lint fuzz bench pdf diff clean

PYTHON  ?= python3
VENV    ?= .venv
PROFILE ?=
ONLY    ?=
ARGS    ?= --log-file v10_log.jsonl --epochs 30 --init-rank 64 --min-rank 8 --d-model 512
PY       = "$(VENV)/bin/python"
MORE     = $(if $(filter command line,$(origin ARGS)),$(ARGS))

ifeq ($(strip $(VENV)),)
$(error VENV is empty: activate the conda environment first, or leave VENV out)
endif
export PYTHON VENV
# The kernel `python3` is the environment's own, whatever kernels lie in the home folder.
export JUPYTER_PREFER_ENV_PATH := 1

# Notebooks run in notebooks/, everything else here: a relative ALR_DATA is made absolute once.
ifneq ($(strip $(ALR_DATA)),)
override ALR_DATA := $(or $(shell cd "$(ALR_DATA)" && pwd),$(error ALR_DATA is "$(ALR_DATA)", which is no folder))
export ALR_DATA
endif

help: ## this list
	@echo "Adaptive low-rank training: a library (alr/) and the book about it (notebooks/, book/)."
	@echo
	@awk 'BEGIN {FS = ":.*## "} /^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  PYTHON=python3.12          the interpreter of a new .venv"
	@echo "  VENV=\"\$$CONDA_PREFIX\"      use that environment instead of making .venv"
	@echo "  PROFILE=cpu                for book and pdf: minutes a chapter; full: the original's sizes, for a GPU"
	@echo "  ONLY=10_v10                for refresh and test: one notebook"
	@echo "  BOOK_URL=https://...       for book and pages: where you publish them, so that shared links show title and picture"
	@echo "  ALR_DATA=folder            holds wikitext-2/ and tinyshakespeare/, if you have them"

env:
	@sh book/env.sh

book: env ## run the stale notebooks (ARGS=--all: every one), build the HTML book; goes on where it was cut off
	@$(PY) book/notebooks.py run --profile "$(PROFILE)" $(MORE)
	@$(PY) book/build.py html --profile "$(PROFILE)"

pages: env ## the HTML book from the notebooks' committed outputs, none of them run: about a minute
	@$(PY) book/build.py html --stored

test: env ## unit tests, then nbval of the tour and of stale notebooks (ONLY=10_v10: that one; ARGS=--all: every one, as CI)
	@TQDM_DISABLE=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile tests
	@$(PY) book/notebooks.py check $(ONLY) $(MORE)

train: env ## the original's training command, on wiki.train.tokens or else on Python's own manual (ARGS="...")
	@set --; \
	case " $(ARGS) " in *" --data-file"*|*" --corpus"*) ;; *) \
	    set -- --corpus pydoc; \
	    for file in wiki.train.tokens data/cache/wikitext-2/wiki.train.tokens \
	            "$$ALR_DATA/wikitext-2/wiki.train.tokens"; do \
	        if [ -f "$$file" ]; then set -- --data-file "$$file"; break; fi; \
	    done; \
	    [ "$$1" = --data-file ] || echo "wiki.train.tokens is not here, in data/cache/wikitext-2 or in ALR_DATA:" \
	        "training on the text that comes with Python instead (--corpus pydoc)."; \
	esac; \
	echo python -m alr.train "$$@" $(ARGS); \
	$(PY) -m alr.train "$$@" $(ARGS)

runs: env ## record a suite of runs: make runs SUITE=evolution (ARGS=--dry-run says what it would do)
	@if [ ! -f "data/suites/$(SUITE).toml" ]; then \
	    echo "make runs SUITE=NAME, where NAME is one of:"; ls data/suites 2>/dev/null | sed -n 's/\.toml$$//p'; exit 2; \
	fi
	@$(PY) -m alr.sweep "data/suites/$(SUITE).toml" $(MORE)

claims: env ## recompute every claim of the book from the recorded runs into data/claims.json
	@$(PY) -m alr.claims

diff: env ## the claims that left their old interval: make diff OLD=<tag or commit>
	@if [ -z "$(OLD)" ]; then echo "make diff OLD=<tag or commit>"; exit 2; fi
	@$(PY) -m alr.claims --diff "$(OLD)"

confirm: env ## your own runs against the book's, one log per seed: make confirm SUITE=equal_shakespeare MINE="a.jsonl b.jsonl"
	@if [ -z "$(MINE)" ] || [ -z "$(SUITE)" ]; then \
	    echo 'make confirm SUITE=equal_shakespeare MINE="a.jsonl b.jsonl": finished logs of python -m alr.train, one per seed'; \
	    exit 2; \
	fi
	@$(PY) -m alr.claims --suite "$(SUITE)" --mine $(MINE)

stale: env ## the notebooks whose stored outputs come from other code, data or pins than today's
	@$(PY) book/notebooks.py stale

refresh: env ## run the stale notebooks in place (ONLY=10_v10: that one; ARGS=--all: every one) and stamp them
	@$(PY) book/notebooks.py refresh $(ONLY) $(MORE)

lab: env ## open the notebooks in JupyterLab (installed on the first call, pinned)
	@$(PY) -c 'import jupyterlab' 2>/dev/null || \
	    $(PY) -m pip install --disable-pip-version-check -c constraints.txt -e ".[lab]"
	@if [ "$$(id -u)" = 0 ]; then set -- --allow-root; else set --; fi; $(PY) -m jupyterlab "$$@" notebooks

lint: env ## ruff over alr/, book/, notebooks/ and tests/ (ARGS=--fix mends what is safe to mend)
	@$(PY) -m ruff check $(MORE) alr book notebooks tests

fuzz: env ## odd flags, texts, recipes, suites, records, checkpoints; kills (ARGS=600: seconds a kind; FUZZ_KILLS=100: at least)
	@FUZZ_SECONDS="$(or $(MORE),120)" FUZZ_SEED="$$(date +%s)" TQDM_DISABLE=1 \
	    $(PY) -m pytest tests/test_fuzz.py

bench: env ## time the resizes, the rank checks and the layer against their references (pytest-benchmark)
	@set -- tests/bench_*.py; \
	if [ ! -f "$$1" ]; then echo "no tests/bench_*.py to run"; exit 1; fi; \
	$(PY) -m pytest -o python_functions="bench_*" --benchmark-only --benchmark-columns=min,median,iqr,rounds "$$@"

pdf: env ## the book as one PDF, by Chromium or Chrome (ARGS=--stored: none run, as in pages; ARGS=--all: every one)
	@case " $(MORE) " in *" --stored "*) ;; *) $(PY) book/notebooks.py run --profile "$(PROFILE)" $(MORE) ;; esac
	@$(PY) book/build.py pdf --profile "$(PROFILE)" $(filter --stored,$(MORE))

clean: ## remove everything built; the environment (.venv) and downloaded corpora (data/cache) stay
	rm -rf _build .pytest_cache .ruff_cache .hypothesis .benchmarks
	find alr book notebooks tests -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
	find notebooks -name .ipynb_checkpoints -prune -exec rm -rf {} + 2>/dev/null || true

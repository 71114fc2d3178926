# `make help` says what there is. Every target sets up .venv by itself, once.
PYTHON ?= python3
ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
else
BIN := .venv/bin
endif
PY := $(BIN)/python

# Notebooks run two at a time, so each gets one thread: two threads each would fight over two cores.
export OMP_NUM_THREADS = 1
export MKL_NUM_THREADS = 1
export PYDEVD_DISABLE_FILE_VALIDATION = 1

.DEFAULT_GOAL := help
.PHONY: help env run test lab learn swap bench save clean

help:
	@echo "make run    run every chapter from top to bottom and print the ladder of results"
	@echo "make test   run every check: notebooks and library in step, chapters as tests, pytest"
	@echo "make lab    read the course in JupyterLab, starting at the index"
	@echo "make learn  exercises: how far you are, and the next ones; or those of a chapter: make learn NB=04"
	@echo "make swap   your solutions in place of the library's, in the chapters that use them: make swap NB=04"
	@echo "make bench  measure the library against its peers, side by side: docs/benchmarks.md says how"
	@echo "make save   for authors: export, run and save all chapters, or some: make save NB='02 05'"
	@echo "make clean  remove .venv and everything the other targets made"

env:
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "There is no '$(PYTHON)' here. Install Python 3.11.4 or newer, or name one: make run PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) tools/env.py

run: env
	@$(PY) tools/run.py

test: env
	$(BIN)/nbdev_test --n_workers 2
	$(PY) -m pytest tests

lab: env
	$(BIN)/jupyter lab nbs/index.ipynb

learn: env
	@$(PY) tools/exercises.py learn $(NB)

swap: env
	@$(PY) tools/exercises.py swap $(NB)

bench: env
	@$(PY) tools/bench.py

save: env
	@$(PY) tools/run.py --save $(NB)

clean:
	rm -rf .venv _run _docs _bench build dist *.egg-info .pytest_cache .hypothesis

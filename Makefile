# Each target sets up .venv by itself if need be: `make demo` and `make test` work in a fresh clone.
# Windows: README.md has the same commands without make.

PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.installed
SETUP_DEV := .venv/.installed-dev
LESSONS := $(filter-out k00_%,$(sort $(basename $(notdir $(wildcard kernels/k[0-9][0-9]_*.py)))))

.PHONY: help setup demo test test-gpu check format lesson bench plots readme clean

help:           ## list the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

setup: $(SETUP) ## create .venv with the tested versions of everything

demo: $(SETUP)  ## quantize the model that ships with the project, and show what that did to it
	$(BIN)/python quantize.py demo
	@echo
	$(BIN)/python eval.py demo

test: $(SETUP_DEV) ## run the tests (MINIGPT_DATA=FOLDER adds those that need WikiText-2 and GPT-2's vocabulary)
	$(BIN)/python -m pytest

test-gpu:       ## run the tests on this machine's GPU, with the python that runs this (PYTHON=...)
	$(PYTHON) -c "import torch; assert torch.cuda.is_available(), 'torch sees no GPU here'"
	PYTHONPATH=. $(PYTHON) -m pytest

check: $(SETUP_DEV) ## linter, formatter, type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(SETUP_DEV) ## let ruff format and mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lesson: $(SETUP) ## check a lesson against the reference: make lesson K=04
	@[ -n "$(wildcard kernels/k$(K)_*.py)" ] || { echo "there is no lesson K=$(K), but: k00_reference $(LESSONS)"; exit 2; }
	$(BIN)/python -m kernels.$(basename $(notdir $(wildcard kernels/k$(K)_*.py)))

bench: $(SETUP) ## measure all lessons, and the matmul over shapes, on this machine's GPU, into results/
	@for lesson in $(LESSONS); do \
		$(BIN)/python -m kernels.$$lesson --bench --json results/$$lesson.json || left_out="$$left_out $$lesson"; done; \
	[ -z "$$left_out" ] || echo "not measured:$$left_out (lessons 12, 15, 22 and 23 need a Hopper GPU, 17, 18, 20 and 21 sm_80)"
	$(BIN)/python -m kernels.bench matmul --peers
	$(BIN)/python -m kernels.bench matmul --shapes gpt2 --tokens 1 --group-sizes 128 64 --modes w4a16 \
		--json results/matmul_gpt2.json
	$(BIN)/python -m kernels.bench quantization
	$(BIN)/python -m minigpt.bench decode
	$(BIN)/python -m minigpt.bench profile

plots: $(SETUP_DEV) ## draw the pictures in results/ anew
	$(BIN)/python -m kernels.bench plots
	$(BIN)/python -m minigpt.bench plots
	$(BIN)/python -m minigpt.plots

readme: $(SETUP) ## write the tables of README.md and kernels/README.md anew from results/
	$(BIN)/python tools/readme.py

clean:          ## remove .venv and checkpoints/
	rm -rf .venv checkpoints

$(SETUP): requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	@echo "installing torch and a few others into .venv: 1 to 5 GB, a minute or more"
	$(BIN)/pip install --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

$(SETUP_DEV): $(SETUP) requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

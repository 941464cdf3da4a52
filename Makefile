# Everything a developer or CI runs. `make` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3# interpreter that makes .venv, 3.11 or newer
TORCH_INDEX ?= auto# extra package index for torch; auto: https://download.pytorch.org/whl/cpu on Linux without an NVIDIA driver, else none; empty: none
MODEL ?=# serve: directory or hub id of the base model; empty: the embedded demo base and its tenants' adapters
PORT ?= 50051# serve: port, 0 picks a free one
STORE ?=# serve: where adapters are kept; empty: .loramux, for the demo base .loramux-demo
WEIGHTS ?= nf4# serve: nf4, bf16 or fp32
ARGS ?=# further arguments of serve, demo, test and bench

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo
PINS := pyproject.toml demo/pyproject.toml constraints.txt
TRITON := 3.6.0# what the torch of the GPU tests comes with
TRITON_DIR := .triton/$(TRITON)
BUF := npx --yes @bufbuild/buf@1.75.0

# Idle OpenMP threads that spin starve the other process of a small machine; must be set before torch is imported.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help setup demo serve test test-triton lint format types protos protos-check protos-lint bench sdk-floor ci clean

help: ## List the targets and variables
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1|\2/' | column -t -s '|'
	@echo
	@grep -hE '^[A-Z_]+ \?=.*# ' $(MAKEFILE_LIST) | sed -E 's/^([A-Z_]+) \?= ?([^#]*)# ?(.*)/  \1=\2|\3/' | column -t -s '|'

setup: $(STAMP) ## Make .venv with server, trainer, SDK, demo and developer tools (once; again when the pins change)

$(STAMP): $(PINS)
	$(call install,dev)
	@touch $(DEMO_STAMP) $@

# The demo and the server need no developer tools, and do not bring them into a fresh .venv.
$(DEMO_STAMP): $(PINS)
	$(call install,demo)
	@touch $@

define install
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  || { echo "setup needs Python 3.11 or newer as $(PYTHON): install it, or name another one with PYTHON=python3.12" >&2; exit 1; }
@$(PYTHON) .ci/install.py $(1) --venv $(VENV) --torch-index "$(TORCH_INDEX)"
endef

demo: $(DEMO_STAMP) ## Show everything on this machine's CPU: sets up what is missing, runs for minutes, ends by itself
	@$(BIN)/python -m loramux_demo.tour $(ARGS)

serve: $(DEMO_STAMP) ## Serve on 127.0.0.1:PORT: MODEL, or the demo base with three tenants' adapters
ifeq ($(strip $(MODEL)),)
	@$(BIN)/python -m loramux_demo.serve --port "$(PORT)" --store "$(or $(STORE),.loramux-demo)" $(ARGS)
else
	$(BIN)/loramux-server serve --model "$(MODEL)" --weights "$(WEIGHTS)" --store "$(or $(STORE),.loramux)" --port "$(PORT)" $(ARGS)
endif

test: $(STAMP) ## Run all tests that need no GPU; needs no network, weights or fixed port
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest $(ARGS)

test-triton: $(STAMP) ## Run the Triton kernels in Triton's interpreter, which needs no GPU (Linux)
	@test -d $(TRITON_DIR)/triton \
	  || $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --target $(TRITON_DIR) triton==$(TRITON)
	PYTHONPATH=$(TRITON_DIR) OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
	  $(BIN)/python -m pytest tests/unit/kernels/test_triton_interpreter.py $(ARGS)

lint: $(STAMP) ## Check style, formatting and import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

format: $(STAMP) ## Format the sources and fix what can be fixed by itself
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

types: $(STAMP) ## Check types, strictly
	$(BIN)/mypy

protos: ## Generate client/loramux/v1 from protos/
	PYTHON=$(PYTHON) protos/generate.sh

protos-check: ## Fail if client/loramux/v1 is not what protos/ gives
	@PYTHON=$(PYTHON) protos/check.sh

protos-lint: ## Lint protos/ with buf (needs npx)
	@command -v npx >/dev/null \
	  || { echo "protos-lint needs npx, which comes with Node.js 18 or newer (apt-get install npm, brew install node)" >&2; exit 1; }
	cd protos && $(BUF) lint

bench: $(STAMP) ## Print throughput and latency on this machine's CPU
	$(BIN)/python bench/serve.py $(ARGS)

sdk-floor: $(STAMP) ## Build both wheels; install the SDK's alone with the lowest and the newest grpcio and protobuf
	$(BIN)/python .ci/sdk_floor.py

ci: lint types protos-lint protos-check sdk-floor test-triton test ## Everything that a change has to pass

clean: ## Remove what the targets above made
	rm -rf $(VENV) .protos-venv .triton build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

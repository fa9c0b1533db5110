# make demo | make test: each sets everything up on a fresh machine (python >= 3.11 with venv) and runs.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
ARGS ?=

.PHONY: venv demo test soak kill lint format clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/pip || { $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && $(PYTHON) -c 'import ensurepip' 2>/dev/null; } || \
	  { echo "error: python 3.11 or newer with its venv module is needed; $(PYTHON) is: $$($(PYTHON) --version 2>&1 | head -n 1). Try: make PYTHON=python3.12 (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: .venv holds $$($(BIN)/python --version 2>&1); python 3.11 or newer is needed. Remove .venv and run make again"; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/dreamer demo $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

soak: $(STAMP) # ten minutes of play in a headless Chromium: memory must stay flat
	DREAMER_SOAK_SECONDS=600 $(BIN)/python -m pytest -s tests/player/test_page.py -k long_play $(ARGS)

kill: $(STAMP) # kills every stage of a small run at many moments, and compares what it ends with
	$(BIN)/python tests/training/kills.py $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright -p pyproject.toml

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: # what was made by tools; runs/ holds your work and stays
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find dreamer tests -name __pycache__ -type d -prune -exec rm -rf {} +

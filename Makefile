# make demo   set up, pre-train a small Pixio on rendered scenes, and measure what it learned (CPU or GPU)
# make test   set up and run all tests          make lint   set up and check style, types, links
# make docs-check   run the commands of README.md and docs/ on rendered data
# PYTHON=python3.12 make ...   create the environment with this interpreter

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint docs-check
demo: .venv/installed
	$(BIN)/python demo.py

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_docs.py

docs-check: .venv/installed
	$(BIN)/python tests/docs_check.py

.venv/installed: requirements.txt setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Pixio needs Python >= 3.10, but $(PYTHON) is $$($(PYTHON) --version); set PYTHON=python3.12, say" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[all,dev]'
	touch $@

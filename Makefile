PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Given to every pip call, build environments included.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt

.PHONY: install demo test lint bench docs fuzz soak clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

demo: install
	$(BIN)/python -m benchmarks.demo $(if $(DATA),--data "$(DATA)") $(DEMO_ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

bench: install
	for work in linear lm nlu step report; do $(BIN)/python -m benchmarks $$work --preset quick || exit $$?; done

docs: install
	$(BIN)/python -m mkdocs build

# Minutes each; the test suite runs a small share of both.
fuzz: install
	$(BIN)/python -m tests.fuzz

soak: install
	$(BIN)/python -m tests.fuzz.soak
	$(BIN)/python -m tests.fuzz.kills

clean:
	rm -rf $(VENV) build *.egg-info

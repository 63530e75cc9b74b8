# make demo   install into .venv, then the whole way on the built-in toy suite: pre-train, average,
#             zero-shot, few-shot
# make test   install into .venv, then lint, types, import contracts and all tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint install clean

demo: install
	$(BIN)/python launch/pretrain.py launch/recipes/demo/mhr.yaml
	$(BIN)/python launch/pretrain.py launch/recipes/demo/lora.yaml
	$(BIN)/python launch/average.py launch/recipes/demo/average.yaml
	$(BIN)/python launch/evaluate.py launch/recipes/demo/zero_shot.yaml
	$(BIN)/python launch/adapt.py launch/recipes/demo/few_shot.yaml

test: install lint
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info

# make demo   install into .venv, then the whole way on the built-in toy suite: pre-train, average,
#             zero-shot, few-shot, analysis, and a report on it in runs/demo/report.html
# make test   install into .venv, then lint, types, import contracts and all tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# what starts launchers and kills runs, and what compiles: half of the time
HALF := tests/distributed tests/robustness tests/test_readme.py tests/test_wheel.py tests/gpu \
	tests/exchange tests/reproduction tests/families/test_compiled_blocks.py tests/verbs/test_compiled_runs.py

.PHONY: demo test lint install clean

demo: install
	$(BIN)/python launch/pretrain.py launch/recipes/demo/mhr.yaml
	$(BIN)/python launch/pretrain.py launch/recipes/demo/lora.yaml
	$(BIN)/python launch/average.py launch/recipes/demo/average.yaml
	$(BIN)/python launch/evaluate.py launch/recipes/demo/zero_shot.yaml
	$(BIN)/python launch/adapt.py launch/recipes/demo/few_shot.yaml
	$(BIN)/python launch/analyse.py launch/recipes/demo/analyse.yaml
	$(BIN)/python launch/report.py \
		$(addprefix runs/demo/,mhr lora average zero_shot few_shot analyse) \
		--file runs/demo/report.html --title "The toy suite, from pre-training to few-shot"

# two processes side by side
test: install lint
	@$(BIN)/python -m pytest $(HALF) > $(VENV)/half_of_tests.log 2>&1 & half=$$!; \
	$(BIN)/python -m pytest tests $(addprefix --ignore=,$(HALF)); rest=$$?; \
	wait $$half; half=$$?; cat $(VENV)/half_of_tests.log; \
	exit $$((rest > half ? rest : half))

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	@! grep -nrP '[^\x00-\x7F]' --include='*.py' mhr_scale launch || (echo 'source is ASCII'; exit 1)
	@find mhr_scale launch tests -name '*.py' | xargs awk \
		'FNR == 400 { print FILENAME ": 400 lines or more"; long = 1 } END { exit long }'

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info

# Every target sets up what it needs in .venv: python3 >= 3.11, pip and make are enough.
PYTHON ?= python3
BIN := .venv/bin
DATA ?=
PYTEST_ARGS ?=
CHAOS_ARGS ?=

.PHONY: setup demo test core coverage chaos up check bench clean
setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt scripts/setup.sh
	@sh scripts/setup.sh $(PYTHON)
	@touch $@

demo: setup
	@$(BIN)/python -m scripts.demo $(if $(DATA),--data "$(DATA)")

up: setup
	@$(BIN)/cim up

test: setup
	@PYTHONPATH= $(BIN)/python -m scripts.run_tests $(PYTEST_ARGS)

core: setup
	@sh scripts/core_alone.sh $(PYTEST_ARGS)

coverage: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit/cim_core -n 2 -q --cov=cim_core --cov-branch \
		--cov-report=term-missing:skip-covered --cov-fail-under=95 $(PYTEST_ARGS)

chaos: setup
	@$(BIN)/python -m tests.chaos $(CHAOS_ARGS)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q -p no:randomly tests/architecture

bench: setup
	@$(BIN)/python -m benchmarks.train_step
	@$(BIN)/python -m benchmarks.submit_to_first_step
	@$(BIN)/python -m benchmarks.load

clean:
	rm -rf .venv .cim .cim-demo

# `make demo` and `make test` set themselves up: git, make and Python >= 3.11 are all they need.
PYTHON ?= python3
FAMILY ?= t3av
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export DO_NOT_TRACK := 1
# Certificates that the machine trusts, as pip does, not only those that uv brings.
export UV_SYSTEM_CERTS := 1
READY := .venv/.ready

.PHONY: demo test test-slow check format bench lock clean

# Compiled once here: where Python may not write beside its modules, every start would compile them anew, for seconds.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Duet needs Python 3.11 or newer; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet uv==0.13.8
	.venv/bin/uv pip install --quiet --compile-bytecode --python .venv/bin/python -r requirements.lock
	.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --editable .
	@touch $@

demo: $(READY)  ## Train FAMILY on the demo dataset, from raw video to a registered version
	@dvc repro register@$(FAMILY)
	@python -m tasks.summary $(FAMILY)

test: $(READY)  ## The suite but for the slow tests
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" tests

test-slow: $(READY)  ## Servers, workers, browser, faults
	python -m pytest -n 2 --dist loadfile -m slow tests

check: $(READY)  ## Lint, types, layers
	ruff check .
	ruff format --check .
	pyright
	lint-imports

format: $(READY)
	ruff check --fix .
	ruff format .

bench: $(READY)  ## Each speed claim of the README: ours, the peer's, the ratio; into benchmarks/results/
	@python -m benchmarks

lock: $(READY)
	.venv/bin/uv pip install --quiet --python .venv/bin/python --upgrade --editable '.[dev,bench]'
	(head -1 requirements.lock; .venv/bin/uv pip freeze --python .venv/bin/python --exclude-editable) > .lock.tmp && mv .lock.tmp requirements.lock

clean:  ## Outputs and resume state; the virtual environment and the DVC cache stay
	rm -rf data artifacts .duet

.PHONY: up
up: $(READY)  ## Prefect, MLflow and a worker per pool on this machine, until Ctrl-C
	@python -m flows.up

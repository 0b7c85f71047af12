# Every verb works in a fresh clone: `setup` makes .venv and is what the others call first.
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
SETUP = $(VENV)/.ready

.PHONY: setup up test lint proto test-vllm bench-smoke bench-peers parity-full clean

setup: $(SETUP)

$(SETUP): pyproject.toml deploy/setup.sh
	bash deploy/setup.sh "$(PYTHON)" "$(VENV)"
	touch $@

up: $(SETUP)
	$(PY) -m pdserve_cli up

test: $(SETUP) lint
	$(PY) -m pytest -m "not slow and not vllm and not gpu and not kube"

lint: $(SETUP)
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy && $(VENV)/bin/lint-imports

proto: $(SETUP)
	bash deploy/proto.sh "$(PYTHON)"

docs: $(SETUP)
	$(PY) -m pdserve.config > docs/configuration.md

bench-peers: $(SETUP)
	bash deploy/bench-peers.sh "$(PYTHON)"

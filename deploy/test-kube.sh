#!/usr/bin/env bash
# Tests chart and discovery against a real API server: deploy/test-kube.sh PYTHON [pytest arguments]
# The cluster: what KUBECONFIG names (it gets namespaces of the tests' own), or a control plane with fake GPU nodes that
# $TEST_KUBE starts (`kube`, a test tool that is no part of this repository; ../shared/kube/kube where it lies there).
# Without either, only what needs no cluster is tested, and the rest says that it was skipped.
set -euo pipefail
python="$1"
shift
tools="$PWD/.cache/kube-tools"
bash deploy/kube-tools.sh "$python" "$tools"
export KUBE_TOOLS="$tools" TEST_KUBE="${TEST_KUBE:-$PWD/../shared/kube/kube}"
tests=("$python" -m pytest -m kube tests/kube --ignore tests/kube/node "$@")
if [ -z "${KUBECONFIG:-}" ] && [ -x "$TEST_KUBE" ]; then
    export KUBE_TESTS_MUST_RUN=1
    exec "$TEST_KUBE" run --gpu-nodes 2 -- "${tests[@]}"
fi
exec "${tests[@]}"

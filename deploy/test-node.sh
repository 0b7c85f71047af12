#!/usr/bin/env bash
# Runs the chart for real, as root: deploy/test-node.sh PYTHON [pytest arguments]
# Makes the image, starts a real node with it ($TEST_KUBE, as in test-kube.sh), installs the chart and asks it. Where
# there is no such tool it says so and ends well: no other cluster could be given the image.
set -euo pipefail
python="$1"
shift
export TEST_KUBE="${TEST_KUBE:-$PWD/../shared/kube/kube}"
if [ ! -x "$TEST_KUBE" ]; then
    echo "test-node: skipped, there is no test cluster at $TEST_KUBE"
    exit 0
fi
[ "$(id -u)" = 0 ] || { echo "test-node needs root: it starts a kubelet" >&2; exit 1; }
missing=()
command -v debootstrap >/dev/null || missing+=(debootstrap)
command -v iptables >/dev/null || missing+=(iptables)
command -v ip >/dev/null || missing+=(iproute2)
if [ "${#missing[@]}" -gt 0 ]; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
tools="$PWD/.cache/kube-tools"
image="$PWD/.cache/image/test.tar"
bash deploy/kube-tools.sh "$python" "$tools"
PYTHON="$python" bash deploy/docker/image.sh "$image" pdserve:test
export KUBE_TOOLS="$tools" KUBE_TESTS_MUST_RUN=1
"$TEST_KUBE" run --node --image "$image" -- "$python" -m pytest -m kube tests/kube/node "$@"

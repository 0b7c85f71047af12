#!/usr/bin/env bash
# The environment that the router benchmark measures against: .venv-peers with sglang-router, Debian's nginx, and the
# load generator and fake worker compiled into benchmarks/bin.
set -euo pipefail
python="$1"
if [ ! -x .venv-peers/bin/sglang-router ]; then
    "$python" -m venv .venv-peers
    .venv-peers/bin/pip install --quiet --disable-pip-version-check sglang-router==0.3.2
fi
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
if ! command -v nginx >/dev/null; then
    # Installed without starting the service: the benchmark runs its own instance on a loopback port.
    as_root apt-get update -qq
    as_root env RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends nginx-light >/dev/null
fi
command -v gcc >/dev/null || as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq gcc libc6-dev >/dev/null
mkdir -p benchmarks/bin
gcc -O2 -w -o benchmarks/bin/lg benchmarks/tools/lg.c -lm
gcc -O2 -w -o benchmarks/bin/fakew benchmarks/tools/fakew.c

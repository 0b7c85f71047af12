#!/usr/bin/env bash
# The environment that the router benchmark measures against: .venv-peers with sglang-router, .venv-dynamo with NVIDIA
# Dynamo, Debian's nginx, and the load generator and fake worker compiled into benchmarks/bin.
set -euo pipefail
python="$1"
if [ ! -x .venv-peers/bin/sglang-router ]; then
    "$python" -m venv .venv-peers
    .venv-peers/bin/pip install --quiet --disable-pip-version-check sglang-router==0.3.2
fi
if [ ! -e .venv-dynamo/.ready ]; then
    # Its plain install fails on a stub dependency, so what the frontend and its mock engines need is named here.
    "$python" -m venv .venv-dynamo
    .venv-dynamo/bin/pip install --quiet --disable-pip-version-check ai-dynamo-runtime==1.6.1 'aiohttp<4' \
        'kubernetes<33,>=32.0.1' msgspec 'prometheus-client<1' pyzmq 'redis<9' tqdm 'transformers>=4.56' zstandard tokenizers
    .venv-dynamo/bin/pip install --quiet --disable-pip-version-check --no-deps ai-dynamo==1.6.1
    touch .venv-dynamo/.ready
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

#!/usr/bin/env bash
# Installs what the optional transports need, for host memory: deploy/transports.sh VENV
#  - mooncake: its wheel without CUDA, and libibverbs, which it loads even for tcp (with an RDMA card also
#    ibverbs-providers). On a GPU node install mooncake-transfer-engine instead: both are the module `mooncake`.
#  - nixl: without its declared dependencies, which are torch for CUDA and 5.9 GB; it needs numpy alone.
# gloo and nccl come with torch.
set -euo pipefail
venv="$1"
pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
"${pip[@]}" install --editable '.[mooncake]'
"${pip[@]}" install --no-deps nixl==1.5.1 nixl-cu12==1.5.1
if ! ldconfig -p | grep libibverbs.so.1 >/dev/null; then  # not grep -q: it would end ldconfig, and pipefail tells
    as_root apt-get update -qq
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends libibverbs1 >/dev/null
fi

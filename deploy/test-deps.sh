#!/usr/bin/env bash
# Installs what tests use from Debian or Ubuntu, as root or by sudo; without it those tests are skipped and say so:
#     apt-get install redis-server
set -euo pipefail
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
if ! command -v redis-server >/dev/null; then
    as_root apt-get update -qq
    # Installed without starting the service: tests run their own instances on loopback ports.
    as_root env RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends redis-server >/dev/null
fi

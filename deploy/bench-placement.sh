#!/usr/bin/env bash
# The environment that the placement benchmark measures against: .venv-placement with NVIDIA Dynamo's offline replay.
# The replay reads its timing tables with the last three.
set -euo pipefail
python="$1"
if [ ! -f .venv-placement/.ready ]; then
    "$python" -m venv .venv-placement
    .venv-placement/bin/pip install --quiet --disable-pip-version-check ai-dynamo==1.4.2 scikit-learn scipy pandas
    touch .venv-placement/.ready
fi

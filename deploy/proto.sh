#!/usr/bin/env bash
# Regenerates pdserve/v1 and pdserve/oip with the oldest tools that we support: their output loads on protobuf 5, 6, 7.
set -euo pipefail
python="$1"
tools=".venv-proto"
if [ ! -x "$tools/bin/protoc-gen-mypy" ]; then
    "$python" -m venv "$tools"
    "$tools/bin/pip" install --quiet --disable-pip-version-check grpcio-tools==1.71.0 mypy-protobuf==3.6.0 'setuptools<80'
fi
PATH="$tools/bin:$PATH" "$tools/bin/python" -m grpc_tools.protoc -I proto \
    --python_out=. --grpc_python_out=. --mypy_out=. --mypy_grpc_out=. \
    proto/pdserve/v1/*.proto proto/pdserve/oip/*.proto

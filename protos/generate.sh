#!/usr/bin/env bash
# Generates the Python code of the API into DIR (default: client). Usage: protos/generate.sh [DIR]
# Its own pinned virtual environment lives in .protos-venv, so that the project's may have newer versions.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-client}
python=${PYTHON:-python3}
venv=.protos-venv
if ! cmp -s protos/requirements.txt "$venv/requirements.txt"; then
  "$python" -m venv --clear "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r protos/requirements.txt
  cp protos/requirements.txt "$venv/requirements.txt"
fi
mkdir -p "$out/loramux/v1"
rm -f "$out"/loramux/v1/*_pb2*.py "$out"/loramux/v1/*_pb2*.pyi
PATH="$PWD/$venv/bin:$PATH" "$venv/bin/python" -m grpc_tools.protoc \
  --proto_path=protos --proto_path=protos/third_party \
  --python_out="$out" --grpc_python_out="$out" --mypy_out="quiet:$out" --mypy_grpc_out="quiet:$out" \
  protos/loramux/v1/*.proto
# A file without a service still gets an empty service module: nothing to import there.
rm -f "$out"/loramux/v1/common_pb2_grpc.py "$out"/loramux/v1/common_pb2_grpc.pyi

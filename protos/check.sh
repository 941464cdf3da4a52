#!/usr/bin/env bash
# Fails if the committed generated code is not what the sources give.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
protos/generate.sh "$fresh" >/dev/null
if ! diff -r --brief --exclude=__pycache__ --exclude=__init__.py "$fresh/loramux/v1" client/loramux/v1; then
  echo "client/loramux/v1 is not what protos/ gives: run make protos and commit the result" >&2
  exit 1
fi
echo "client/loramux/v1 is what protos/ gives"

#!/usr/bin/env bash
# The GPU checks on the running Python, for instance in NVIDIA's PyTorch container: installs the package beside the
# torch, Triton and Transformer Engine that are there, which stay as they are, and runs tools/gpu_checks.py.
#   tools/gpu_checks_here.sh [OPTIONS OF tools/gpu_checks.py]
#   tools/gpu_checks_here.sh --install-only
# PYTHON names the interpreter (default: python). SGLang's rows need `tools/sglang_env/create.sh gpu .venv-sglang-gpu`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
kept='^(torch|triton|pytorch[-_]triton|transformer[-_]engine|flash[-_]attn|apex|numpy|nvidia|cuda|setuptools|packaging|protobuf|grpcio)'
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
# A container's own constraints (PIP_CONSTRAINT) would hold back what is installed here; what has to stay is named below.
export PIP_CONSTRAINT='' PIP_DISABLE_PIP_VERSION_CHECK=1
{
    "$python" -m pip list --format=freeze | grep -iE "$kept" || true
    grep -viE "$kept" constraints.txt
} >"$constraints"
"$python" -m pip install --quiet -c "$constraints" -r tools/gpu/requirements.txt
"$python" -m pip install --quiet --no-deps -e .
if [[ ${1:-} == --install-only ]]; then
    exit 0
fi
"$python" tools/gpu_checks.py "$@"

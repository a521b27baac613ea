#!/usr/bin/env bash
# The GPU checks beside the torch, Triton and Transformer Engine of the running Python, for instance in NVIDIA's PyTorch
# container: installs the package into .venv-container, which sees them (docker/install.sh), and runs tools/gpu_checks.py.
#   tools/gpu_checks_here.sh [OPTIONS OF tools/gpu_checks.py]
#   tools/gpu_checks_here.sh --install-only
# PYTHON names the interpreter (default: python3). SGLang's rows need `tools/sglang_env/create.sh gpu .venv-sglang-gpu`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
docker/install.sh .venv-container
if [[ ${1:-} != --install-only ]]; then
    .venv-container/bin/python tools/gpu_checks.py "$@"
fi

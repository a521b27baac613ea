#!/usr/bin/env bash
# Installs asd_megatron, editable, beside the torch, Triton and Transformer Engine of a Python that has them, for instance
# in NVIDIA's PyTorch container, and checks that those are still the base's afterwards (docker/check_base.py).
#   docker/install.sh [--same-nccl] FOLDER
# FOLDER becomes a virtual environment that sees the base's packages, so that nothing of the base is overwritten. Its
# constraints.txt holds the versions that further packages have to fit: the base's, and those of our constraints.txt.
# --same-nccl: an error unless the base's NCCL is the SGLang servers'. PYTHON names the base's interpreter (python3).
set -euo pipefail
servers=()
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ ${1:-} == --same-nccl ]]; then
    servers=(tools/sglang_env/requirements-gpu.txt)
    shift
fi
if [[ $# -ne 1 || $1 == -* ]]; then
    sed -n '2,7s/^# \{0,1\}//p' docker/install.sh >&2
    exit 2
fi
folder=$(cd "$OLDPWD" && realpath -m "$1")
base=${PYTHON:-python3}
python=$folder/bin/python
# The container's own constraints (PIP_CONSTRAINT) would hold back what is installed here. uv is not used: it does not see
# the base's packages and would install torch again.
export PIP_CONSTRAINT='' PIP_DISABLE_PIP_VERSION_CHECK=1

mkdir -p "$folder"
"$base" docker/check_base.py snapshot "$folder/base.json"
"$base" -m venv --without-pip --system-site-packages "$folder" # pip is the base's, too
"$base" docker/check_base.py constraints "$folder/base.json" constraints.txt >"$folder/constraints.txt"
"$python" -m pip install --quiet -c "$folder/constraints.txt" -r tools/gpu/requirements.txt
"$python" -m pip install --quiet --no-deps -e .
# The base's torchrun would start the base's Python.
printf '#!/bin/sh\nexec "%s" -m torch.distributed.run "$@"\n' "$python" >"$folder/bin/torchrun"
chmod +x "$folder/bin/torchrun"
"$python" docker/check_base.py compare "$folder/base.json" "${servers[@]}"

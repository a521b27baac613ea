#!/usr/bin/env bash
# Create the Python environment that TRL's GRPOTrainer is measured in, beside ours (tools/benchmark_step.py).
#   tools/trl_env/create.sh [FOLDER]            FOLDER is .venv-trl unless given
# Running it again does nothing, unless these files have changed since. TRL_BASE_PYTHON names the interpreter (3.11 or 3.12).
# For the smaller CPU build of PyTorch see CONTRIBUTING.md.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=${1:-.venv-trl}
stamp=$folder/.installed
made_of=$(cat "$here/create.sh" "$here/requirements.txt" | sha256sum | cut -c1-16)
if [[ -e $stamp && $(<"$stamp") == "$made_of" ]]; then
    exit 0
fi
python=${TRL_BASE_PYTHON:-}
if [[ -z $python ]]; then
    for python in python3.11 python3.12 python3; do
        "$python" -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && break
    done
fi
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || {
    echo "error: $python is not Python 3.11 or 3.12: name one with TRL_BASE_PYTHON=..." >&2
    exit 2
}
echo "installing TRL into $folder (the first time takes some minutes)"
"$python" -m venv --clear "$folder"
# torch first, by itself: it brings what its own build needs.
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' "$here/requirements.txt")"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
"$folder/bin/python" -c 'import importlib.metadata as m; print("TRL", m.version("trl"), "with torch", m.version("torch"))'
echo "$made_of" >"$stamp"

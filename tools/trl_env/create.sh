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
source "$here/../base_python.sh"
python=$(base_python TRL_BASE_PYTHON)
echo "installing TRL into $folder (the first time takes some minutes)"
"$python" -m venv --clear "$folder"
# torch first, by itself: it brings what its own build needs.
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' "$here/requirements.txt")"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
"$folder/bin/python" -c 'import importlib.metadata as m; print("TRL", m.version("trl"), "with torch", m.version("torch"))'
echo "$made_of" >"$stamp"

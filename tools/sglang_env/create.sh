#!/usr/bin/env bash
# Create the Python environment that SGLang servers run in. It is never the trainer's: SGLang pins other versions.
#   tools/sglang_env/create.sh gpu [FOLDER]     CUDA 13; SGLang's own dependencies and the router
#   tools/sglang_env/create.sh cpu [FOLDER]     the same server on CPUs, for tests and the demo: text models, float32
# FOLDER is .venv-sglang unless given. Running it again does nothing, unless these files have changed since.
# SGLANG_BASE_PYTHON names the interpreter that it is made from (3.11 or 3.12).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
variant=${1:-} folder=${2:-.venv-sglang}
if [[ $variant != cpu && $variant != gpu ]]; then
    sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
requirements=$here/requirements-$variant.txt
stamp=$folder/.installed
made_of=$(cat "$here"/create.sh "$requirements" "$here"/*.py | sha256sum | cut -c1-16)
if [[ -e $stamp && $(<"$stamp") == "$variant $made_of" ]]; then
    touch "$stamp"
    exit 0
fi

source "$here/../base_python.sh"
python=$(base_python SGLANG_BASE_PYTHON)
echo "installing SGLang ($variant) into $folder (the first time takes some minutes)"
"$python" -m venv --clear "$folder"
pip=("$folder/bin/python" -m pip install --quiet --disable-pip-version-check)
if [[ $variant == gpu ]]; then
    "${pip[@]}" -r "$requirements"
else
    # torch brings what its build needs (a CPU build: see CONTRIBUTING.md); of SGLang's dependencies only those that a
    # text model on CPUs imports are installed, so no resolver may look at the rest.
    "${pip[@]}" "$(grep '^torch==' "$requirements")"
    "${pip[@]}" --no-deps -r "$requirements"
    packages=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    cp "$here/sgl_kernel.py" "$here/asd_cpu_torchvision.py" "$here/asd_cpu_fp8.py" "$packages/"
    for module in asd_cpu_torchvision asd_cpu_fp8; do
        echo "import $module" >"$packages/$module.pth"
    done
fi
"$folder/bin/python" -c 'import importlib.metadata as m; print("SGLang", m.version("sglang"), "with torch", m.version("torch"))'
echo "$variant $made_of" >"$stamp"

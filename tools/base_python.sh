# shellcheck shell=bash
# For the scripts that create environments: `python=$(base_python VARIABLE)` is the interpreter that VARIABLE names,
# else the first of this machine that is Python 3.11 or 3.12 and can make an environment. It says so if there is none.
base_python() {
    local python=${!1:-} supported='(3, 11) <= sys.version_info < (3, 13)'
    if [[ -z $python ]]; then
        for python in python3.11 python3.12 python3; do
            "$python" -c "import sys, ensurepip; sys.exit(not $supported)" 2>/dev/null && break
        done
    fi
    "$python" -c "import sys; sys.exit(not $supported)" || {
        echo "error: $python is not Python 3.11 or 3.12: name one with $1=..." >&2
        return 2
    }
    echo "$python"
}

#!/usr/bin/env bash
# Writes a file with two new keys for SGLang servers, which its owner alone can read, unless it is there already.
#   docker/keys.sh [FILE]      (docker/keys.env)
set -euo pipefail
file=${1:-$(dirname "${BASH_SOURCE[0]}")/keys.env}
umask 077
set -o noclobber
key() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }
if [[ ! -e $file ]]; then
    printf 'export ASD_MEGATRON_API_KEY=%s\nexport ASD_MEGATRON_ADMIN_KEY=%s\n' "$(key)" "$(key)" >"$file"
fi
echo "$file"

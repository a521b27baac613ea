#!/usr/bin/env bash
# Writes a file with two new keys for SGLang servers, which its owner alone can read. A file that has them already is kept.
#   docker/keys.sh [FILE]      (docker/keys.env)
set -euo pipefail
file=${1:-$(dirname "${BASH_SOURCE[0]}")/keys.env}
if [[ $file == -* ]]; then
    sed -n '2,3s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
if [[ ! -d $(dirname "$file") ]]; then
    echo "error: the folder of $file does not exist: make it first" >&2
    exit 2
fi
umask 077
set -o noclobber
key() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }
if [[ ! -e $file && ! -L $file ]]; then
    printf 'export ASD_MEGATRON_API_KEY=%s\nexport ASD_MEGATRON_ADMIN_KEY=%s\n' "$(key)" "$(key)" >"$file"
elif [[ ! -f $file ]] || ! grep -q ASD_MEGATRON_API_KEY= "$file" || ! grep -q ASD_MEGATRON_ADMIN_KEY= "$file"; then
    echo "error: $file is there and is no file with both keys: remove it, or name another file" >&2
    exit 2
elif [[ -n $(find -L "$file" -perm -040 -o -perm -004) ]]; then
    echo "error: $file can be read by others: chmod 600 '$file'" >&2
    exit 2
fi
echo "$file"

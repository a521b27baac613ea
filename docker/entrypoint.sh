#!/usr/bin/env bash
# Runs the given command. ASD_MEGATRON_KEYS_FILE names a file with the SGLang servers' two keys, in the form that
# `asd-megatron serve` writes (keys.env); a secret of the container engine, so that neither the image nor the container's
# configuration holds them.
set -euo pipefail
if [[ -n ${ASD_MEGATRON_KEYS_FILE:-} ]]; then
    if [[ ! -r $ASD_MEGATRON_KEYS_FILE ]]; then
        echo "error: user $(id -u) cannot read $ASD_MEGATRON_KEYS_FILE: run the container as the file's owner (docs/containers.md)" >&2
        exit 2
    fi
    # shellcheck source=/dev/null
    source "$ASD_MEGATRON_KEYS_FILE"
    if [[ -z ${ASD_MEGATRON_API_KEY:-} || -z ${ASD_MEGATRON_ADMIN_KEY:-} ]]; then
        echo "error: $ASD_MEGATRON_KEYS_FILE has to set ASD_MEGATRON_API_KEY and ASD_MEGATRON_ADMIN_KEY: docker/keys.sh writes such a file" >&2
        exit 2
    fi
    export ASD_MEGATRON_API_KEY ASD_MEGATRON_ADMIN_KEY
fi
exec "$@"

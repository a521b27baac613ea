#!/usr/bin/env bash
# Builds the images, or checks built ones, with docker or podman (ENGINE names another one).
#   docker/images.sh build [NAME ...]
#   docker/images.sh check [NAME ...]
# NAME: asd-megatron-trainer, asd-megatron-sglang, asd-megatron-colocated; all of them unless given. Tags are the
# package's version and `latest`. `check` runs the images, on this machine's GPUs if it has any.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source=/opt/asd_megatron/source
environment=/opt/asd_megatron/environment
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' asd_megatron/__init__.py)

find_engine() {
    local name found=''
    for name in ${ENGINE:-docker podman}; do
        if command -v "$name" >/dev/null; then
            "$name" info >/dev/null 2>&1 && echo "$name" && return
            found+=" $name"
        fi
    done
    if [[ -n $found ]]; then
        echo "error:$found cannot reach an engine: start it, or add your user to its group (\`${found##* } info\` says why)" >&2
    else
        echo "error: no container engine: install docker or podman, or name another one with ENGINE=..." >&2
    fi
    return 2
}

build() {
    local file=docker/${1#asd-megatron-}.Dockerfile
    local options=()
    [[ ${engine##*/} == podman ]] && options+=(--format docker) # SHELL and HEALTHCHECK are no part of OCI's format
    [[ $1 == asd-megatron-colocated ]] && options+=(--build-arg "TRAINER_IMAGE=asd-megatron-trainer:$version")
    echo "building $1:$version of $file"
    DOCKER_BUILDKIT=1 "$engine" build "${options[@]}" -f "$file" -t "$1:$version" -t "$1:latest" --build-arg "VERSION=$version" \
        --build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)" .
}

# in_image NAME OPTIONS -- COMMAND: as any user of the host, on a read-only root
in_image() {
    local image=$1:$version options=()
    shift
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    shift
    "$engine" run --rm --read-only --tmpfs /tmp:exec --tmpfs /cache:exec,mode=1777 --user 12345:12345 \
        "${options[@]}" "$image" "$@"
}

check() {
    local user
    echo "checking $1:$version"
    user=$("$engine" image inspect --format '{{.Config.User}}' "$1:$version")
    if [[ ! $user =~ ^[1-9] ]]; then
        echo "error: $1 runs as user '$user', not as a user of its own" >&2
        return 1
    fi
    if [[ $1 == asd-megatron-sglang ]]; then
        in_image "$1" -- --help >/dev/null # its entry point is `asd-megatron serve`
    else
        in_image "$1" -- asd-megatron --version
        in_image "$1" -- python "$source/docker/check_base.py" compare "$environment/base.json" \
            "$source/tools/sglang_env/requirements-gpu.txt"
    fi
    if [[ $1 != asd-megatron-trainer ]]; then
        in_image "$1" --entrypoint /opt/sglang/bin/python -- -c \
            'import importlib.metadata as m, sglang, torch; print("SGLang", sglang.__version__, "torch", m.version("torch"))'
    fi
    if [[ ${#gpus[@]} -eq 0 || $1 == asd-megatron-sglang ]]; then
        return
    fi
    in_image "$1" "${gpus[@]}" -- asd-megatron parity --ranks 1
    in_image "$1" "${gpus[@]}" --shm-size 8g -- python "$source/tools/gpu_checks.py" --logs /tmp/logs
}

verb=${1:-}
if [[ $verb != build && $verb != check ]]; then
    sed -n '2,6s/^# \{0,1\}//p' docker/images.sh >&2
    exit 2
fi
shift
engine=$(find_engine)
gpus=()
if [[ $verb == check ]]; then
    if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
        gpus=(--gpus all)
        [[ ${engine##*/} == podman ]] && gpus=(--device nvidia.com/gpu=all)
    else
        echo "no GPU: what needs one is not checked"
    fi
fi
[[ $# -gt 0 ]] || set -- asd-megatron-trainer asd-megatron-sglang asd-megatron-colocated
for image in "$@"; do
    if [[ ! -f docker/${image#asd-megatron-}.Dockerfile || $image != asd-megatron-* ]]; then
        echo "error: no image '$image': give asd-megatron-trainer, asd-megatron-sglang or asd-megatron-colocated" >&2
        exit 2
    fi
done
for image in "$@"; do
    "$verb" "$image"
done

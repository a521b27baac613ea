# The trainer, on NVIDIA's PyTorch image: torch, Triton, Transformer Engine and Apex stay the base's (docker/check_base.py).
#   docker build -f docker/trainer.Dockerfile -t asd-megatron-trainer .        (or `make images`)
#
# Release 26.07 (July 2026), the index of amd64 and arm64; what it has, by its own environment variables and labels:
#   Python 3.12   torch 2.13.0a0+9186a08b2c.nv26.07   Triton 3.7.1   Transformer Engine 2.17   cuDNN 9.24.0.43
#   CUDA 13.3.1 (driver 610.43, or an older data centre driver through the CUDA compatibility package)   NCCL 2.30.7
# NCCL is that of SGLang 0.5.23 (tools/sglang_env), which the build checks; Transformer Engine is among the tested
# releases (2.11 to 2.18 with megatron-core 0.19). 26.08 has torch 2.14.0a0, Transformer Engine 2.18, CUDA 13.4 and the
# same NCCL; this project's tests run with torch 2.13.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.07-py3@sha256:2140e699b3beaf7f96a0081fd9c9406bc3832b435cdb60dfa2d261f7d2f34a1c
FROM ${BASE_IMAGE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# The sandbox of `reward.name: code` (docs/sandbox.md).
# hadolint ignore=DL3008
RUN apt-get update -qq \
    && apt-get install -qq -y --no-install-recommends bubblewrap \
    && rm -rf /var/lib/apt/lists/*

# Caches and runs are written by whatever user the container runs as.
RUN groupadd --gid 10001 asd \
    && useradd --no-log-init --uid 10001 --gid asd --home-dir /cache --no-create-home asd \
    && install -d -m 1777 /work /work/runs /cache

COPY . /opt/asd_megatron/source
RUN --mount=type=cache,target=/root/.cache/pip \
    chmod -R go+rX /opt/asd_megatron/source \
    && /opt/asd_megatron/source/docker/install.sh --same-nccl /opt/asd_megatron/environment

# Packages that are installed later have to fit the base, too. HOME: compiled kernels are cached below it. USER and
# LOGNAME: torch asks for the user's name, and a container that runs as a user of the host has no entry for it.
ENV PATH=/opt/asd_megatron/environment/bin:${PATH} \
    VIRTUAL_ENV=/opt/asd_megatron/environment \
    PIP_CONSTRAINT=/opt/asd_megatron/environment/constraints.txt \
    PYTHONUNBUFFERED=1 \
    PYTHONNOUSERSITE=1 \
    USER=asd \
    LOGNAME=asd \
    HOME=/cache \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor

ARG VERSION=unknown
ARG REVISION=unknown
ARG BASE_IMAGE
LABEL org.opencontainers.image.title="asd_megatron trainer" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"

USER 10001:10001
WORKDIR /work
ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh", "/opt/asd_megatron/source/docker/entrypoint.sh"]
CMD ["asd-megatron", "--help"]

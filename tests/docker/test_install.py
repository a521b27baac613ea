"""docker/install.sh on a stand-in of NVIDIA's PyTorch image, with a folder of wheels in place of PyPI.

What really runs is pip, venv, the check of the base and the console command. torch, Triton, Transformer Engine and all
dependencies are empty packages with the names, versions and requirements that matter.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import pytest

from tests.docker.base_layer import BASE, ROOT, Package, base_python, index, pins, wheel

COPIED = ("docker", "tools", "asd_megatron")
COPIED += ("constraints.txt", "pyproject.toml", "README.md", "LICENSE")
TORCH, TRITON = BASE["torch"][0], BASE["triton"][0]


def checkout(folder: Path) -> Path:
    """A copy of what an installation needs: it leaves files beside the package."""
    for name in COPIED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Without this machine's settings of pip and Python."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_ROOT_USER_ACTION": "ignore", "LC_ALL": "C.UTF-8"}
    variables = kept | settings | environment
    words = [str(word) for word in command]
    return subprocess.run(words, env=variables, cwd=os.sep, capture_output=True, text=True, timeout=240)


def site_packages(python: Path) -> Path:
    return Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())


class Image:
    """A base, a checkout, a package index and the environment that is installed from them, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.base = base_python(folder / "usr")
        self.source = checkout(folder / "source")
        self.environment = folder / "environment"
        self.python = self.environment / "bin" / "python"
        constraint = folder / "constraint.txt"  # as the containers have one: it forbids what we need
        constraint.write_text("pyarrow==1.0\nmegatron-core==0.1\n")
        self.pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index(folder / "index")), "PYTHON": str(self.base)}
        self.pip["PIP_CONSTRAINT"] = str(constraint)

    def compare(self, *requirements: Path) -> subprocess.CompletedProcess[str]:
        check = self.source / "docker" / "check_base.py"
        return run(self.python, check, "compare", self.environment / "base.json", *requirements)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    made = Image(tmp_path_factory.mktemp("image"))
    done = run(made.source / "docker/install.sh", "--same-nccl", made.environment, **made.pip)
    assert done.returncode == 0, done.stderr
    assert f"torch {TORCH}\n" in done.stdout and f"triton {TRITON}\n" in done.stdout
    return made


def test_the_base_stays_and_the_rest_is_as_pinned(image: Image) -> None:
    found = metadata.distributions(path=[str(site_packages(image.python))])
    added = {package.metadata["Name"]: package.version for package in found}
    lines = (ROOT / "tools" / "gpu" / "requirements.txt").read_text().splitlines()
    versions = pins()
    assert added.pop("asd_megatron")
    assert added == {name: versions[name] for name in lines if name[:1] not in ("", "#") and name != "numpy"}
    program = "from importlib import metadata as m; import torch as t; print(t.__file__, *map(m.version, NAMES))"
    program = program.replace("NAMES", "['torch', 'numpy', 'tqdm']")
    file, *now = run(image.python, "-c", program).stdout.split()
    assert Path(file).is_relative_to(image.base.parents[1])
    assert now == [TORCH, BASE["numpy"][0], versions["tqdm"]]  # an older tqdm of the base is hidden
    assert run(image.base, "-c", program).stdout.split()[1:] == [TORCH, BASE["numpy"][0], BASE["tqdm"][0]]


def test_constraints_for_further_packages(image: Image) -> None:
    """The base's versions and ours, but none of ours for what only the base may bring; pip holds to them."""
    lines = (image.environment / "constraints.txt").read_text().splitlines()
    ours = set(lines) & set((ROOT / "constraints.txt").read_text().splitlines())
    assert f"pyarrow=={pins()['pyarrow']}" in ours and f"torch=={TORCH}" in lines
    assert not [line for line in ours if re.match("torch=|triton|nvidia-(?!ml-py)|numpy|transformer-engine", line)]
    wheel(Path(image.pip["PIP_FIND_LINKS"]), "wants-another-torch", "1.0", {}, ["torch>=50"])
    settings = image.pip | {"PIP_CONSTRAINT": str(image.environment / "constraints.txt")}
    done = run(image.python, "-m", "pip", "install", "wants-another-torch", **settings)
    assert done.returncode != 0 and f"torch=={TORCH}" in done.stdout + done.stderr


def test_commands_start_on_the_environments_python(image: Image) -> None:
    """`asd-megatron --help` imports nothing but our package."""
    done = run(image.environment / "bin" / "asd-megatron", "--help")
    assert done.returncode == 0 and "train a model with AntiSD" in done.stdout
    assert run(image.environment / "bin" / "torchrun", "-m", "x").stdout == f"{image.environment} ['-m', 'x']\n"


@contextmanager
def written(folder: Path, files: dict[str, str]) -> Iterator[None]:
    """`files` in `folder`, which has its old ones again afterwards."""
    old = {path: path.read_text() if path.exists() else None for path in (folder / name for name in files)}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    yield
    for path, before in old.items():
        path.write_text(before) if before is not None else path.unlink()


def about(name: str, version: str, folder: str = "") -> dict[str, str]:
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    return {f"{name}-{folder or version}.dist-info/METADATA": text}


IN_ENVIRONMENT = {
    r"triton is 3.9.0 of \S*environment\S*, and was 3.7.1\+nv26.7 of \S*usr": about("triton", "3.9.0"),
    r"triton is imported from \S*environment\S*, and was from \S*usr": {"triton.py": ""},
    "nvidia-nccl-cu13 2.31.1 was installed in .*: only the base may bring it": about("nvidia_nccl_cu13", "2.31.1"),
    r"asd_megatron needs pyarrow>=17, and there is 9.0": about("pyarrow", "9.0", pins()["pyarrow"]),
}
IN_BASE = {
    r"triton 3.7.1\+nv26.7: 1 of its files changed, the first is triton/language.py": {"triton/language.py": ""},
    "transformer_engine.pytorch cannot be imported any more: ZeroDivisionError": {
        "transformer_engine/pytorch/__init__.py": "1 / 0\n"
    },
}


@pytest.mark.parametrize("said", [*IN_ENVIRONMENT, *IN_BASE])
def test_what_has_changed_is_named(image: Image, said: str) -> None:
    folder = site_packages(image.python if said in IN_ENVIRONMENT else image.base)
    with written(folder, (IN_ENVIRONMENT | IN_BASE)[said]):
        done = image.compare()
    assert done.returncode == 1 and re.search(said, done.stderr), done.stderr


def test_another_nccl_than_the_servers(image: Image, tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("torch==2.14.1\nnvidia-nccl-cu13==2.29.2\n")
    done = image.compare(requirements)
    assert done.returncode == 1 and "NCCL is 2.30.7, and the SGLang servers have 2.29.2" in done.stderr


def test_a_base_without_a_torch_that_works(tmp_path: Path) -> None:
    broken: Package = ("2.13.0", {"torch/__init__.py": "raise ImportError('libcudart.so.13')\n"})
    python = base_python(tmp_path / "usr", torch=broken)
    done = run(ROOT / "docker" / "install.sh", tmp_path / "environment", PYTHON=str(python))
    assert done.returncode == 1 and "cannot import torch (ImportError: libcudart.so.13): start from an" in done.stderr


def test_the_gpu_checks_use_such_an_environment(image: Image) -> None:
    """`tools/gpu_checks_here.sh` installs into .venv-container of the checkout and hands its options on."""
    done = run(image.source / "tools" / "gpu_checks_here.sh", "--list", **image.pip)
    assert done.returncode == 0 and f"torch {TORCH}\n" in done.stdout and "parity_te_1" in done.stdout, done.stderr
    program = "import asd_megatron as package; print(package.__file__)"
    found = run(image.source / ".venv-container" / "bin" / "python", "-c", program).stdout
    assert found.startswith(str(image.source))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_with_the_packages_of_pypi(tmp_path: Path) -> None:
    """On Python 3.12, the containers': the real dependencies bring neither torch nor CUDA, and can be imported."""
    python312 = shutil.which(os.environ.get("PYTHON312", "python3.12"))
    assert python312 is not None, "name a Python 3.12 with PYTHON312"
    base = base_python(tmp_path / "usr", python312, numpy=None)  # others are built against it
    source = checkout(tmp_path / "source")
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(source / "docker" / "install.sh"), "--same-nccl", str(tmp_path / "environment")]
    done = subprocess.run(command, env=variables | {"PYTHON": str(base)}, cwd=os.sep, capture_output=True, text=True)
    assert done.returncode == 0 and f"torch {TORCH}\n" in done.stdout, done.stderr
    python = tmp_path / "environment" / "bin" / "python"
    names = {package.metadata["Name"] for package in metadata.distributions(path=[str(site_packages(python))])}
    assert "megatron-core" in names
    assert {name for name in names if name.startswith(("nvidia", "torch", "triton", "cuda"))} == {"nvidia-ml-py"}
    program = "import aiohttp, math_verify, pyarrow, pydantic, safetensors, tokenizers, yaml, asd_megatron.cli.serve"
    done = run(python, "-c", program)
    assert done.returncode == 0, done.stderr

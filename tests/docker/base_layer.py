"""A stand-in of NVIDIA's PyTorch image: an interpreter of its own whose site-packages hold small packages with the
names and versions of release 26.07, and a folder of wheels in place of PyPI."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
NCCL = "2.30.7"
Package = tuple[str, Mapping[str, str]]
RUN = "import sys\nprint(sys.prefix, sys.argv[1:])\n"
TORCH = f"class cuda:\n    class nccl:\n        version = staticmethod(lambda: {tuple(map(int, NCCL.split('.')))})\n"
# Distribution -> (version, {file: text}). The containers' torch is `.nv26.07` to itself, `.nv26.7.N` in its metadata.
BASE: dict[str, Package] = {
    "torch": (
        "2.13.0a0+9186a08b2c.nv26.7.1",
        {"torch/__init__.py": TORCH, "torch/lib/libtorch.so": "library", "torch/distributed/run.py": RUN},
    ),
    "triton": ("3.7.1+nv26.7", {"triton/__init__.py": "", "triton/language.py": "base = True\n"}),
    "transformer_engine": (
        "2.17.0+abc",
        {"transformer_engine/__init__.py": "", "transformer_engine/pytorch/__init__.py": "import torch\n"},
    ),
    "flash_attn": ("2.7.4.post1", {"flash_attn/__init__.py": ""}),
    "apex": ("0.1", {"apex/__init__.py": ""}),
    "numpy": ("2.1.0", {"numpy/__init__.py": ""}),
    "nvidia-cudnn-frontend": ("1.25.0", {"cudnn/__init__.py": ""}),
    "tqdm": ("4.70.0", {"tqdm/__init__.py": ""}),  # older than our pin: hidden by ours, not removed
}


def wheel(folder: Path, name: str, version: str, files: Mapping[str, str], requires: Sequence[str] = ()) -> Path:
    """A wheel for every Python, with correct hashes in its RECORD."""
    stem = f"{name.replace('-', '_')}-{version}"
    needs = "".join(f"Requires-Dist: {text}\n" for text in requires)
    about = f"{stem}.dist-info"
    contents = {
        **files,
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, text in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(text.encode())}\n"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(target, "w") as archive:
        for path, text in {**contents, f"{about}/RECORD": f"{record}{about}/RECORD,,\n"}.items():
            archive.writestr(path, text)
    return target


def repacked(folder: Path, name: str) -> Path:
    """A distribution of the running environment as a wheel again: pip, setuptools and packaging are really used."""
    found = metadata.distribution(name)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}-{found.version}-py3-none-any.whl"
    with zipfile.ZipFile(target, "w") as archive:
        for file in found.files or ():
            if file.suffix != ".pyc" and not str(file).startswith(".."):
                archive.write(str(file.locate()), str(file))
    return target


def base_python(folder: Path, python: str = sys._base_executable, **changed: Package | None) -> Path:  # type: ignore[attr-defined]
    """A copy of `python` with its own empty site-packages, filled with pip, setuptools, packaging and `BASE`, in which
    `changed` packages are others, or absent (None)."""
    version, stdlib = _ask(python, "sysconfig.get_python_version(), sysconfig.get_path('stdlib')").split()
    library = folder / "lib" / f"python{version}"
    library.mkdir(parents=True)
    for entry in Path(stdlib).iterdir():
        if entry.name not in ("site-packages", "dist-packages"):
            (library / entry.name).symlink_to(entry)
    copy = folder / "bin" / f"python{version}"
    copy.parent.mkdir()
    shutil.copy(os.path.realpath(python), copy)
    place = Path(_ask(str(copy), "sysconfig.get_path('purelib')"))
    packages = [repacked(folder / "wheels", name) for name in ("pip", "setuptools", "packaging")]
    packages += [wheel(folder / "wheels", name, *package) for name, package in (BASE | changed).items() if package]
    for package in packages:
        with zipfile.ZipFile(package) as archive:
            archive.extractall(place)
    return copy


def _ask(python: str, expression: str) -> str:
    program = f"import sys, sysconfig; print(*[{expression}])"
    return subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def pins() -> dict[str, str]:
    """Versions of constraints.txt for this Python, by normalised name."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    found = [pin for pin in map(Requirement, lines) if pin.marker is None or pin.marker.evaluate()]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in found}


def index(folder: Path) -> Path:
    """Wheels of all that is to be installed, in the pinned versions, and of what must not be, newer than the base's."""
    lines = (ROOT / "tools" / "gpu" / "requirements.txt").read_text().splitlines()
    needs = {"megatron-core": ["torch>=2.6.0", "numpy", "packaging>=24.2"], "transformers": ["tqdm", "numpy>=1.17"]}
    versions = pins()
    for name in [line for line in lines if line and not line.startswith("#")]:
        wheel(folder, name, versions[name], {f"stand_in_{name.replace('-', '_')}.py": ""}, needs.get(name, ()))
    wheel(folder, "torch", "99.0", {"torch/__init__.py": ""}, ["nvidia-nccl-cu13==2.31.1", "triton>=3.8"])
    wheel(folder, "triton", "99.0", {"triton/__init__.py": ""})
    wheel(folder, "nvidia-nccl-cu13", "2.31.1", {"nvidia/nccl.py": ""})
    repacked(folder, "setuptools")  # builds our package
    return folder

"""Versions of the packages in the Python environment of the SGLang servers.

SGLang lives in an environment of its own (`tools/sglang_env/create.sh`) and is never imported here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asd_megatron.errors import UserError

OLDEST = (0, 5, 10)  # earlier ones can be taken over through ports on all interfaces (CVE-2026-3059, CVE-2026-3060)
OLDEST_TEXT = ".".join(map(str, OLDEST))
HOW_TO_MAKE = "make it with `tools/sglang_env/create.sh gpu FOLDER` (or cpu) and name FOLDER/bin/python"
METADATA_SECONDS = 60.0
IMPORT_SECONDS = 300.0  # importing torch from a cold network file system


@dataclass(frozen=True)
class Versions:
    """What an SGLang environment holds; `nccl` and `nccl_library`, the file, are None in one for CPUs."""

    sglang: str
    torch: str
    nccl: str | None
    nccl_library: str | None


def check_environment(python: Path) -> Versions:
    """Versions in the environment of interpreter `python`. Raises UserError if it, or a new enough SGLang, is missing.

    Reads package metadata only: a fraction of a second.
    """
    return read_versions(str(python), _ask(python, LIST_VERSIONS, METADATA_SECONDS))


def read_versions(python: str, found: Mapping[str, str | None] | None, said: str = "") -> Versions:
    """The answer of `LIST_VERSIONS`, run by the interpreter that messages call `python`; None: it gave none, but `said`
    this. Raises UserError as `check_environment`."""
    if found is None:
        raise UserError(f"{python} does not answer as a Python does ({said}): {HOW_TO_MAKE}")
    if found["sglang"] is None:
        raise UserError(f"SGLang is not installed in the environment of {python}: {HOW_TO_MAKE}")
    if too_old(found["sglang"]):
        raise UserError(
            f"SGLang {found['sglang']} in the environment of {python} is older than {OLDEST_TEXT} and open to"
            f" CVE-2026-3059 and CVE-2026-3060: {HOW_TO_MAKE}"
        )
    if found["torch"] is None:
        raise UserError(f"torch is not installed in the environment of {python}: {HOW_TO_MAKE}")
    return Versions(found["sglang"], found["torch"], found["nccl"], found.get("nccl_library"))


def ipc_arguments(python: Path) -> tuple[str, ...]:
    """Parameter names of `torch.multiprocessing.reductions.rebuild_cuda_tensor` in the environment of `python`: what a
    handle of shared CUDA memory consists of there. Imports torch: some seconds."""
    return tuple(_ask(python, _LIST_ARGUMENTS, IMPORT_SECONDS))


LIST_VERSIONS = """
import importlib.metadata as m, json
def found(*names):
    for name in names:
        try: return m.distribution(name)
        except m.PackageNotFoundError: pass
def version(*names):
    package = found(*names)
    return package.version if package else None
nccl = [f"nvidia-nccl-cu{n}" for n in (13, 12, 11)]
files = found(*nccl).files or () if found(*nccl) else ()
library = next((str(file.locate()) for file in files if file.name.startswith("libnccl.so")), None)
versions = {"sglang": version("sglang"), "torch": version("torch"), "nccl": version(*nccl)}
print(json.dumps(versions | {"nccl_library": library}))
"""
_LIST_ARGUMENTS = """
import inspect, json
from torch.multiprocessing import reductions
print(json.dumps(list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)))
"""


def _ask(python: Path, program: str, seconds: float) -> Any:
    """The JSON that `program` prints in its last line, run by the interpreter `python`."""
    try:
        done = subprocess.run(
            [str(python), "-I", "-c", program],
            env=without_other_torch(os.environ),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=True,
        )
        return json.loads(done.stdout.strip().rpartition("\n")[2])
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"no SGLang environment: {python} is no Python that can be started: {HOW_TO_MAKE}") from error
    except subprocess.CalledProcessError as error:
        said = str(error.stderr).strip().rpartition("\n")[2] or "nothing"
        raise UserError(f"{python} ended with exit status {error.returncode} ({said}): {HOW_TO_MAKE}") from error
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise UserError(f"{python} does not answer as a Python does ({error}): {HOW_TO_MAKE}") from error


def without_other_torch(base: Mapping[str, str]) -> dict[str, str]:
    """`base` for a process of the servers' environment: LD_LIBRARY_PATH without folders that hold a torch. NVIDIA's
    containers name their own torch there, and the loader would take its libraries for those of the environment."""
    folders = base.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    kept = os.pathsep.join(folder for folder in folders if not (folder and Path(folder, "libtorch.so").exists()))
    return {**base, "LD_LIBRARY_PATH": kept} if "LD_LIBRARY_PATH" in base else dict(base)


def too_old(version: str) -> bool:
    """Whether an SGLang of this version is refused; a pre-release counts as its release."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3]) < OLDEST

"""Whether an installation on top of a base image left the base's torch, Triton and Transformer Engine as they were.

    check_base.py snapshot FILE                 before it, on the base's Python: versions, places and hashes of files
    check_base.py constraints FILE PINS         constraints for pip: what the base has, then those of PINS for the rest
    check_base.py compare FILE [REQUIREMENTS]   after it, on the new Python: an error unless all is unchanged

With REQUIREMENTS, the pins of the SGLang servers, NCCL has to be theirs (`nvidia-nccl-cu13==2.30.7`): both sides of a
weight sync are in one communicator. Standard library only, because it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

NEVER_INSTALLED = re.compile(
    r"torch(-.*|vision|audio|ao|data|text)?|triton|pytorch-triton.*|transformer-engine.*|flash-attn.*|apex"
    r"|nvidia-(?!ml-py$).*|cuda-.*"
)
"""Normalised names of what is compiled for the base's CUDA: only the base may bring it. (NVML's binding is not.)"""
KEPT = re.compile(NEVER_INSTALLED.pattern + r"|nvidia-ml-py|numpy|setuptools|packaging|protobuf|grpcio|onnx")
"""What stays in the base's version if the base has it: compiled packages of the base link against these, too."""
MODULES = ("torch", "triton", "transformer_engine.pytorch", "apex")
NEEDED = ("torch", "triton")
IMPORT_SECONDS = 300.0

# The library in the process, not the one that torch was built with: they differ after LD_PRELOAD.
NCCL_PROGRAM = """
import ctypes, os, torch
version = ctypes.c_int(0)
try:
    ctypes.CDLL("libnccl.so.2", mode=os.RTLD_NOW | os.RTLD_NOLOAD).ncclGetVersion(ctypes.byref(version))
    print(f"{version.value // 10000}.{version.value // 100 % 100}.{version.value % 100}")
except (OSError, AttributeError):  # linked into torch statically
    print(".".join(map(str, torch.cuda.nccl.version())))
"""


class BaseError(Exception):
    """The base or what was installed on it is not as it has to be."""


class Imported(NamedTuple):
    """A module's file (None: there is no such module) and why it cannot be imported (None: it can)."""

    origin: str | None
    error: str | None


def normalised(name: str) -> str:
    """A distribution's name as PEP 503 compares it: `Transformer_Engine` -> `transformer-engine`."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(names: re.Pattern[str]) -> Iterator[tuple[str, metadata.Distribution]]:
    """(normalised name, distribution) of all that matches, as this Python sees it: the first on the path counts."""
    seen: set[str] = set()
    for found in metadata.distributions():
        name = normalised(found.metadata["Name"] or "")
        if name not in seen and names.fullmatch(name):
            seen.add(name)
            yield name, found


def described(found: metadata.Distribution) -> dict[str, Any]:
    """Version, folder and the SHA-256 of every file that the distribution's RECORD names and that is there."""
    place = Path(str(found.locate_file(""))).resolve()
    files = {}
    for file in found.files or ():
        path = Path(str(file.locate()))
        if path.suffix != ".pyc" and path.is_file():
            with path.open("rb") as data:
                files[str(file)] = hashlib.file_digest(data, "sha256").hexdigest()
    return {"version": found.version, "place": str(place), "files": files}


def imported(module: str) -> Imported:
    """Where `module` is and whether it can be imported, in a process of its own."""
    top = util.find_spec(module.partition(".")[0])
    if top is None:
        return Imported(None, "there is no such module")
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=IMPORT_SECONDS
    )
    said = done.stderr.strip().rpartition("\n")[2] or f"exit status {done.returncode}"
    return Imported(top.origin, None if done.returncode == 0 else said)


def snapshot() -> dict[str, Any]:
    """What there is now. Raises BaseError for a base without a torch and a Triton that can be imported."""
    modules = {name: imported(name)._asdict() for name in MODULES}
    for name in NEEDED:
        if modules[name]["error"]:
            raise BaseError(
                f"{sys.executable} cannot import {name} ({modules[name]['error']}): start from an image that brings"
                " torch and Triton, such as nvcr.io/nvidia/pytorch"
            )
    return {"modules": modules, "packages": {name: described(found) for name, found in installed(KEPT)}}


def constraints(before: dict[str, Any], pins: str) -> str:
    """Constraints for pip: the base's versions, then the lines of `pins` about anything else."""
    packages = before["packages"]
    lines = [f"{name}=={packages[name]['version']}" for name in sorted(packages)]
    for line in pins.splitlines():
        name = normalised(re.split(r"[^\w.-]", line.strip())[0])
        if name and name not in packages and not NEVER_INSTALLED.fullmatch(name):
            lines.append(line.strip())
    return "\n".join(lines) + "\n"


def differences(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """A line for each package or module of the base that is not what it was, and for each that must not be new."""
    for name, was in before["packages"].items():
        now = after["packages"].get(name)
        if now is None:
            yield f"{name} {was['version']} is gone"
        elif (now["version"], now["place"]) != (was["version"], was["place"]):
            yield f"{name} is {now['version']} of {now['place']}, and was {was['version']} of {was['place']}"
        else:
            changed = [file for file, digest in was["files"].items() if now["files"].get(file) != digest]
            if changed:
                yield f"{name} {was['version']}: {len(changed)} of its files changed, the first is {changed[0]}"
    for name, now in after["packages"].items():
        if name not in before["packages"] and NEVER_INSTALLED.fullmatch(name):
            yield f"{name} {now['version']} was installed in {now['place']}: only the base may bring it"
    for name, was in before["modules"].items():
        now = after["modules"][name]
        if now["origin"] != was["origin"]:
            yield f"{name} is imported from {now['origin']}, and was from {was['origin']}"
        if now["error"] and not was["error"]:
            yield f"{name} cannot be imported any more: {now['error']}"


def unmet_requirements(distribution: str) -> Iterator[str]:
    """A line for each direct requirement of `distribution` that the environment does not satisfy: it is installed
    without its dependencies, so that pip has not looked at those that the base brings."""
    from packaging.requirements import Requirement

    for text in metadata.requires(distribution) or ():
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            if need.name in NEEDED:  # importable, see `snapshot`: some containers call it pytorch-triton
                continue
            yield f"{distribution} needs {need.name}{need.specifier}, which is not installed"
            continue
        if not need.specifier.contains(found, prereleases=True):
            yield f"{distribution} needs {need.name}{need.specifier}, and there is {found}"


def nccl_difference(requirements: str) -> str | None:
    """Why this environment's NCCL is not the one that `requirements` pins; None if it is."""
    pinned = re.search(r"^nvidia-nccl-cu\d+==(\S+)", requirements, re.MULTILINE)
    if pinned is None:
        return "the servers' requirements pin no NCCL"
    done = subprocess.run([sys.executable, "-c", NCCL_PROGRAM], capture_output=True, text=True, timeout=IMPORT_SECONDS)
    found = done.stdout.strip() or f"unknown ({done.stderr.strip().rpartition(chr(10))[2]})"
    if found == pinned[1]:
        return None
    return f"NCCL is {found}, and the SGLang servers have {pinned[1]}: weights could not be broadcast to them"


def compare(before: dict[str, Any], requirements: str | None) -> list[str]:
    """Lines that describe the environment. Raises BaseError, with all that is wrong, unless the base is unchanged and,
    with the servers' `requirements`, NCCL is theirs."""
    after = snapshot()
    wrong = [*differences(before, after), *unmet_requirements("asd_megatron")]
    nccl = None if requirements is None else nccl_difference(requirements)
    if nccl:
        wrong.append(nccl)
    if wrong:
        raise BaseError("the environment does not fit its base:" + "".join(f"\n  {line}" for line in wrong))
    lines = [f"{name} {package['version']}" for name, package in sorted(after["packages"].items())]
    absent = [f"{name}: {now['error']}" for name, now in after["modules"].items() if now["error"]]
    return [*lines, *(f"not importable here, as in the base: {line}" for line in absent)]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("snapshot", "constraints", "compare"):
        verbs.add_parser(verb).add_argument("file", type=Path)
    verbs.choices["constraints"].add_argument("pins", type=Path)
    verbs.choices["compare"].add_argument("requirements", type=Path, nargs="?")
    given = parser.parse_args(argv)
    try:
        if given.verb == "snapshot":
            given.file.write_text(json.dumps(snapshot(), indent=1))
        elif given.verb == "constraints":
            print(constraints(json.loads(given.file.read_text()), given.pins.read_text()), end="")
        else:
            requirements = given.requirements.read_text() if given.requirements else None
            print("\n".join(compare(json.loads(given.file.read_text()), requirements)))
    except (BaseError, subprocess.TimeoutExpired) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

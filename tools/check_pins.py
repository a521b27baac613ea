"""Check the pins of all environments: `python tools/check_pins.py`. Exit status 1 and a line for each fault.

* Every requirement file names exact versions, each package once (for a Python version).
* Every dependency in pyproject.toml is pinned, within its range.
* Everything that is installed for them in this environment, directly or not, is pinned in the installed version, but
  for the CUDA libraries of a build of PyTorch.

It needs no network, so that it cannot know of vulnerabilities found since: `pip-audit -r constraints.txt` asks for
those where PyPI's advisories can be reached.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
FILES = ("constraints.txt", "tools/sglang_env/*.txt", "tools/trl_env/*.txt")
UNPINNED = {"asd-megatron", "pip", "wheel"}
"""Installed without being asked for: the project, and what a new environment has."""
APART = {"transformer-engine"}
"""Comes with the container, or is built for its torch (docs/containers.md)."""
OF_BUILD = ("nvidia-", "cuda-", "pytorch-triton")
"""Beginnings of the names of what one build of PyTorch needs and another does not; that build says in which version."""


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, requirement) of a requirement file, without comments and options."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.partition(" #")[0].strip()
        if text and not text.startswith(("#", "-")):
            yield number, text


def pin_of(requirement: Requirement) -> str | None:
    """The exact version that it asks for; None for anything else, `==2.*` too."""
    (*specifiers,) = requirement.specifier
    exact = len(specifiers) == 1 and specifiers[0].operator in ("==", "===") and "*" not in specifiers[0].version
    return specifiers[0].version if exact else None


def file_faults(path: Path) -> Iterator[str]:
    """What is wrong with the lines of one requirement file."""
    seen: dict[tuple[str, str], int] = {}
    for number, text in lines(path):
        where = f"{path.relative_to(ROOT)}:{number}"
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            yield f"{where}: {text!r} is no requirement: {error}"
            continue
        if requirement.url is None and pin_of(requirement) is None:
            yield f"{where}: {text!r} is no exact version: write NAME==VERSION"
        key = canonicalize_name(requirement.name), str(requirement.marker)
        if key in seen:
            yield f"{where}: {requirement.name} is pinned in line {seen[key]} already: remove one of them"
        seen[key] = number


def constraints(path: Path) -> dict[str, str]:
    """Version by name, of the lines that are for the running Python."""
    found = {}
    for _, text in lines(path):
        requirement = Requirement(text)
        version = pin_of(requirement)
        if version is not None and (requirement.marker is None or requirement.marker.evaluate()):
            found[canonicalize_name(requirement.name)] = version
    return found


def declared() -> list[Requirement]:
    """The dependencies in pyproject.toml, of all extras, that are for the running Python and installed from pins."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    given = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    found = (one for one in map(Requirement, given) if one.marker is None or one.marker.evaluate())
    return [one for one in found if canonicalize_name(one.name) not in UNPINNED | APART]


def installed() -> dict[str, str]:
    """Version by name of what is installed of the declared dependencies and of all that these need."""
    found: dict[str, str] = {}
    waiting = declared()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found or name.startswith(OF_BUILD):
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # of an extra that was not asked for
            continue
        found[name] = distribution.version
        extras = ["", *requirement.extras]
        for needed in map(Requirement, distribution.requires or ()):
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(needed)
    return found


def range_faults(pins: dict[str, str]) -> Iterator[str]:
    """Declared dependencies without a pin, or with one outside of their range."""
    for requirement in declared():
        name = canonicalize_name(requirement.name)
        if name not in pins:
            yield f"pyproject.toml: {requirement.name} has no pin in constraints.txt: add one"
        elif not requirement.specifier.contains(pins[name], prereleases=True):
            yield f"pyproject.toml asks for {requirement}, and constraints.txt pins {pins[name]}: change one of them"


def installed_faults(pins: dict[str, str]) -> Iterator[str]:
    """Installed distributions that are not pinned, or in another version (`2.13.0+cpu` is 2.13.0)."""
    for name, version in installed().items():
        if name not in pins:
            yield f"{name} {version} is installed and not pinned: add {name}=={version} to constraints.txt"
        elif version.partition("+")[0] != pins[name].partition("+")[0]:
            yield f"{name} is installed as {version}, and constraints.txt pins {pins[name]}: install with that"


def main() -> int:
    files = [path for pattern in FILES for path in sorted(ROOT.glob(pattern))]
    faults = [fault for path in files for fault in file_faults(path)]
    if not faults:
        pins = constraints(ROOT / "constraints.txt")
        faults = [*range_faults(pins), *installed_faults(pins)]
    for fault in sorted(set(faults)):
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

"""The stand-in's signatures against the Python sources in Transformer Engine's wheels (PyPI; pure Python, no CUDA)."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from asd_megatron.models.te import TESTED
from tests.te_double import STAND_IN

OWN = {"__init__.py"}  # re-exports
ATTENTION = "pytorch/attention/dot_product_attention/dot_product_attention.py"
OTHERS = {  # parameters of the stand-in's release that others name differently, or do not have; nobody passes them
    "pytorch/module/grouped_linear.py:GroupedLinear.__init__": {"name"},
    "pytorch/optimizers/fused_adam.py:FusedAdam.__init__": {"master_weight_dtype"},
    "pytorch/tensor/utils.py:cast_master_weights_to_fp8": {"manual_post_all_gather_processing"},
    f"{ATTENTION}:DotProductAttention.forward": {"num_splits"},
}


class Parameter(NamedTuple):
    name: str
    keyword_only: bool
    has_default: bool


Signatures = dict[str, list[Parameter]]


def release_of_stand_in() -> tuple[int, int]:
    text = (STAND_IN / "__init__.py").read_text()
    version = next(line for line in text.splitlines() if line.startswith("__version__"))
    major, minor, _ = version.split('"')[1].split(".")
    return int(major), int(minor)


def signatures(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, list[Parameter]]]:
    """Of the functions and methods that others call, by qualified name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If | ast.Try):
            yield from signatures(node, prefix)
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from signatures(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef) and (node.name == "__init__" or not node.name.startswith("_")):
            yield prefix + node.name, parameters(node.args)


def parameters(arguments: ast.arguments) -> list[Parameter]:
    positional = [*arguments.posonlyargs, *arguments.args]
    without = len(positional) - len(arguments.defaults)
    found = [Parameter(a.arg, False, i >= without) for i, a in enumerate(positional)]
    found += [
        Parameter(a.arg, True, default is not None)
        for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    return [*found, *(Parameter("**", True, True) for _ in [arguments.kwarg] if arguments.kwarg is not None)]


@pytest.fixture(scope="module")
def stand_in() -> dict[str, Signatures]:
    paths = [p for p in STAND_IN.rglob("*.py") if p.name not in OWN]
    return {str(p.relative_to(STAND_IN)): dict(signatures(ast.parse(p.read_text()))) for p in paths}


def wheel(release: tuple[int, ...], folder: Path) -> zipfile.ZipFile:
    """Of a release's newest patch. Skips the test where it cannot be downloaded."""
    name = f"transformer_engine=={'.'.join(map(str, release))}.*"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = sorted(folder.glob("transformer_engine-*.whl"))
    if not found:
        pytest.skip(f"{name} cannot be downloaded from the package index: {done.stderr.strip()[-300:]}")
    return zipfile.ZipFile(io.BytesIO(found[-1].read_bytes()))


def real(archive: zipfile.ZipFile, path: str) -> Signatures | None:
    """Of a wheel's file; None if there is none."""
    name = f"transformer_engine/{path}"
    return dict(signatures(ast.parse(archive.read(name)))) if name in archive.namelist() else None


def pairs(
    archive: zipfile.ZipFile, ours: dict[str, Signatures]
) -> Iterator[tuple[str, list[Parameter], list[Parameter]]]:
    """What the stand-in and the wheel have both: where, the stand-in's parameters, the wheel's."""
    for path, functions in ours.items():
        theirs = real(archive, path) or {}
        for name, parameters in functions.items():
            if name in theirs:
                yield f"{path}:{name}", parameters, theirs[name]


def test_every_signature_is_its_release_s(stand_in: dict[str, Signatures], tmp_path: Path) -> None:
    archive = wheel(release_of_stand_in(), tmp_path)
    compared = {where: (ours, theirs) for where, ours, theirs in pairs(archive, stand_in)}
    assert {where: both for where, both in compared.items() if both[0] != both[1]} == {}
    assert {  # what Megatron-Core calls
        "pytorch/module/linear.py:Linear.__init__",
        "pytorch/module/linear.py:Linear.forward",
        "pytorch/module/layernorm_linear.py:LayerNormLinear.__init__",
        "pytorch/module/layernorm_linear.py:LayerNormLinear.forward",
        "pytorch/module/grouped_linear.py:GroupedLinear.__init__",
        "pytorch/module/grouped_linear.py:GroupedLinear.forward",
        "pytorch/module/rmsnorm.py:RMSNorm.__init__",
        "pytorch/module/fp8_padding.py:Fp8Padding.forward",
        "pytorch/module/fp8_unpadding.py:Fp8Unpadding.forward",
        f"{ATTENTION}:DotProductAttention.__init__",
        f"{ATTENTION}:DotProductAttention.forward",
        "pytorch/attention/rope.py:apply_rotary_pos_emb",
        "pytorch/permutation.py:moe_permute_with_probs",
        "pytorch/permutation.py:moe_unpermute",
        "pytorch/optimizers/fused_adam.py:FusedAdam.__init__",
        "pytorch/optimizers/fused_adam.py:FusedAdam.step",
        "pytorch/quantization.py:fp8_autocast",
        "pytorch/quantization.py:fp8_model_init",
        "pytorch/tensor/utils.py:cast_master_weights_to_fp8",
    } <= set(compared)


RELEASES = sorted({release for window in TESTED.values() for release in window} - {release_of_stand_in()})


@pytest.mark.parametrize("release", RELEASES, ids=lambda r: ".".join(map(str, r)))
def test_the_other_tested_releases_accept_the_same_names(
    release: tuple[int, ...], stand_in: dict[str, Signatures], tmp_path: Path
) -> None:
    """The oldest and the newest release that is tested with a megatron-core: a keyword that works with the stand-in
    works there."""
    missing = {}
    for where, ours, theirs in pairs(wheel(release, tmp_path), stand_in):
        accepted = {p.name for p in theirs}
        lost = {p.name for p in ours} - accepted - OTHERS.get(where, set())
        if lost and "**" not in accepted:
            missing[where] = lost
    assert missing == {}

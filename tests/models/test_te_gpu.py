"""The installed Transformer Engine beside the stand-in that the CPU tests run with: arguments by `inspect`."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from tests.te_double import STAND_IN, run_ranks_with_te
from tests.te_double.test_signatures import ATTENTION, OTHERS, OWN, signatures

CALLED = {  # whatever the release
    "pytorch/module/linear.py:Linear.__init__",
    "pytorch/module/linear.py:Linear.forward",
    "pytorch/module/layernorm_linear.py:LayerNormLinear.__init__",
    "pytorch/module/layernorm_linear.py:LayerNormLinear.forward",
    "pytorch/module/grouped_linear.py:GroupedLinear.__init__",
    "pytorch/module/rmsnorm.py:RMSNorm.__init__",
    f"{ATTENTION}:DotProductAttention.__init__",
    f"{ATTENTION}:DotProductAttention.forward",
    "pytorch/optimizers/fused_adam.py:FusedAdam.__init__",
}

BOUND = {"self", "cls"}


def compare() -> dict[str, set[str]]:
    """By what the stand-in and the importable package both have: the parameters that only the stand-in has."""
    found = {}
    for path in STAND_IN.rglob("*.py"):
        if path.name in OWN:
            continue
        relative = path.relative_to(STAND_IN)
        try:
            module = importlib.import_module(".".join(["transformer_engine", *relative.with_suffix("").parts]))
        except ImportError:  # of another release's layout
            continue
        for name, ours in signatures(ast.parse(path.read_text())):
            theirs = _parameters(module, name)
            if theirs is not None:
                where = f"{relative}:{name}"
                known = theirs | BOUND | OTHERS.get(where, set())
                found[where] = set() if "**" in theirs else {p.name for p in ours} - known
    return found


def _parameters(module: Any, name: str) -> set[str] | None:
    """Of a function or method by qualified name, "**" for any keyword; None if there is none."""
    target = module
    for part in name.split("."):
        target = getattr(target, part, None)
    if target is None:
        return None
    parameters = inspect.signature(target).parameters.values()
    return {"**" if p.kind is p.VAR_KEYWORD else p.name for p in parameters}


def lost(found: dict[str, set[str]]) -> dict[str, set[str]]:
    return {where: names for where, names in found.items() if names}


@pytest.mark.gpu
def test_the_installed_release_takes_the_stand_in_s_arguments(record_property: Callable[[str, object], None]) -> None:
    from asd_megatron.models import te

    found = compare()
    record_property("release", ".".join(map(str, te.version())))
    record_property("compared", len(found))
    assert lost(found) == {} and set(found) >= CALLED


def _on_the_stand_in(rank: int) -> tuple[dict[str, set[str]], ...]:
    before = compare()
    from transformer_engine.pytorch.module.linear import Linear

    def renamed(self: Any, in_features: int, out_features: int) -> None: ...

    Linear.__init__ = renamed
    return before, compare()


def test_a_renamed_argument_is_found() -> None:
    before, after = run_ranks_with_te(_on_the_stand_in, 1)[0]
    assert lost(before) == {} and set(before) >= CALLED
    assert list(lost(after)) == ["pytorch/module/linear.py:Linear.__init__"]
    assert "sequence_parallel" in after["pytorch/module/linear.py:Linear.__init__"]

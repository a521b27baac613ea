"""Model families: one declarative file each, whose `FAMILY` is found by being in this folder."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from asd_megatron.errors import UserError
from asd_megatron.models.family import Family, ModelShape
from asd_megatron.models.hf_config import shown

__all__ = ["Family", "ModelShape", "check_architecture", "families", "family_of", "shape_of"]


@cache
def families() -> tuple[Family, ...]:
    """All families, by file name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return tuple(importlib.import_module(f"{__name__}.{name}").FAMILY for name in names)


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face config, by its `architectures`. Raises UserError, listing what is supported."""
    found = hf_config.get("architectures") or ()
    if not isinstance(found, list | tuple) or not all(isinstance(name, str) for name in found):
        raise UserError(f"config.json: architectures is {shown(found)}, expected a list of names; download it again")
    for family in families():
        if set(found) & set(family.architectures):
            return family
    known = ", ".join(name for family in families() for name in family.architectures)
    raise UserError(
        f"config.json names the architecture {', '.join(found) or '(none)'}, which is not supported; "
        f"supported are {known}"
    )


def check_architecture(hf_config: Mapping[str, Any]) -> None:
    """Refuse (UserError) a Hugging Face config whose model cannot be trained: an unsupported architecture, options and
    sizes that it cannot have. Builds nothing and needs no ranks.
    """
    shape_of(hf_config)


def shape_of(hf_config: Mapping[str, Any]) -> tuple[Family, ModelShape]:
    """The family of a Hugging Face config and its translation. Raises UserError for an architecture or a setting that
    is not supported, and for values of the wrong kind. Needs no device."""
    family = family_of(hf_config)
    try:
        return family, family.translate(hf_config)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"config.json holds a value of the wrong kind: {error}") from None

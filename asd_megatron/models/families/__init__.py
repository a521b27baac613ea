"""Model families: one declarative file each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asd_megatron.errors import UserError
from asd_megatron.models.families.family import Family, ModelShape
from asd_megatron.models.families.llama import LLAMA
from asd_megatron.models.families.qwen3 import QWEN3
from asd_megatron.models.hf_config import shown

FAMILIES: tuple[Family, ...] = (QWEN3, LLAMA)

__all__ = ["FAMILIES", "Family", "ModelShape", "check_architecture", "family_of", "shape_of"]


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face config, by its `architectures`. Raises UserError, listing what is supported."""
    found = hf_config.get("architectures") or ()
    if not isinstance(found, list | tuple) or not all(isinstance(name, str) for name in found):
        raise UserError(f"config.json: architectures is {shown(found)}, expected a list of names; download it again")
    for family in FAMILIES:
        if set(found) & set(family.architectures):
            return family
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
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

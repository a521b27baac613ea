"""YAML 1.2 scalars: `1e-6` is a number, `on` and `no` are text. A key given twice is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from asd_megatron.errors import UserError

MAX_DEPTH = 100  # nesting; far below Python's recursion limit, and PyYAML's time grows with its square
SHOWN_FILES = 8  # of a folder that was given instead of a file
MAX_DIGITS = 21  # of a 64-bit number with its sign
MAX_BYTES = 4 << 20  # of a file; a recipe has a few thousand
MAX_VALUES = 100_000  # of a document, every alias (`*name`) counted as what it stands for


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Nodes are composed as the text is read: what is nested too deeply is not read to its end."""
        if self.depth > MAX_DEPTH:
            raise ComposerError(None, None, f"nested too deeply (at most {MAX_DEPTH})", self.peek_event().start_mark)
        self.depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_document(self, node: yaml.Node) -> Any:
        self._count_values(node, {})
        return super().construct_document(node)

    def _count_values(self, node: yaml.Node, counted: dict[int, int | None]) -> int:
        """How many values a node holds, itself included. Nested aliases multiply: nine lists of ten aliases of the one
        before are 10^9 values, which a copy would write out, and an alias of what it stands in never ends."""
        if id(node) in counted:
            known = counted[id(node)]
            if known is None:
                raise ComposerError(None, None, "an alias inside of what it stands for", node.start_mark)
            return known
        counted[id(node)] = None
        inner = node.value if isinstance(node, yaml.SequenceNode) else ()
        if isinstance(node, yaml.MappingNode):
            self._refuse_duplicates(node)
            inner = [part for pair in node.value for part in pair]
        total = 1 + sum(self._count_values(part, counted) for part in inner)
        if total > MAX_VALUES:
            raise ComposerError(None, None, f"more than {MAX_VALUES:,} values, aliases included", node.start_mark)
        counted[id(node)] = total
        return total

    @staticmethod
    def _refuse_duplicates(node: yaml.MappingNode) -> None:
        """Of the text as it is written: later, PyYAML puts merged keys (`<<: *name`) in front of a mapping's own."""
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                continue
            if key.value in seen:
                line = seen[key.value]
                raise ConstructorError(
                    None, None, f"{key.value!r} is given twice (first in line {line})", key.start_mark
                )
            seen[key.value] = key.start_mark.line + 1

    def construct_whole_number(self, node: yaml.ScalarNode) -> int:
        """A whole number of at most 64 bits. Nothing in a recipe is larger; Python itself refuses very long ones."""
        value = int(node.value) if len(node.value) <= MAX_DIGITS else 2**64
        if not -(2**63) <= value < 2**64:
            raise ConstructorError(None, None, "a whole number of more than 64 bits", node.start_mark)
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole_number)
_FLOAT = re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$")
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9]\d*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])


def parse_yaml(text: str, source: str) -> Any:
    """Parse one YAML document. Raises UserError that names `source`, the line and the column."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except RecursionError:
        raise UserError(f"{source}: not valid YAML: nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}, line {mark.line + 1}, column {mark.column + 1}" if mark else source
        raise UserError(f"{where}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {error}") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:  # `!!float x` and the like
        raise UserError(f"{source}: a value does not fit its YAML tag: {error}") from None


def read_yaml(path: Path, what: str) -> Any:
    """Parse the YAML file of a recipe or the like; messages call it `WHAT PATH`.

    Raises UserError for a missing or unreadable file, for a folder, naming the YAML files in it, and for a YAML error
    (with its line).
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UserError(f"{what} {path} has more than {MAX_BYTES >> 20} MiB, so it is no {what}: check the path")
        text = data.decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist (from {Path.cwd()}): check the path") from None
    except IsADirectoryError:
        raise UserError(f"{what} {path} is a folder: {_files_in(path, what)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path} cannot be read: {error}") from None
    return parse_yaml(text, f"{what} {path}")


def _files_in(folder: Path, what: str) -> str:
    """Which YAML file to give instead of `folder`: `recipe.yaml` for a recipe, as a run leaves it, else all of them."""
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix in (".yaml", ".yml") and path.is_file())
    except OSError as error:
        return f"it cannot be listed ({error.strerror or error}); give a YAML file"
    own = [path for path in found if path.stem == what]
    if not found:
        return f"it has no YAML file in it; give the {what}'s file"
    if own or len(found) == 1:
        return f"give the {what} in it, {(own or found)[0]}"
    return f"give one of the files in it: {', '.join(path.name for path in found[:SHOWN_FILES])}" + (
        f" and {len(found) - SHOWN_FILES} more" if len(found) > SHOWN_FILES else ""
    )


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read back as text."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def to_yaml(values: Any) -> str:
    """`values` as block YAML, keys in their order; `parse_yaml` reads it back equal."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=120)

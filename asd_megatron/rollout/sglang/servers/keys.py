"""The two keys of SGLang servers, and the file that hands them from one node to another."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from asd_megatron.errors import UserError
from asd_megatron.files import atomic_file, read_private
from asd_megatron.rollout.sglang.client.api import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE

# Keys are printable ASCII: they become HTTP headers.
LINE = re.compile(r"(?:export\s+)?(?P<name>\w+)=(?P<quote>['\"]?)(?P<value>[!#-&(-~]+)(?P=quote)")


@dataclass(frozen=True)
class Keys:
    """The servers' keys: one for generation, one for administration. "": none."""

    api: str = field(repr=False)
    admin: str = field(repr=False)

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Keys:
        """Those of the environment variables."""
        return cls(environment.get(API_KEY_VARIABLE, ""), environment.get(ADMIN_KEY_VARIABLE, ""))

    @classmethod
    def new(cls) -> Keys:
        """Random ones."""
        return cls(secrets.token_urlsafe(32), secrets.token_urlsafe(32))

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Those in a file as `write` makes it. Raises UserError if the file is missing, if others than its owner may
        read it, or if it has not both keys.
        """
        text = read_private(path, "the servers' keys", "name the file of `serve`, keys.env")
        found = {
            match["name"]: match["value"] for match in map(LINE.fullmatch, map(str.strip, text.split("\n"))) if match
        }
        keys = cls.of_environment(found)
        if not (keys.api and keys.admin):
            raise UserError(
                f"the file of the servers' keys {path} has not both keys: it needs the lines"
                f" {API_KEY_VARIABLE}=... and {ADMIN_KEY_VARIABLE}=..., as `asd-megatron serve` writes them (keys.env)"
            )
        keys.check(str(path))
        return keys

    def check(self, where: str) -> None:
        """Raise UserError if both are the same. `where` they were found, for the message."""
        if self.api and self.api == self.admin:
            raise UserError(
                f"{API_KEY_VARIABLE} and {ADMIN_KEY_VARIABLE} are the same ({where}), so that whoever may generate"
                " could administer the servers: set two different ones"
            )

    def write(self, path: Path) -> None:
        """Shell commands that export both, in a file that its owner alone can read."""
        with atomic_file(path) as partial:
            partial.touch(mode=0o600)
            partial.write_text(f"export {API_KEY_VARIABLE}={self.api}\nexport {ADMIN_KEY_VARIABLE}={self.admin}\n")

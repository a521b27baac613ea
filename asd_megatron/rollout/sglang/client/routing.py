"""Routed experts: to which experts of each layer SGLang sent the tokens of an answer.

A server started with `--enable-return-routed-experts` keeps the ids of every cached token beside its KV cache, and
returns those of a finished request as base64 in `meta_info.routed_experts`: int32 [tokens - 1, layers, top_k], for
prompt and response but the last token, the most probable expert first. Tokens that came from the prefix cache are among
them, with the routes of the pass that computed them; the cache is dropped at every weight update. Aborted requests have
them too. A server without the flag ignores the request. Checked against SGLang 0.5.23.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

SERVER_ARGUMENT = "enable-return-routed-experts"


@dataclass(frozen=True)
class Routing:
    """The mixture of experts of a model: `experts` in each of `layers` layers, `per_token` of them for a token."""

    layers: int
    experts: int
    per_token: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Routing | None:
        """From a config.json; None for a model without experts."""
        experts = config.get("num_experts") or config.get("num_local_experts")
        if not experts:
            return None
        return cls(int(config["num_hidden_layers"]), int(experts), int(config["num_experts_per_tok"]))

    def read(self, encoded: object, tokens: int) -> np.ndarray[Any, Any]:
        """The routed experts of an answer: int16 [tokens - 1, layers, per_token]. `encoded`: what the server returned;
        `tokens`: of prompt and response. Raises ValueError if it is not of this model and these tokens."""
        if encoded is None:
            raise ValueError(f"it has none: was the server started with --{SERVER_ARGUMENT}?")
        if not isinstance(encoded, str):
            raise ValueError(f"they are a {type(encoded).__name__}, not base64")
        try:
            data = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"they are no base64 ({error})") from error
        shape = (tokens - 1, self.layers, self.per_token)
        if len(data) != 4 * np.prod(shape, dtype=np.int64):
            raise ValueError(f"they are {len(data)} bytes, not int32 {list(shape)}")
        ids = np.frombuffer(data, dtype="<i4").reshape(shape)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.experts:
            raise ValueError(f"they are {ids.min()} to {ids.max()}, and a layer has {self.experts} experts")
        if (np.diff(np.sort(ids, -1), axis=-1) == 0).any():
            raise ValueError("they name an expert twice for one token of one layer")
        return ids.astype(np.int16)

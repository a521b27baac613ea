"""Receivers over urllib, models whose weights are sent, and what Hugging Face says of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.rollout.sglang.sglang_world import ADMIN_KEY, API_KEY, request

PROBE_IDS = (3, 17, 5, 42, 60, 8, 8, 25)
Named = list[tuple[str, Tensor]]


class HttpError(Exception):
    """A server answered an HTTP error."""


@dataclass(frozen=True)
class HttpReceiver:
    """A real server."""

    url: str
    tensor_parallel: int = 1

    def call(self, path: str, body: dict[str, Any], timeout: float) -> dict[str, Any]:
        key = API_KEY if path == "/generate" else ADMIN_KEY
        status, answer = request(self.url, path, body, key=key, timeout=timeout)
        if status != 200:
            raise HttpError(f"{path}: {status} {answer}")
        return answer if isinstance(answer, dict) else {"text": answer}

    def label(self) -> str:
        return str(request(self.url, "/model_info", key=API_KEY)[1]["weight_version"])


class FakeReceiver:
    """Answers from a function, or `{}`; remembers the paths and bodies."""

    def __init__(
        self, url: str = "http://fake", answer: Callable[[str, dict[str, Any]], dict[str, Any]] | None = None
    ) -> None:
        self.url, self.tensor_parallel = url, 1
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self._answer = answer or (lambda path, body: {})
        self._lock = threading.Lock()

    def call(self, path: str, body: dict[str, Any], timeout: float) -> dict[str, Any]:
        with self._lock:
            self.calls.append((path, body))
        return self._answer(path, body)

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.calls]


@cache
def model(folder: Path, seed: int) -> Any:
    """`folder`'s model with other weights: those of a random draw."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    drawn = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float()
    with torch.no_grad():
        for name, parameter in drawn.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape))
            elif name.endswith(".bias"):
                parameter.copy_(0.2 * torch.randn(parameter.shape))
    return drawn


def tensors(folder: Path, seed: int) -> Named:
    """All of them in the order of the forward pass, as an export gives them: each expert by itself."""
    drawn = model(folder, seed)
    tied = drawn.config.tie_word_embeddings
    found = [(n, t.detach().clone()) for n, t in drawn.state_dict().items() if not (tied and n == "lm_head.weight")]
    order = ("embed_tokens", "layers", "model.norm", "lm_head")
    found.sort(key=lambda item: next(i for i, part in enumerate(order) if part in item[0]))
    return [single for name, tensor in found for single in _unfused(name, tensor)]


def partly_changed(stream: Named, seed: int) -> Named:
    """Copies with other values in one element of fifty; the norms stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (name, tensor.clone() if "norm" in name else torch.where(_drawn(tensor, generator), -tensor, tensor))
        for name, tensor in stream
    ]


def _drawn(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(tensor.shape, generator=generator) < 0.02


def _unfused(name: str, tensor: Tensor) -> Named:
    """The experts that transformers 5 keeps in one tensor, by their published names."""
    at, _, last = name.rpartition(".")
    if not at.endswith(".experts"):
        return [(name, tensor)]
    kinds = ("gate", "up") if last == "gate_up_proj" else ("down",)
    return [
        (f"{at}.{e}.{kind}_proj.weight", part)
        for e, expert in enumerate(tensor)
        for kind, part in zip(kinds, expert.chunk(len(kinds)), strict=True)
    ]


def logprobs(folder: Path, seed: int, ids: tuple[int, ...] = PROBE_IDS) -> tuple[float, ...]:
    """Of `ids[1:]`, by Hugging Face."""
    with torch.no_grad():
        rows = model(folder, seed)(torch.tensor([ids])).logits[0].log_softmax(-1)
    return tuple(rows[i, token].item() for i, token in enumerate(ids[1:]))


def watched(stream: Named, at: int, action: Callable[[], None]) -> Iterator[tuple[str, Tensor]]:
    """`stream`, with `action` called before its tensor number `at`."""
    for number, item in enumerate(stream):
        if number == at:
            action()
        yield item

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from asd_megatron.checks.cases import write_tiny_model
from asd_megatron.distributed import layout as layouts
from tests.reference.dense import exact
from tests.trainer.product import Product


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parity check's random four-layer Qwen3 as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder, "untied")
    return folder


@pytest.fixture(scope="module")
def product(tiny_folder: Path) -> Iterator[Product]:
    """That model in this process, alone."""
    yield Product(tiny_folder)
    layouts.shutdown()


@pytest.fixture(scope="module")
def dense(tiny_folder: Path) -> Any:
    """That model by `transformers`, in float64."""
    from transformers import AutoModelForCausalLM

    return exact(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32))

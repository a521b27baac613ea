"""How many ranks a machine gets, on which GPUs, and what is said about it."""

from __future__ import annotations

import pytest

from asd_megatron.cli.placement import Placement, place, placement_text
from asd_megatron.config import AnyRecipe, make_recipe
from asd_megatron.errors import UserError

SGLANG = ["--rollout.engine", "sglang", "--rollout.servers", "2", "--rollout.server_tensor_parallel", "2"]
SERVERS = [*SGLANG, "--rollout.server_devices", '["4,5", "6,7"]']
TP2 = ["--parallelism.tensor", "2"]
EP4 = ["--parallelism.expert", "4"]


def recipe(*overrides: str) -> AnyRecipe:
    return make_recipe({"model": {"path": "m"}, "data": {"train": "t"}}, overrides)


@pytest.mark.parametrize(
    ("overrides", "gpus", "visible", "ranks", "devices"),
    [
        ([], 8, None, 8, "01234567"),
        (TP2, 8, None, 8, "01234567"),
        (["--parallelism.pipeline", "3"], 8, None, 6, "012345"),
        ([*TP2, "--parallelism.data", "1"], 8, None, 2, "01"),
        ([*TP2, *SERVERS], 8, None, 4, "0123"),
        (SERVERS, 4, "0,1,2,3", 4, "0123"),
        (SERVERS, 6, "2,3,4,5,6,7", 2, "23"),
        (["--parallelism.data", "2"], 4, "7,6,5,4", 2, "76"),
        (TP2, 0, None, 2, ""),
        ([*TP2, "--parallelism.data", "3"], 0, None, 6, ""),
        ([*TP2, *EP4], 0, None, 4, ""),  # the experts of a layer need two data-parallel ranks
        ([*TP2, *EP4], 7, None, 4, "0123"),
    ],
)
def test_data_parallelism_fills_the_gpus_that_no_server_has(
    overrides: list[str], gpus: int, visible: str | None, ranks: int, devices: str
) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    placement = place(recipe(*overrides), gpus, environment)
    assert placement.ranks == ranks and placement.devices == tuple(devices)
    placement.apply(environment)
    if placement.servers:  # rank i takes the i-th GPU that it sees
        assert environment["CUDA_VISIBLE_DEVICES"] == ",".join(devices)
    else:
        assert environment.get("CUDA_VISIBLE_DEVICES") == visible


@pytest.mark.parametrize(
    ("overrides", "gpus", "words"),
    [
        (["--parallelism.tensor", "4"], 2, ["needs 4 ranks", "2 GPUs", "parallelism"]),
        ([*TP2, *EP4], 2, ["needs 4 ranks", "2 GPUs"]),
        ([*EP4, "--parallelism.data", "6"], 8, ["expert 4 does not divide the 6 ranks", "parallelism.data"]),
        (["--parallelism.data", "5", *SERVERS], 8, ["needs 5 ranks", "8 GPUs", "4 of them in rollout.server_devices"]),
    ],
)
def test_what_does_not_fit(overrides: list[str], gpus: int, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        place(recipe(*overrides), gpus, {})
    assert all(word in str(error.value) for word in words)


def test_what_is_said() -> None:
    def text(*overrides: str, gpus: int) -> str:
        asked = recipe(*overrides)
        return placement_text(asked, place(asked, gpus, {}))

    assert text(*TP2, *SERVERS, gpus=8) == (
        "4 ranks on GPUs 0, 1, 2, 3 (tensor 2 x data 2); SGLang servers on GPUs 4, 5, 6, 7"
    )
    assert "GPU 2 unused" in text(*TP2, gpus=3) and "GPU 1 unused (parallelism.data" in text(
        "--parallelism.data", "1", gpus=2
    )
    assert text(gpus=0) == "1 rank on the CPU: no CUDA device found"
    said = text("--model.dtype", "bfloat16", "--precision.fp8", "blockwise", *SERVERS, gpus=0)
    for key in ("on the CPU", "model.dtype bfloat16", "precision.fp8 blockwise", "rollout.server_devices"):
        assert key in said, said
    assert placement_text(recipe(), Placement(1, ("3",))) == "1 rank on GPU 3"

"""Checkpoints of Transformer Engine's layers and optimizer: interchange with local layers, extra states, an Adam
without state."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any, Literal

import torch

from tests.checkpoint import megatron_writer
from tests.checkpoint.test_te_gpu import interchange
from tests.checkpoint.trainer import MOE, Trainer
from tests.distributed.harness import run_ranks
from tests.te_double import run_ranks_with_te

EXTRA = "decoder.final_layernorm._extra_state"
LAYERS: tuple[Literal["local", "te"], ...] = ("local", "te")


class _Touch:
    """Creates a folder when unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def _hostile(mark: Path) -> None:
    """Every module of the stand-in stores an extra state that would create `mark`."""
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    payload = bytearray(pickle.dumps(_Touch(str(mark))))
    TransformerEngineBaseModule.get_extra_state = lambda self: torch.frombuffer(payload, dtype=torch.uint8)


def _in_one_process(rank: int, folder: str) -> None:
    assert interchange(rank, f"{folder}/bfloat16") == ["FusedAdam", "FusedAdam"]
    _interchange_with_extra_states(Path(folder) / "extra")


def _interchange_with_extra_states(root: Path) -> None:
    mark = root / "executed"
    _hostile(mark)
    cases: list[tuple[bool, dict[str, Any]]] = [(False, {}), (True, {}), (False, MOE)]
    for number, (distributed, model) in enumerate(cases):
        saved, expected = {}, {}
        for layers in LAYERS:
            first = Trainer({}, distributed, 1, layers=layers, **model)
            first.steps(range(2))
            saved[layers] = first.save(root / f"{number}_{layers}", 2)
            if layers == "te" and model:  # experts: every kind of module
                saved["crafted"] = _with_extra_states(first, root / f"{number}_crafted")
            first.steps(range(2, 4))
            expected[layers] = first.weights()
        for path in saved.values():
            for layers in LAYERS:
                again = Trainer({}, distributed, 2, layers=layers, **model)
                again.load(path)
                again.steps(range(2, 4))
                for name, found in again.weights().items():
                    torch.testing.assert_close(found, expected[layers][name], rtol=0, atol=2e-6, msg=f"{path} {name}")
    assert not mark.exists()


def _with_extra_states(trainer: Trainer, folder: Path) -> Path:
    """A checkpoint with them, as others write it."""
    crafted = megatron_writer.save_training(folder, trainer, extra_states=True)
    assert EXTRA.encode() in (crafted / ".metadata").read_bytes()
    if (crafted / "common.pt").is_file():  # of Megatron-Core 0.16.1
        common = torch.load(crafted / "common.pt")
        common["model"] = {EXTRA: trainer.port.chunks[0].module.decoder.final_layernorm.get_extra_state()}
        torch.save(common, crafted / "common.pt")
    return crafted


def test_layers_read_each_other_s_checkpoints_and_no_extra_states(tmp_path: Path) -> None:
    run_ranks_with_te(_in_one_process, 1, str(tmp_path))


def _before_the_first_update(rank: int, folder: str, layers: Literal["local", "te"]) -> None:
    cases = [(False, torch.float32), (False, torch.bfloat16), (True, torch.float32)]
    for distributed, dtype in cases:
        straight = Trainer({}, distributed, 1, dtype, layers=layers)
        root = Path(folder) / f"{distributed}_{dtype}"
        before = straight.save(root, 1)
        straight.steps(range(2))
        want = straight.weights()
        for used in (False, True):
            again = Trainer({}, distributed, 2, dtype, layers=layers)
            again.steps(range(7, 9) if used else range(0))
            again.load(before)
            again.steps(range(2))
            got = again.weights()
            assert all(torch.equal(got[n], want[n]) for n in want), (distributed, dtype, used)
    kinds = {
        type(part.optimizer).__name__ for part in getattr(again.optimizer, "chained_optimizers", [again.optimizer])
    }
    assert (kinds == {"FusedAdam"}) == (layers == "te")


def test_a_checkpoint_before_the_first_update_loads(tmp_path: Path) -> None:
    """Transformer Engine's Adam has no state until then, and counts steps by group."""
    run_ranks(_before_the_first_update, 1, str(tmp_path / "torch"), "local")
    run_ranks_with_te(_before_the_first_update, 1, str(tmp_path / "fused"), "te")

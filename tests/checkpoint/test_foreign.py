"""Checkpoints of modules and optimizers that are not ours: Transformer Engine's extra states, an Adam without state."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from asd_megatron.checkpoint import training
from tests.checkpoint.trainer import Trainer
from tests.distributed.harness import run_ranks

EXTRA = "decoder.final_layernorm._extra_state"


class _Touch:
    """Creates a folder when unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


class _Norm(torch.nn.Module):
    """Transformer Engine's way with extra states: a pickle in a tensor of bytes."""

    payload: Any = None

    def get_extra_state(self) -> torch.Tensor:
        return torch.frombuffer(bytearray(pickle.dumps(self.payload)), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        pickle.load(io.BytesIO(state.numpy().tobytes()))


def _with_extra_states(chunk: Any) -> None:
    for layer in chunk.decoder.layers:
        for norm in (layer.input_layernorm, layer.self_attention.q_layernorm, layer.self_attention.k_layernorm):
            norm.__class__ = type("Norm", (_Norm, type(norm)), {})
    norm = chunk.decoder.final_layernorm
    norm.__class__ = type("Norm", (_Norm, type(norm)), {})


def _extra_states(rank: int, folder: str) -> None:
    root, mark = Path(folder), Path(folder) / "executed"

    def trainer(extra: bool, seed: int, distributed: bool) -> Trainer:
        return Trainer({}, distributed, seed, change=_with_extra_states if extra else lambda chunk: None)

    for distributed in (False, True):
        _Norm.payload = _Touch(str(mark))
        ours = training._is_extra_state
        first = trainer(True, 1, distributed)
        first.steps(range(2))
        clean = first.save(root / f"clean_{distributed}", 2)
        training._is_extra_state = lambda key: False  # type: ignore[assignment]
        crafted = first.save(root / f"crafted_{distributed}", 2)
        training._is_extra_state = ours
        plain = trainer(False, 1, distributed)
        plain.steps(range(2))
        without = plain.save(root / f"without_{distributed}", 2)

        assert EXTRA.encode() not in (clean / ".metadata").read_bytes()
        assert b"_extra_state" in (crafted / ".metadata").read_bytes()
        if (crafted / "common.pt").is_file():  # which is merged into what was asked for
            common = torch.load(crafted / "common.pt")
            common["model"] = {EXTRA: first.port.chunks[0].module.decoder.final_layernorm.get_extra_state()}
            torch.save(common, crafted / "common.pt")
        first.steps(range(2, 4))
        for path in (clean, crafted, without):
            for extra in (True, False):
                again = trainer(extra, 2, distributed)
                again.load(path)
                again.steps(range(2, 4))
                want, got = first.weights(), again.weights()
                assert all(torch.equal(got[n], want[n]) for n in want), (path.name, extra)
    assert not mark.exists()


def test_extra_states_are_neither_stored_nor_loaded(tmp_path: Path) -> None:
    run_ranks(_extra_states, 1, str(tmp_path))


class _FusedAdam(torch.optim.Optimizer):
    """As Transformer Engine's: no state until a parameter's first step, which is counted in the group."""

    def __init__(self, params: Any, lr: float, weight_decay: float, betas: Any, eps: float, **_: Any) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            first, second = (1 - beta ** group["step"] for beta in group["betas"])
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["exp_avg"].lerp_(p.grad, 1 - group["betas"][0])
                state["exp_avg_sq"].lerp_(p.grad**2, 1 - group["betas"][1])
                p -= group["lr"] * state["exp_avg"] / first / ((state["exp_avg_sq"] / second).sqrt() + group["eps"])


def _use_fused_adam() -> None:
    import megatron.core.optimizer as optimizers
    from megatron.core.optimizer import distrib_optimizer

    optimizers.Adam = distrib_optimizer.Adam = _FusedAdam
    optimizers.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True


def _before_the_first_update(rank: int, folder: str, fused: bool) -> None:
    if fused:
        _use_fused_adam()
    cases = [(False, torch.float32), (False, torch.bfloat16), (True, torch.float32)]
    for distributed, dtype in cases:
        straight = Trainer({}, distributed, 1, dtype)
        root = Path(folder) / f"{distributed}_{dtype}"
        before = straight.save(root, 1)
        straight.steps(range(2))
        early = straight.weights()
        after = straight.save(root, 2)
        straight.steps(range(2, 4))
        late = straight.weights()
        loads = [(before, False, range(2), early), (before, True, range(2), early), (after, False, range(2, 4), late)]
        for path, used, steps, want in loads:
            again = Trainer({}, distributed, 2, dtype)
            again.steps(range(7, 9) if used else range(0))
            again.load(path)
            again.steps(steps)
            got = again.weights()
            assert all(torch.equal(got[n], want[n]) for n in want), (distributed, dtype, path.name, used)
    kinds = {type(part.optimizer) for part in getattr(again.optimizer, "chained_optimizers", [again.optimizer])}
    assert (kinds == {_FusedAdam}) == fused


def test_a_checkpoint_before_the_first_update_loads(tmp_path: Path) -> None:
    for fused in (False, True):
        run_ranks(_before_the_first_update, 1, str(tmp_path / str(fused)), fused)

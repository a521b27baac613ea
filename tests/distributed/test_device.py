"""The CPU stand-ins for CUDA: Megatron gets what it asks for, and everybody else keeps an ordinary PyTorch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from asd_megatron.distributed.device import use_expandable_segments
from asd_megatron.errors import UserError
from tests.distributed.harness import run_ranks
from tests.models.tiny import tiny_llama

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA nothing is replaced")


def _prepared(rank: int, folder: str) -> list[float]:
    from asd_megatron.distributed import device

    device.prepare()
    factory, move = torch.zeros, torch.Tensor.to
    device.prepare()
    assert torch.zeros is factory and torch.Tensor.to is move  # once is enough
    assert device.device() == torch.device("cpu") and device.backend() == "gloo"
    _cuda_is_the_cpu()
    _other_devices_are_untouched()
    _megatron_keeps_random_states_apart()
    return _transformers_still_reads_right(folder)


def _cuda_is_the_cpu() -> None:
    """What Megatron asks of CUDA."""
    x = torch.ones(2, device="cuda")
    for tensor in (x, x.cuda(), x.to("cuda"), x.to(device=torch.device("cuda", 0)), torch.zeros_like(x, device="cuda")):
        assert tensor.device.type == "cpu"
    assert torch.empty(1, device=torch.cuda.current_device(), pin_memory=True).device.type == "cpu"
    assert x.to("cuda", torch.float64).dtype == torch.float64
    assert x.type() == "torch.cuda.FloatTensor" and x.bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert x.type(torch.int64).dtype == torch.int64
    with torch.cuda.stream(torch.cuda.Stream()):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        end.record()
        end.synchronize()
    assert start.elapsed_time(end) >= 0
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    assert not torch.cuda.is_available()


def _other_devices_are_untouched() -> None:
    with torch.device("meta"):
        for tensor in (torch.empty(2), torch.arange(3), torch.nn.Linear(2, 2).weight):
            assert tensor.device.type == "meta"
    assert torch.empty(2).device.type == torch.tensor([1.0]).device.type == "cpu"
    assert torch.ones(2, device="meta").device.type == torch.ones(2).to("meta").device.type == "meta"
    assert torch.ones(2).to(torch.float64).dtype == torch.float64
    assert torch.ones(2).to(torch.ones(1, dtype=torch.int32)).dtype == torch.int32


def _transformers_still_reads_right(folder: str) -> list[float]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    frequencies = model.model.rotary_emb.inv_freq
    assert frequencies.device.type == "cpu" and torch.isfinite(frequencies).all() and (frequencies > 0).all()
    return model(torch.arange(3, 9)[None]).logits[0, -1].tolist()


def _megatron_keeps_random_states_apart() -> None:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, initialize_rng_tracker

    initialize_rng_tracker(force_reset=True)
    tracker = get_cuda_rng_tracker()
    tracker.add("a", 1)
    tracker.add("b", 2)
    with pytest.raises(ValueError, match="exists already"):
        tracker.add("a", 3)
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    found = []
    for name in ("a", "b", "a"):
        with tracker.fork(name):
            found.append(torch.rand(2).tolist())
    assert torch.equal(torch.rand(2), expected)
    first, other, second = found
    torch.manual_seed(1)
    assert first == torch.rand(2).tolist() and second == torch.rand(2).tolist()
    assert other not in (first, second)


def test_prepare(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_llama(tmp_path / "model")
    expected = AutoModelForCausalLM.from_pretrained(folder)(torch.arange(3, 9)[None]).logits[0, -1]
    (found,) = run_ranks(_prepared, 1, str(folder), init=False)
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-5, atol=1e-5)


def test_expandable_segments_are_this_process_s(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", chosen.append)
    use_expandable_segments({}, allowed=True)
    assert chosen == []  # no CUDA
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = dict(os.environ)
    use_expandable_segments({}, allowed=False)
    use_expandable_segments({"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, allowed=True)
    use_expandable_segments({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, allowed=False)
    assert chosen == []
    use_expandable_segments({}, allowed=True)
    assert chosen == ["expandable_segments:True"]
    assert dict(os.environ) == before  # SGLang servers inherit it, and refuse such segments
    with pytest.raises(UserError, match="PYTORCH_CUDA_ALLOC_CONF turns on expandable segments.*weight_sync disk"):
        use_expandable_segments({"PYTORCH_CUDA_ALLOC_CONF": "Expandable_Segments: true"}, allowed=False)

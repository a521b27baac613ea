"""The embedded engine beside `transformers`' `generate`: same model folder, prompts, dtype and number of tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from step.conditions import overrides
from torch import Tensor

from asd_megatron.config import load_recipe
from asd_megatron.records import Prompt, SamplingParams
from asd_megatron.rollout.embedded.engine import EmbeddedEngine
from asd_megatron.run.build import make_renderer
from asd_megatron.run.sampling import stop_ids
from asd_megatron.run.session import Session, open_session
from asd_megatron.run.sources import model_folder, training_problems


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """`spec`: recipe, overrides, problems, samples (of each), new_tokens, rounds, ends (whether end tokens end a
    response), folder. Tokens per second of every round, and per second of processor time; warm-up left out; tokens
    after a response's end count on neither side."""
    recipe = load_recipe(spec["recipe"], overrides(Path(spec["folder"]) / "run", 1, spec["overrides"]))
    with open_session(recipe) as session:
        renderer = make_renderer(recipe, session.tokenizer, session.end_ids)
        prompts = [renderer.student(p) for p in training_problems(recipe.data).take(spec["problems"])]
        ends = stop_ids(session) if spec["ends"] else ()
        ways = {
            "embedded": _embedded(session, prompts, spec["samples"], spec["new_tokens"], ends),
            "generate": _generate(session, prompts, spec["samples"], spec["new_tokens"], ends),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        processor_rates: dict[str, list[float]] = {name: [] for name in ways}
        tokens: dict[str, list[int]] = {name: [] for name in ways}
        for number in range(spec["rounds"] + 1):
            for name, way in ways.items():
                started, before = time.perf_counter(), time.process_time()
                count = way()
                spent, processor = time.perf_counter() - started, time.process_time() - before
                if number:
                    rates[name].append(count / spent)
                    processor_rates[name].append(count / processor)
                    tokens[name].append(count)
    return {"rates": rates, "processor_rates": processor_rates, "tokens": tokens, "dtype": str(session.port.dtype)}


def _embedded(
    session: Session, prompts: Sequence[Prompt], samples: int, new: int, ends: Sequence[int]
) -> Callable[[], int]:
    rows = samples * len(prompts)
    engine = EmbeddedEngine(session.port, session.process_groups, session.tokenizer, seed=1, max_batch_size=rows)
    params = SamplingParams(max_new_tokens=new, n=samples, stop_token_ids=tuple(ends))

    def sample() -> int:
        engine.submit(prompts, params, 1)
        return sum(len(r.response_ids) for group in engine.collect(3600.0) for r in group.rollouts)

    return sample


def _generate(
    session: Session, prompts: Sequence[Prompt], samples: int, new: int, ends: Sequence[int]
) -> Callable[[], int]:
    """The key/value cache, SDPA attention, left padding, no filters: as its documentation advises."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    folder = model_folder(session.recipe.model.path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=session.port.dtype, attn_implementation="sdpa")
    model = model.eval().to(session.port.device)
    pad = session.tokenizer.pad_token_id or 0
    ids, mask = _left_padded(prompts, samples, pad)
    ids, mask = ids.to(session.port.device), mask.to(session.port.device)
    settings = GenerationConfig(
        max_new_tokens=new,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=list(ends) or None,
    )
    model.generation_config = settings

    @torch.no_grad()
    def sample() -> int:
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        return _until_end(out[:, ids.shape[1] :], ends)

    return sample


def _left_padded(prompts: Sequence[Prompt], samples: int, pad: int) -> tuple[Tensor, Tensor]:
    """Ids and mask int64 [prompts * samples, longest]."""
    width = max(len(p.ids) for p in prompts)
    ids = [[pad] * (width - len(p.ids)) + list(p.ids) for p in prompts for _ in range(samples)]
    mask = [[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in prompts for _ in range(samples)]
    return torch.tensor(ids), torch.tensor(mask)


def _until_end(responses: Tensor, ends: Sequence[int]) -> int:
    """Tokens of responses [B, n] up to each one's first end token, that included."""
    if not ends:
        return responses.numel()
    ended = torch.isin(responses, torch.tensor(list(ends), device=responses.device)).cumsum(1)
    before = (ended == 0).sum(1)
    return int((before + (ended[:, -1] > 0)).sum())


CELLS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"sampling": measure}

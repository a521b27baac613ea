"""Seconds of each step of TRL's GRPOTrainer: `python grpo_step.py SPEC OUT`, in the environment of `create.sh`.

SPEC: a JSON file with `model` (a folder), `texts` and `ids` (prompts of all steps in order), `problems` a step,
`samples` of each, `new_tokens`, `steps`, `folder` (scratch).

Float32 on the CPU, one update a batch, no reference model, end tokens forbidden until `new_tokens`: every response has
that length. Of TRL's defaults only those are changed that would cost time here: gradient checkpointing (on by default),
bf16 autocast, logging, saving.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class StepTimes(TrainerCallback):
    """Seconds, and seconds of processor time, of each step, sampling included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.processor: list[float] = []
        self._started = self._before = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started, self._before = time.perf_counter(), time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)
        self.processor.append(time.process_time() - self._before)


def reward(completions: list[str], **_: Any) -> list[float]:
    """Unequal within a group, and free."""
    return [float(len(text) % 2) for text in completions]


def main(spec_file: str, out: str) -> None:
    spec = json.loads(Path(spec_file).read_text())
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    for text, ids in zip(spec["texts"], spec["ids"], strict=True):
        if tokenizer(text)["input_ids"] != ids:
            sys.exit(f"error: the prompt {text!r} would have other tokens here than there: {ids}")
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32, attn_implementation="sdpa")
    config = GRPOConfig(
        output_dir=spec["folder"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=spec["problems"] * spec["samples"],
        num_generations=spec["samples"],
        max_completion_length=spec["new_tokens"],
        generation_kwargs={"min_new_tokens": spec["new_tokens"]},
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_iterations=1,
        beta=0.0,
        max_steps=spec["steps"],
        shuffle_dataset=False,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    times = StepTimes()
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": spec["texts"]}),
        processing_class=tokenizer,
        callbacks=[times],
    )
    lengths: list[int] = []
    generate = model.generate

    def counted(*arguments: Any, **keywords: Any) -> Any:
        found = generate(*arguments, **keywords)
        lengths.append(found.shape[1] - keywords["input_ids"].shape[1])
        return found

    model.generate = counted
    trainer.train()
    if set(lengths) != {spec["new_tokens"]} or len(lengths) != spec["steps"]:
        sys.exit(f"error: responses of {sorted(set(lengths))} tokens in {len(lengths)} generations were made")
    versions = {name: __import__(name).__version__ for name in ("trl", "transformers", "torch")}
    Path(out).write_text(json.dumps({"seconds": times.seconds, "processor": times.processor, "versions": versions}))


if __name__ == "__main__":
    main(*sys.argv[1:])

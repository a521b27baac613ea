"""An AntiSD update with Transformer Engine's layers: `python -m asd_megatron.checks.te_update RECIPE [--json FILE]`.

RECIPE none: bfloat16; which attention computes, and that weight gradients are added in float32. Any other is an FP8
recipe beside bfloat16: loss and gradients, scores in bfloat16, sampling and gradients after updates beside those of a
new model with the same weights (a layer may keep an FP8 copy of old ones), checkpoints without extra states.

One process, on the GPU if there is one; the tests run it on CPUs through a stand-in for Transformer Engine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from asd_megatron.antisd import Gate
from asd_megatron.checkpoint import training
from asd_megatron.checks.cases import VOCABULARY, hard_batch
from asd_megatron.checks.layouts import ParityCell
from asd_megatron.checks.parity_worker import CapturedGradients, Trained, constant_adam, run_step
from asd_megatron.distributed.layout import Layout, ProcessGroups, init
from asd_megatron.files import write_json
from asd_megatron.models import te
from asd_megatron.models.port import ModelPort
from asd_megatron.models.precision import BFLOAT16, MEGATRON_RECIPES, Precision
from asd_megatron.records import Example
from asd_megatron.rollout.embedded.cache import KVCache
from asd_megatron.trainer.batch import PackLayout, TokenSequence, build_packs
from asd_megatron.trainer.scorer import score

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
}
"""Hidden, feed-forward and projection sizes are multiples of 128: every FP8 block of 128 x 128 is complete."""
EXTRA_STATE = "_extra_state"
TOKENS_PER_MICROBATCH = 256
LOSS_BOUND = 0.05
"""FP8's loss from bfloat16's, relative to the mean absolute advantage."""
GRADIENT_BOUND = 0.25
"""FP8's gradients from bfloat16's, norm of the difference over norm, all weights together."""
SAME_BOUND = 0.02
"""Gradients of equal weights in the same format, likewise: attention may add in another order."""


@dataclass
class Findings:
    """Figures by name, and what is wrong, one sentence each."""

    recipe: str
    figures: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def require(self, holds: bool, problem: str) -> None:
        if not holds:
            self.problems.append(f"{problem} ({self.figures})")


def measure(recipe: str) -> Findings:
    """All figures of a recipe. Joins a layout of one rank; raises UserError where the machine cannot compute so."""
    groups = init(Layout())
    findings = Findings(recipe)
    if recipe == "none":
        _weight_gradients(findings, groups)
    else:
        _fp8(findings, groups, Precision(recipe))  # type: ignore[arg-type]
    found = te.attention_in_use()
    findings.figures["attention"] = found
    findings.require(found is not None, "the attention in use is unknown")
    return findings


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int = 11) -> dict[str, Tensor]:
    """Full float32 tensors; norms near 1."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (1.0 if len(shape) == 1 else 0.0) + 0.08 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def build(
    groups: ProcessGroups,
    weights: dict[str, Tensor] | None = None,
    precision: Precision = BFLOAT16,
    *,
    alignment: int | None = None,
    fuse: bool = True,
    tokens: int = TOKENS_PER_MICROBATCH,
) -> Trained:
    """A model with Transformer Engine's layers and its optimizer. alignment: of packs; None: the precision's."""
    port = ModelPort.build(
        CONFIG,
        groups,
        Layout(),
        dtype=torch.bfloat16,
        layers="te",
        precision=precision,
        fuse_weight_gradient=fuse,
    )
    port.load(random_weights(port.expected()) if weights is None else weights)
    port.wrap_ddp(distributed_optimizer=False, overlap_grad_reduce=False)
    packs = PackLayout.of(
        Layout(),
        groups,
        port.device,
        share_prefixes=False,
        alignment=precision.alignment if alignment is None else alignment,
    )
    cell = ParityCell("te_update", tokens_per_microbatch=tokens, layers="te", dtype="bfloat16")
    return Trained(port, groups, constant_adam(port, distributed=False), packs, cell, None)


class Update(NamedTuple):
    """advantage: the mean absolute advantage of its tokens. gradients: by Hugging Face name, before they are clipped;
    float64 on the CPU."""

    loss: float
    advantage: float
    gradients: dict[str, Tensor]


def step(trained: Trained, batch: list[Example]) -> Update:
    """An AntiSD update of the model."""
    with CapturedGradients(trained) as gradients:
        stats = run_step(trained, batch, Gate(0.5, warmup_steps=0, h_warm=1e-3), name="antisd")
    advantage = float(stats.columns.constants.advantage.double().abs().mean())
    return Update(float(stats.loss), advantage, dict(gradients))


def exported(port: ModelPort) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in port.export()}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm of what was expected, all tensors together."""
    squares = sum(float((found[n] - e).square().sum()) for n, e in expected.items())
    return float((squares / sum(float(e.square().sum()) for e in expected.values())) ** 0.5)


# ---------------------------------------------------------------- bfloat16


def _weight_gradients(findings: Findings, groups: ProcessGroups) -> None:
    """Fused, the float32 buffers hold float32 products; else every micro-batch's are rounded to bfloat16 before."""
    rounded, gradients = {}, {}
    for fuse in (True, False):
        trained = build(groups, fuse=fuse, tokens=1 << 20)
        gradients[fuse] = step(trained, hard_batch(1)).gradients
        rounded[fuse] = _rounded_fraction(gradients[fuse])
    findings.figures |= {
        "rounded when fused": rounded[True],
        "rounded when not": rounded[False],
        "effect": distance(gradients[False], gradients[True]),
    }
    findings.require(rounded[True] < 0.1, "fused weight gradients were rounded to bfloat16")
    findings.require(rounded[False] > 0.9, "weight gradients that are not fused have more digits than bfloat16")
    findings.require(findings.figures["effect"] < SAME_BOUND, "fused weight gradients differ too much from the others")


def _rounded_fraction(gradients: dict[str, Tensor]) -> float:
    """Of the entries of linear layers' weight gradients that are no zero, how many bfloat16 represents."""
    entries = torch.cat([g.flatten() for name, g in gradients.items() if "proj" in name])
    entries = entries[entries != 0]
    return float((entries.bfloat16().double() == entries).double().mean())


# ---------------------------------------------------------------- FP8


def _fp8(findings: Findings, groups: ProcessGroups, precision: Precision) -> None:
    plain = build(groups, alignment=precision.alignment)
    fp8 = build(groups, precision=precision)
    scored = build(groups, precision=replace(precision, scores=True))
    scores = [_scores(t, groups) for t in (plain, fp8, scored)]
    findings.figures["score drift"] = float((scores[2] - scores[0]).abs().mean())
    findings.require(torch.equal(scores[0], scores[1]), "scores in bfloat16 are not those of the bfloat16 model")
    findings.require(findings.figures["score drift"] > 1e-4, "FP8 scores are those of bfloat16: FP8 is not in use")
    _beside_bfloat16(findings, plain, fp8)
    _after_an_update(findings, groups, precision, fp8)
    with tempfile.TemporaryDirectory(prefix="asd-te-update-") as folder:
        _checkpoint(findings, groups, fp8, Path(folder))


def _scores(trained: Trained, groups: ProcessGroups) -> Tensor:
    """Log-probs of the batch's responses, float64 [tokens] on the CPU."""
    sequences, rows = [], 0
    for example in hard_batch(5):
        rollout = example.rollout
        sequences.append(TokenSequence.of(rollout.prompt_ids, rollout.response_ids, rows))
        rows += len(rollout.response_ids)
    packs = build_packs([sequences], 0, TOKENS_PER_MICROBATCH, trained.layout)
    return score(trained.port, groups, packs, rows, temperature=1.0).logprobs.double().cpu()


def _beside_bfloat16(findings: Findings, plain: Trained, fp8: Trained) -> None:
    expected, found = (step(t, hard_batch(1)) for t in (plain, fp8))
    findings.figures |= {
        "loss error": abs(found.loss - expected.loss) / expected.advantage,
        "gradient error": distance(found.gradients, expected.gradients),
    }
    findings.require(findings.figures["loss error"] < LOSS_BOUND, "the loss is not near bfloat16's")
    findings.require(0 < findings.figures["gradient error"] < GRADIENT_BOUND, "gradients are not near bfloat16's")


def _after_an_update(findings: Findings, groups: ProcessGroups, precision: Precision, fp8: Trained) -> None:
    """The model after its update beside new ones with its weights."""
    weights = exported(fp8.port)
    fresh = build(groups, weights, precision)
    plain = build(groups, weights)
    sampled = [_next_token_logits(t.port) for t in (fp8, plain)]
    findings.figures["sampling error"] = float((sampled[0] - sampled[1]).abs().max())
    findings.require(findings.figures["sampling error"] == 0, "sampling is not that of the bfloat16 model")
    found, expected = (step(t, hard_batch(2)).gradients for t in (fp8, fresh))
    findings.figures["stale weights error"] = distance(found, expected)
    stale = "after an update, gradients are not those of a new model with the same weights"
    findings.require(findings.figures["stale weights error"] < SAME_BOUND, stale)


def _next_token_logits(port: ModelPort) -> Tensor:
    """After 7 tokens, a number that FP8 products would refuse: float64 [vocab] on the CPU."""
    ids = torch.arange(3, 10, device=port.device)
    cache = KVCache(1, len(ids))
    with port.sampling():
        cache.prefill(0, torch.tensor([len(ids)]))
        logits = port.decode(ids[None], torch.arange(len(ids), device=port.device)[None], cache)
    assert logits is not None
    return logits[0, 0].double().cpu()


def _checkpoint(findings: Findings, groups: ProcessGroups, fp8: Trained, folder: Path) -> None:
    state = fp8.port.chunks[0].state_dict()
    findings.figures["extra states"] = sum(
        isinstance(value, Tensor) and value.numel() > 0 for key, value in state.items() if key.endswith(EXTRA_STATE)
    )
    saved = training.save(folder, 1, fp8.port, fp8.optimizer.megatron, fp8.optimizer.scheduler, {"step": 1})
    if EXTRA_STATE.encode() in (saved / ".metadata").read_bytes():
        findings.require(False, "extra states were saved")
        return
    plain = build(groups)
    training.load(saved, plain.port, plain.optimizer.megatron, plain.optimizer.scheduler)
    expected, found = exported(fp8.port), exported(plain.port)
    wrong = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    findings.require(not wrong, f"a bfloat16 model loads other weights from the checkpoint: {wrong[:3]}")


def main(argv: Sequence[str]) -> int:
    """Exit status: 0, or 1 with a problem a line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m asd_megatron.checks.te_update", description=__doc__)
    parser.add_argument("recipe", choices=("none", *MEGATRON_RECIPES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    arguments = parser.parse_args(argv)
    findings = measure(arguments.recipe)
    for name, value in findings.figures.items():
        print(f"{name:20s} {value:.3g}" if isinstance(value, float) else f"{name:20s} {value}")
    if arguments.json is not None:
        write_json(arguments.json, {"figures": findings.figures, "problems": findings.problems})
    for problem in findings.problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if findings.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What a step computes in FP8 and what it does not, on the stand-in for Transformer Engine: u from scores of one number
format, policy ratios within another, new weights after every update, the probe, padded packs, complete runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asd_megatron.checks.cases import hard_batch
from asd_megatron.data.sft import SftExample
from asd_megatron.distributed.layout import Layout
from asd_megatron.models.gpt import Recompute
from asd_megatron.models.precision import Precision
from asd_megatron.records import Example
from tests.distributed.harness import run_ranks
from tests.models.tiny import tiny_qwen3
from tests.reference.dense import DenseRecipe
from tests.te_double import run_ranks_with_te

SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "max_position_embeddings": 256}
LAYOUTS: dict[str, dict[str, Any]] = {"tp1": {}, "tp2_sp": {"tensor": 2, "sequence_parallel": True}}
BLOCKWISE = Precision("blockwise")
SCORED = replace(BLOCKWISE, scores=True)
CURRENT = Precision("current", scores=True)
OPEN = DenseRecipe(warmup_steps=0, learning_rate=0.02)
RECIPES = {
    "clean": (BLOCKWISE, OPEN),
    "scored": (SCORED, OPEN),
    "clean, 3 updates": (BLOCKWISE, replace(OPEN, updates=3)),
    "clean, 2 epochs": (BLOCKWISE, replace(OPEN, epochs=2)),
    "scored, 3 updates": (CURRENT, replace(OPEN, updates=3)),
    "scored, 3 updates, frozen": (CURRENT, replace(OPEN, updates=3, learning_rate=None)),
    "scored, 3 updates, kl": (CURRENT, replace(OPEN, updates=3, learning_rate=None, kl="k3", kl_coefficient=0.5)),
    "grpo, 3 updates": (BLOCKWISE, replace(OPEN, condition="grpo", updates=3)),
    "importance": (BLOCKWISE, replace(OPEN, importance="truncated", learning_rate=None)),
    "plain": (BLOCKWISE, replace(OPEN, learning_rate=None)),
    "kl": (BLOCKWISE, replace(OPEN, kl="k3", kl_coefficient=0.5, learning_rate=None)),
    "kl, advantage": (BLOCKWISE, replace(OPEN, kl="k1", kl_coefficient=0.5, learning_rate=None)),
}


def _step(product: Any, examples: list[Example], recipe: DenseRecipe) -> dict[str, Any]:
    """One step of `recipe`: its table, and of every pack of every update the largest |log ratio|."""
    from asd_megatron.trainer import token_method
    from tests.trainer.product import gate_of

    ratios: list[float] = []
    plain = token_method.policy_loss

    def recorded(inputs: Any, logprobs: Tensor, old: Tensor, *rest: Any) -> Any:
        difference = (logprobs.detach() - old).abs()
        ratios.append(float(difference.max()) if len(difference) else 0.0)
        return plain(inputs, logprobs, old, *rest)

    product.reload()
    if recipe.kl is not None:
        product.keep_copies(recipe)
    token_method.policy_loss = recorded
    try:
        step = product.step(examples, recipe, gate_of(recipe, 1e-3))
    finally:
        token_method.policy_loss = plain
    columns = {} if step.table is None else dict(step.table.columns)
    packs = [len(product.batch(examples, recipe, 200).student_packs(m)) for m in range(recipe.updates)]
    return {
        "columns": columns,
        "ratios": ratios,
        "packs": packs,
        "loss": step.stats.losses,
        "gradients": step.gradients,
        "plan": step.plan,
    }


def _scores(product: Any, examples: list[Example], recipe: DenseRecipe, **how: Any) -> Tensor:
    """The student's log-probs in the updates' own packs."""
    from asd_megatron.trainer.scorer import score

    batch = product.batch(examples, recipe, 200)
    return score(
        product.port, product.process_groups, batch.update_packs(), batch.table.tokens, temperature=1.0, **how
    ).logprobs


def _body(rank: int, folder: str, sizes: dict[str, Any]) -> dict[str, Any]:
    from asd_megatron.distributed import device

    device.prepare()
    from asd_megatron.trainer.fp8_probe import probe
    from tests.models import everywhere
    from tests.trainer.product import Product, RecordingOptimizer, method_of

    layout, examples = Layout(**sizes), hard_batch(5)
    made: dict[Precision, Any] = {}

    def product(precision: Precision, **how: Any) -> Any:
        first = next(iter(made.values())).process_groups if made else None
        return Product(Path(folder), layout, layers="te", precision=precision, process_groups=first, **how)

    for precision in (BLOCKWISE, SCORED, CURRENT):
        made[precision] = product(precision)
    found: dict[str, Any] = {name: _step(made[p], examples, recipe) for name, (p, recipe) in RECIPES.items()}

    # The same model without FP8, on the same packs; and on packs without padding for FP8.
    for name, alignment in (("bf16", 128), ("unaligned", 1)):
        found[name] = _step(product(Precision(), alignment=alignment), examples, OPEN)
    for kind in ("mlp", "full"):
        found[f"recomputed {kind}"] = _step(product(BLOCKWISE, recompute=Recompute(kind)), examples, OPEN)  # type: ignore[arg-type]
    fp8 = made[BLOCKWISE]
    fp8.reload()
    for name in ("clean", "clean, 3 updates"):
        found[f"scores of {name}"] = _scores(fp8, examples, RECIPES[name][1], fp8=True)

    # After an optimizer step: FP8 copies of weights are new, in scores and in the update.
    product_of_new = product(BLOCKWISE)
    found["before"] = _scores(fp8, examples, OPEN, fp8=True)
    _step(fp8, examples, OPEN)
    product_of_new.port.load(everywhere.weights(fp8.port))
    found["stale"] = [_scores(p, examples, OPEN, fp8=True) for p in (fp8, product_of_new)]
    with fp8.port.sampling():
        sampled = _sampled(fp8.port)
    with product_of_new.port.sampling():
        found["sampled"] = sampled, _sampled(product_of_new.port)

    # The probe, beside two models of one format each.
    fp8.reload()
    method, recipe = method_of(OPEN), replace(OPEN, learning_rate=None)
    batch = fp8.batch(examples, OPEN, 200)
    found["probe"] = probe(fp8.port, fp8.process_groups, batch, method, found["clean"]["plan"], temperature=1.0)
    found["computed"] = batch.computed
    only = [e for e in examples if e.has_context]
    for name, p in (("in bf16", product(Precision(), alignment=128)), ("in fp8", made[SCORED])):
        found[name] = _step(p, only, recipe)["columns"]

    supervised = [SftExample((5, 6), (7, 8, 9, 10), (1.0,) * 4), SftExample((11,), (12, 13), (1.0, 0.5))]
    for name, p in (("sft in bf16", product(Precision(), alignment=128)), ("sft in fp8", fp8)):
        p.reload()
        optimizer = RecordingOptimizer(p.port, OPEN)
        found[name] = [p.supervised_step(supervised, optimizer) for _ in range(6)]
    return found


def _sampled(port: Any) -> Tensor:
    from asd_megatron.rollout.embedded.cache import KVCache

    ids, cache = torch.arange(3, 33), KVCache(1, 30)
    cache.prefill(0, torch.tensor([30]))
    logits: Tensor = port.decode(ids[None], torch.arange(30)[None], cache)
    return logits


@pytest.fixture(scope="module", params=list(LAYOUTS))
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tiny_qwen3(tmp_path_factory.mktemp("fp8") / "model", **SIZES)
    sizes = LAYOUTS[request.param]
    return run_ranks_with_te(_body, sizes.get("tensor", 1), str(folder), sizes)[0]


def _column(step: dict[str, Any], name: str) -> Tensor:
    column: Tensor = step["columns"][name]
    return column


def test_u_is_that_of_the_model_without_fp8(found: dict[str, Any]) -> None:
    reference = found["bf16"]
    for name in ("clean", "clean, 3 updates", "clean, 2 epochs", "importance"):
        for column in ("pmi", "term", "student_logprobs", "student_entropy", "teacher_entropy"):
            torch.testing.assert_close(_column(found[name], column), _column(reference, column), rtol=0, atol=2e-6)
    for column in ("pmi", "teacher_entropy"):  # one update: the same packs too
        assert torch.equal(_column(found["clean"], column), _column(reference, column))
    noise = (_column(found["scored"], "pmi") - _column(reference, "pmi")).abs().mean()
    assert noise > 1e-3 and "update_logprobs" not in found["scored"]["columns"]


def test_the_update_computes_in_fp8_and_its_ratio_is_one(found: dict[str, Any]) -> None:
    for name in ("clean", "clean, 3 updates"):
        update, scored = _column(found[name], "update_logprobs"), found[f"scores of {name}"]
        assert torch.equal(update, scored)
        assert (update - _column(found[name], "student_logprobs")).abs().mean() > 1e-3
    assert torch.equal(_column(found["clean, 2 epochs"], "update_logprobs"), _column(found["clean"], "update_logprobs"))
    for name, (_, recipe) in RECIPES.items():
        step = found[name]
        first = step["packs"][0]
        assert step["ratios"][:first] == [0.0] * first, name  # the first update of the batch: exactly 1
        if len(step["ratios"]) > first and recipe.learning_rate is not None:
            assert max(step["ratios"][first:]) > 1e-3, name
        else:
            assert not _column(step, "clipped").any(), name


def test_what_else_compares_log_probs(found: dict[str, Any]) -> None:
    """Importance weights and the KL penalty take the student's log-probs in the format of what they compare with."""
    step = found["importance"]
    expected = _column(step, "student_logprobs").double().exp().clamp(max=2.0)  # the engine's are 0
    torch.testing.assert_close(_column(step, "importance").double(), expected, rtol=1e-6, atol=0)
    # The initial weights are the live ones: a penalty of 0, without a gradient.
    scored = ("scored, 3 updates, kl", "scored, 3 updates, frozen")
    for name, other in (("kl", "plain"), ("kl, advantage", "plain"), scored):
        plain = found[other]
        torch.testing.assert_close(found[name]["loss"], plain["loss"], rtol=0, atol=1e-6)
        for key, gradient in plain["gradients"][0].items():
            distance = (found[name]["gradients"][0][key] - gradient).norm() / gradient.norm()
            assert distance < 1e-4, (name, key)


def test_fp8_copies_of_weights_follow_the_update(found: dict[str, Any]) -> None:
    now, expected = found["stale"]
    assert torch.equal(now, expected)
    assert (now - found["before"]).abs().max() > 1e-2
    assert torch.equal(*found["sampled"])


def test_padding_changes_nothing(found: dict[str, Any]) -> None:
    aligned, unaligned = found["bf16"], found["unaligned"]
    torch.testing.assert_close(aligned["loss"], unaligned["loss"], rtol=0, atol=1e-6)
    for name, gradient in unaligned["gradients"][0].items():
        assert (aligned["gradients"][0][name] - gradient).norm() < 1e-5 * gradient.norm(), name


def test_activations_are_recomputed_in_fp8(found: dict[str, Any]) -> None:
    kept = found["clean"]
    for kind in ("mlp", "full"):
        recomputed = found[f"recomputed {kind}"]
        assert recomputed["loss"] == kept["loss"]
        for name, gradient in kept["gradients"][0].items():
            assert (recomputed["gradients"][0][name] - gradient).norm() < 1e-5 * gradient.norm(), (kind, name)


def test_the_probe(found: dict[str, Any]) -> None:
    """Its numbers are those of one model without FP8 and one that scores in it."""
    bf16, fp8 = found["in bf16"], found["in fp8"]
    mask = bf16["loss_mask"]
    names = ("student_logprobs", "teacher_logprobs")
    student, teacher = (float((fp8[name] - bf16[name])[mask].double().abs().mean()) for name in names)
    u, u8 = bf16["pmi"][mask].double(), fp8["pmi"][mask].double()
    large = u.abs() > 0.05
    medians = [float(x["teacher_entropy"][mask].median()) for x in (bf16, fp8)]  # torch's is the lower one
    expected = {
        "fp8/student_drift": student,
        "fp8/teacher_drift": teacher,
        "fp8/pmi_drift": float((u8 - u).abs().mean()),
        "fp8/pmi_sign_flips": float(((u8 > 0) != (u > 0))[large].double().mean()),
        "fp8/entropy_shift": medians[1] / medians[0] - 1,
    }
    probe = found["probe"]
    assert probe.metrics == pytest.approx(expected, rel=1e-4)
    assert expected["fp8/pmi_drift"] > 1e-3 and expected["fp8/entropy_shift"] != 0
    assert (probe.bfloat16.teacher_entropy, probe.fp8.teacher_entropy) == pytest.approx(tuple(medians), rel=1e-5)
    assert probe.bfloat16.deviation == pytest.approx(float(u.std(correction=0)), rel=0.05)
    assert found["computed"].total > found["computed"].real > 0  # its passes count


def test_the_supervised_stage(found: dict[str, Any]) -> None:
    bf16, fp8 = found["sft in bf16"], found["sft in fp8"]
    assert 0 < abs(fp8[0].loss - bf16[0].loss) < 0.1 * bf16[0].loss
    assert all(step.applied for step in fp8) and fp8[-1].loss < 0.7 * fp8[0].loss


def _under_context(rank: int, folder: str) -> dict[str, Any]:
    from asd_megatron.distributed import device

    device.prepare()
    from tests.trainer.product import Product

    examples, layout, found = hard_batch(5), Layout(context=2), {}
    for name, precision, alignment in (
        ("clean", BLOCKWISE, None),
        ("bf16", Precision(), 128),
        ("unaligned", Precision(), 1),
    ):
        groups = found[next(iter(found))]["groups"] if found else None
        product = Product(
            Path(folder), layout, layers="te", precision=precision, alignment=alignment, process_groups=groups
        )
        found[name] = {**_step(product, examples, OPEN), "groups": product.process_groups}
    return {name: {key: step[key] for key in step if key != "groups"} for name, step in found.items()}


def test_under_context_parallelism(tmp_path: Path) -> None:
    found = run_ranks_with_te(_under_context, 2, str(tiny_qwen3(tmp_path / "model", **SIZES)))[0]
    test_padding_changes_nothing(found)
    torch.testing.assert_close(_column(found["clean"], "pmi"), _column(found["bf16"], "pmi"), rtol=0, atol=0)
    drift = _column(found["clean"], "update_logprobs") - _column(found["clean"], "student_logprobs")
    assert found["clean"]["ratios"][:1] == [0.0] and drift.abs().mean() > 1e-3


def _levels(rank: int, folder: str, data: int) -> Any:
    from asd_megatron.trainer.fp8_probe import probe
    from asd_megatron.trainer.pass_plan import plan_passes
    from tests.trainer.product import Product, method_of

    product, examples = Product(Path(folder), Layout(data=data)), hard_batch(5)
    batch = product.batch(examples, OPEN, 64)
    return probe(product.port, product.process_groups, batch, method_of(OPEN), plan_passes("antisd"), temperature=1.0)


def test_a_probe_is_of_the_global_batch(tmp_path: Path) -> None:
    """On a model without FP8, whose two formats are one."""
    folder = str(tiny_qwen3(tmp_path / "model", **SIZES))
    (alone,), both = run_ranks(_levels, 1, folder, 1), run_ranks(_levels, 2, folder, 2)
    assert both[0] == both[1] and alone.bfloat16 == alone.fp8
    assert vars(both[0].fp8) == pytest.approx(vars(alone.fp8), rel=1e-5)
    assert both[0].metrics == dict.fromkeys(alone.metrics, 0.0)


def test_a_probe_takes_the_first_tokens() -> None:
    from asd_megatron.trainer.fp8_probe import first_examples

    examples = hard_batch(5)
    lengths = [len(e.rollout.response_ids) for e in examples]
    with_context = [n for n, e in zip(lengths, examples, strict=True) if e.has_context]
    assert sum(len(e.rollout.response_ids) for e in first_examples(examples, with_context=True)) == sum(with_context)
    few = first_examples(examples, 20, with_context=True)
    assert [len(e.rollout.response_ids) for e in few] == [*with_context[:2], 20 - sum(with_context[:2])]
    last, complete = few[-1].rollout, [e for e in examples if e.has_context][2].rollout
    assert tuple(last.response_ids) == tuple(complete.response_ids[: len(last.response_ids)])
    bare = [replace(e, teacher_prompt_ids=None) for e in examples]
    (first,) = first_examples(bare, 1, with_context=True)
    assert list(first.rollout.response_ids) == list(bare[0].rollout.response_ids[:1])

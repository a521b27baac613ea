"""The auxiliary loss, the counted load and replayed routing against `transformers`, whatever the layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asd_megatron.checks.reference import named
from asd_megatron.models.routing import UNKNOWN, LoadReport, MicroBatchRouting, combined, token_weights
from tests.distributed.harness import run_ranks
from tests.models import everywhere
from tests.models.oracle import pack, relative
from tests.models.tiny import tiny_qwen3_moe

LENGTHS = ([9, 1, 5], [17, 3], [2, 4, 3, 11], [6, 4])
LAYERS, EXPERTS, PER_TOKEN, COEFFICIENT = 4, 6, 2, 0.3
LAYOUTS: list[dict[str, Any]] = [
    {"data": 2, "expert": 2},
    {"tensor": 2, "sequence_parallel": True, "expert": 2},
    {"pipeline": 2},
    {"context": 2},
]


def _inputs() -> tuple[list[list[Tensor]], list[Tensor], list[Tensor], Tensor]:
    """Of each micro-batch: ids of its sequences, weights [tokens] (all sum to 1, some are 0), replayed experts
    [layers, tokens, per_token] (some unknown); and the fractions [layers, experts] of the update before."""
    g = torch.Generator().manual_seed(4)
    ids = [[torch.randint(61, (n,), generator=g) for n in lengths] for lengths in LENGTHS]
    raw = [torch.rand(sum(n), generator=g) * (torch.rand(sum(n), generator=g) > 0.3) for n in LENGTHS]
    total = sum(w.sum() for w in raw)
    experts = []
    for n in LENGTHS:
        chosen = torch.stack([torch.randperm(EXPERTS, generator=g)[:PER_TOKEN] for _ in range(LAYERS * sum(n))])
        chosen = chosen.view(LAYERS, sum(n), PER_TOKEN)
        chosen[:, torch.rand(sum(n), generator=g) < 0.3] = UNKNOWN
        experts.append(chosen)
    return ids, [w / total for w in raw], experts, torch.rand(LAYERS, EXPERTS, generator=g).softmax(1)


def _truth(folder: Path) -> dict[str, Any]:
    """By `transformers`: gradients of the auxiliary loss, the load, and hidden states with replayed experts."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids, weights, experts, fractions = _inputs()
    gates = [layer.mlp.gate for layer in model.model.layers]
    seen: list[list[Tensor]] = [[] for _ in gates]
    for at, gate in enumerate(gates):
        gate.register_forward_hook(lambda _m, _x, out, at=at: seen[at].append(out[0]))
    loss, counts = torch.zeros(()), torch.zeros(LAYERS, EXPERTS, dtype=torch.float64)
    for sequences, w in zip(ids, weights, strict=True):
        for sequence, part in zip(sequences, w.split([len(s) for s in sequences]), strict=True):
            for of_layer in seen:
                of_layer.clear()
            model(sequence[None])
            for at, (logits,) in enumerate(seen):
                probabilities = logits.softmax(-1)
                loss = loss + COEFFICIENT * EXPERTS * (part @ probabilities @ fractions[at])
                chosen = torch.zeros_like(logits).scatter_(1, logits.topk(PER_TOKEN).indices, 1.0)
                counts[at] += part.double() @ chosen.double()
    loss.backward()
    gradients = {
        n: torch.zeros_like(tensor) if p.grad is None else gradient
        for name, p in model.named_parameters()
        for (n, tensor), (_, gradient) in zip(
            named(name, p.detach()), named(name, p if p.grad is None else p.grad), strict=True
        )
    }
    hidden = []
    for sequences, chosen in zip(ids, experts, strict=True):
        parts = chosen.split([len(s) for s in sequences], 1)
        hidden.append([_replayed(model, s, part) for s, part in zip(sequences, parts, strict=True)])
    return {"gradients": gradients, "counts": counts, "hidden": hidden}


@torch.no_grad()
def _replayed(model: Any, ids: Tensor, experts: Tensor) -> Tensor:
    """The hidden states of one sequence whose known experts are taken, in place of the router's choice."""
    gates = [layer.mlp.gate for layer in model.model.layers]
    originals = [gate.forward for gate in gates]
    for gate, original, given in zip(gates, originals, experts, strict=True):

        def forward(x: Tensor, original: Any = original, given: Tensor = given) -> Any:
            logits, _, own = original(x)
            chosen = torch.where(given == UNKNOWN, own, given)
            values = logits.softmax(-1).gather(1, chosen)
            return logits, values / values.sum(-1, keepdim=True), chosen

        gate.forward = forward
    found = model(ids[None], output_hidden_states=True).hidden_states[-1][0]
    for gate, original in zip(gates, originals, strict=True):
        gate.forward = original
    return found


def _compare(rank: int, root: str, layouts: list[dict[str, Any]]) -> list[dict[str, float]]:
    from asd_megatron.checkpoint.huggingface import FolderReader, read_config
    from asd_megatron.distributed.layout import Layout, init
    from asd_megatron.models.gpt import Recompute
    from asd_megatron.models.port import ModelPort
    from asd_megatron.trainer import schedule

    truth, folder = torch.load(Path(root) / "truth.pt"), Path(root) / "model"
    ids, weights, experts, fractions = _inputs()
    report = []
    for sizes in layouts:
        layout = Layout(**sizes)
        groups = init(layout)
        port = ModelPort.build(
            read_config(folder), groups, layout, dtype=torch.float32, layers="local", recompute=Recompute("full")
        )
        with FolderReader(folder) as reader:
            port.load(reader)
        port.wrap_ddp(distributed_optimizer=False, overlap_grad_reduce=False)
        multiple = layout.tensor if layout.sequence_parallel else 1
        packs = [pack(i, context=layout.context, rank=groups.cp.rank(), multiple=multiple) for i in ids]
        mine = range(groups.dp.rank(), len(packs), groups.dp.size())
        balance = port.load_balance(COEFFICIENT)
        assert balance is not None
        balance.fractions.copy_(fractions)
        number = {id(p): i for i, p in enumerate(packs)}

        def told(micro: Any, of: list[Tensor], fill: float) -> Tensor:
            """Values of each token of the pack, `fill` for padding."""
            values = of[number[id(micro)]].movedim(-1 if of is weights else 1, 0)  # noqa: B023
            padded = torch.cat([values, torch.full_like(values[:1], fill)])
            return padded[micro.source]

        def counting(micro: Any) -> MicroBatchRouting:
            return MicroBatchRouting(told(micro, weights, 0), balance)  # noqa: B023

        def replaying(micro: Any) -> MicroBatchRouting:
            return MicroBatchRouting(experts=told(micro, experts, UNKNOWN).transpose(0, 1))

        for chunk in port.chunks:
            chunk.zero_grad_buffer()
        balance.start()
        schedule.forward_backward(port, [packs[i] for i in mine], lambda _, hidden: hidden.sum() * 0.0, counting)
        load = balance.finish(1, groups.world)
        gradients = everywhere.gradients(port)
        assert set(gradients) == set(truth["gradients"])
        errors = {
            "gradients": max(relative(gradients[n], g) for n, g in truth["gradients"].items() if g.abs().max() > 1e-6),
            "others": max(float(gradients[n].abs().max()) for n, g in truth["gradients"].items() if not g.any()),
            "counts": float((load.tokens - truth["counts"]).abs().max()),
            "fractions": float((balance.fractions - load.fractions).abs().max()),
            "hidden": 0.0,
        }

        def visit(micro: Any, hidden: Tensor) -> None:
            hidden = port.head_shard().gather_tokens(hidden)  # noqa: B023
            real = micro.source >= 0
            expected = torch.cat(truth["hidden"][number[id(micro)]])[micro.source[real]]  # noqa: B023
            errors["hidden"] = max(errors["hidden"], relative(hidden[real], expected))  # noqa: B023

        with port.scoring():
            schedule.forward(port, [packs[i] for i in mine], visit, replaying)
        report.append(errors)
    return report


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("routing")
    torch.save(_truth(tiny_qwen3_moe(root / "model")), root / "truth.pt")
    return root


@pytest.mark.parametrize(("ranks", "layouts"), [(1, [{}]), (2, LAYOUTS)])
def test_against_transformers(root: Path, ranks: int, layouts: list[dict[str, Any]]) -> None:
    for report in run_ranks(_compare, ranks, str(root), layouts, timeout=180):
        for layout, errors in zip(layouts, report, strict=True):
            assert errors["gradients"] < 1e-5 and errors["others"] == 0.0, (layout, errors)
            assert errors["counts"] < 1e-6 and errors["fractions"] < 1e-6, (layout, errors)
            assert errors["hidden"] < 2e-5, (layout, errors)


def test_load_reports() -> None:
    balanced = LoadReport(torch.full((2, 4), 5.0, dtype=torch.float64), torch.full((2, 4), 0.25, dtype=torch.float64))
    assert balanced.auxiliary_loss == pytest.approx(1.0) and balanced.entropy.tolist() == pytest.approx([1.0, 1.0])
    one = LoadReport(torch.tensor([[20.0, 0, 0, 0]] * 2).double(), torch.tensor([[1.0, 0, 0, 0]] * 2).double())
    assert one.auxiliary_loss == pytest.approx(4.0) and one.entropy.tolist() == [0.0, 0.0]
    both = combined([balanced, one])
    assert both.tokens.tolist() == [[25.0, 5, 5, 5]] * 2
    assert both.probabilities[0].tolist() == pytest.approx([0.625, 0.125, 0.125, 0.125])
    nothing = LoadReport(torch.zeros(1, 4).double(), torch.zeros(1, 4).double())
    assert nothing.fractions.tolist() == [[0.25] * 4]


def test_a_place_that_several_responses_follow_counts_for_each() -> None:
    assert token_weights(torch.tensor([1, 1, 3]), 5, 4).tolist() == [0.0, 0.5, 0.0, 0.25, 0.0]
    assert token_weights(torch.tensor([], dtype=torch.int64), 2, 4).tolist() == [0.0, 0.0]

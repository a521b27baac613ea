"""Bytes and seconds of weight updates as deltas and of complete ones, with two SGLang servers on this machine (CPU,
bfloat16).

    python tools/benchmark_weight_delta.py                      a random Qwen3 of 1 GB, one element in a hundred changed
    python tools/benchmark_weight_delta.py --exports RUN/hf     successive steps of a run with checkpoint.export_every 1

Needs nothing but the SGLang environment.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from benchmark_weight_sync import KEY, SERVERS, HttpReceiver
from random_qwen3 import random_qwen3
from safetensors.torch import load_file
from torch import Tensor

from asd_megatron.errors import UserError
from asd_megatron.files import write_json
from asd_megatron.rollout.sglang.servers.options import ServerOptions
from asd_megatron.rollout.sglang.servers.plugin.asd_weight_delta import integers
from asd_megatron.rollout.sglang.servers.pool import ServerPool
from asd_megatron.rollout.sglang.weight_sync.checksums import server_pieces
from asd_megatron.rollout.sglang.weight_sync.delta import Deltas, DeltaTransport
from asd_megatron.rollout.sglang.weight_sync.distributed import DistributedTransport
from asd_megatron.rollout.sglang.weight_sync.synchronise import SyncReport, synchronise
from asd_megatron.rollout.sglang.weight_sync.verification import WeightVerifier

CPU = torch.device("cpu")
BLOCKS = (64, 256, 4096)  # bytes
SYNTHETIC_CHANGED = 0.01
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Change:
    """What one update changed: fractions of elements, of blocks of so many bytes, of tensors."""

    elements: float
    blocks: dict[int, float]
    tensors: float


@dataclass(frozen=True)
class Row:
    """Updates of one kind: `megabytes` sent once for all servers (the mean) and `seconds` from the first pause until
    the last server resumes (the best)."""

    kind: str
    verified: bool
    megabytes: float
    seconds: float


def synthetic(folder: Path, megabytes: float) -> list[Weights]:
    """A random Qwen3 of about that size in bfloat16, its config in `folder`, and the same with a hundredth of its
    elements changed by one bit, anywhere."""
    vocabulary, layers, hidden = 8192, 12, 128
    while 2 * (2 * vocabulary * hidden + layers * 12 * hidden * hidden) < megabytes * 1e6:
        hidden += 128
    model = random_qwen3(vocabulary=vocabulary, hidden=hidden, layers=layers, head_dim=64, positions=512).bfloat16()
    model.config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    base = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    changed = {}
    for name, tensor in base.items():
        flips = torch.rand(tensor.shape, generator=generator) < SYNTHETIC_CHANGED
        changed[name] = (integers(tensor) ^ flips.to(torch.int16)).view(tensor.dtype)
    return [base, changed]


def exported(folders: Sequence[Path]) -> list[Weights]:
    """The weights of exported steps, in the order in which servers are sent them. Raises UserError if they are not
    bfloat16."""
    names = server_pieces(json.loads((folders[0] / "config.json").read_text()), "cpu") if folders else {}
    steps = []
    for folder in folders:
        found = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        steps.append({name: found[name] for name in names})
    if len(steps) < 2 or any(tensor.dtype != torch.bfloat16 for tensor in steps[0].values()):
        raise UserError("two or more exported steps in bfloat16 are needed: run with checkpoint.export_every 1")
    return steps


def compare(old: Weights, new: Weights) -> Change:
    elements = changed = tensors = 0
    blocks = {size: [0, 0] for size in BLOCKS}
    for name, tensor in new.items():
        differs = integers(tensor).flatten() != integers(old[name]).flatten()
        elements, changed, tensors = (
            elements + differs.numel(),
            changed + int(differs.sum()),
            tensors + bool(differs.any()),
        )
        for size, counts in blocks.items():
            of = size // tensor.element_size()
            touched = torch.nn.functional.pad(differs, (0, -differs.numel() % of)).view(-1, of).any(dim=1)
            counts[0] += int(touched.sum())
            counts[1] += touched.numel()
    return Change(changed / elements, {size: a / b for size, (a, b) in blocks.items()}, tensors / len(new))


def measure(steps: list[Weights], config: Path, python: Path, repeats: int, logs: Path) -> list[Row]:
    """Walk through the steps and back, `repeats` times, with complete updates and with deltas."""
    arguments = {"skip-tokenizer-init": True, "load-format": "dummy", "skip-server-warmup": True}
    options = ServerOptions(
        python=python, model=config, dtype="bfloat16", api_key=KEY, admin_key=KEY, arguments=arguments
    )
    order = [*range(len(steps)), *range(len(steps) - 2, 0, -1)] * repeats
    described = json.loads((config / "config.json").read_text())
    rows = []
    with ServerPool([options] * SERVERS, logs, start_timeout=300) as pool:
        receivers = [HttpReceiver(url) for url in pool.urls]
        for verified in (False, True):
            verifier = WeightVerifier(described, dtype=torch.bfloat16, device="cpu") if verified else None
            for kind in ("complete", "delta"):
                complete = DistributedTransport(CPU)
                deltas = Deltas(sys.maxsize) if kind == "delta" else None
                transport = complete if deltas is None else DeltaTransport(complete, deltas)
                done: list[tuple[int, SyncReport]] = []
                held = ""
                for number, step in enumerate(order):
                    if deltas is not None:
                        deltas.expect({receiver.url: held for receiver in receivers})
                    held = f"{verified:08x}-{kind}-{number}"
                    tensors = steps[step].items()
                    report = synchronise(transport, receivers, tensors, held, verifier=verifier)
                    if report.failures:
                        raise UserError(f"the weights did not arrive: {report.failures}")
                    done.append((report.bytes if deltas is None else deltas.sent_bytes, report))
                complete.close()
                del done[0]  # it created the group, and is complete in any case
                megabytes = sum(sent for sent, _ in done) / len(done) / 1e6
                rows.append(Row(kind, verified, round(megabytes, 4), round(min(r.seconds for _, r in done), 4)))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument("--exports", type=Path, metavar="FOLDER", help="measure the exported steps of a run")
    parser.add_argument("--megabytes", type=float, default=1000, help="of the random model (default: 1000)")
    parser.add_argument("--repeats", type=int, default=3, help="walks through the steps (default: 3)")
    parser.add_argument("--python", default=".venv-sglang/bin/python", help="interpreter of the SGLang environment")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="weight-delta-") as scratch:
            config = Path(scratch) / "model"
            if arguments.exports is None:
                steps = synthetic(config, arguments.megabytes)
            else:
                folders = sorted(path for path in arguments.exports.iterdir() if (path / "config.json").is_file())
                steps, config = exported(folders), folders[0]
            changes = [compare(old, new) for old, new in zip(steps, steps[1:], strict=False)]
            rows = measure(steps, config, Path(arguments.python), arguments.repeats, Path(scratch) / "logs")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for change in changes:
        blocks = ", ".join(f"{part:.1%} of blocks of {size} bytes" for size, part in change.blocks.items())
        print(f"changed: {change.elements:.3%} of elements, {blocks}, {change.tensors:.0%} of tensors")
    print("| update | verified | MB sent | seconds |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row.kind} | {'yes' if row.verified else 'no'} | {row.megabytes} | {row.seconds} |")
    if arguments.json:
        write_json(arguments.json, {"changes": [asdict(c) for c in changes], "updates": [asdict(r) for r in rows]})
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What is in a checkpoint or a model folder, without loading its weights."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from asd_megatron.checkpoint.common_state import arguments, read_common
from asd_megatron.checkpoint.distcp import DistributedCheckpoint, StoredTensor, size_text
from asd_megatron.checkpoint.huggingface import read_config, weight_files
from asd_megatron.checkpoint.lineage import RUN_STATE
from asd_megatron.checkpoint.locate import RELEASE, Found
from asd_megatron.checkpoint.manifest import Manifest
from asd_megatron.checkpoint.run_state import RunStateFile
from asd_megatron.checkpoint.stored_model import WEIGHTS
from asd_megatron.errors import UserError, plural
from asd_megatron.files import read_json_object
from asd_megatron.models.families import shape_of
from asd_megatron.models.hf_config import shown
from asd_megatron.models.stored import is_of_the_model

GROUPS = (*WEIGHTS, "optimizer", "other")
_LAYOUT_ARGUMENTS = {
    "tensor_model_parallel_size": "tensor",
    "pipeline_model_parallel_size": "pipeline",
    "virtual_pipeline_model_parallel_size": "virtual pipeline",
    "context_parallel_size": "context",
    "expert_model_parallel_size": "expert",
    "data_parallel_size": "data",
}


@dataclass(frozen=True)
class TensorLine:
    """One tensor. `cuts`: the number of parts along each axis; empty for a tensor of a model folder."""

    group: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    cuts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Report:
    """What `inspect` prints: `facts` by name, in order, and all tensors."""

    facts: dict[str, Any]
    tensors: list[TensorLine]

    def as_json(self) -> dict[str, Any]:
        return {**self.facts, "tensors": [asdict(tensor) for tensor in self.tensors]}

    def text(self) -> str:
        """The facts, a table of groups, and the tensors of each group."""
        width = max(map(len, self.facts))
        lines = [f"{name:<{width}}  {_plain(value)}" for name, value in self.facts.items()]
        for group in dict.fromkeys(tensor.group for tensor in self.tensors):
            members = [tensor for tensor in self.tensors if tensor.group == group]
            lines += ["", f"{group}: {_summary(members)}"]
            names = max(len(tensor.name) for tensor in members)
            for t in members:
                cut = f"  cut {' x '.join(map(str, t.cuts))}" if any(n > 1 for n in t.cuts) else ""
                lines.append(f"  {t.name:<{names}}  {t.dtype:<8}  {size_text(t.bytes):>9}  {list(t.shape)}{cut}")
        return "\n".join(lines)


def inspect(found: Found) -> Report:
    """Describe a checkpoint or a model folder. Raises UserError for a damaged one."""
    return _checkpoint(DistributedCheckpoint(found.folder)) if found.kind == "checkpoint" else _folder(found.folder)


def _checkpoint(checkpoint: DistributedCheckpoint) -> Report:
    folder = checkpoint.folder
    tensors = [_line(tensor) for tensor in checkpoint.tensors.values()]
    tensors.sort(key=lambda line: GROUPS.index(line.group))
    live = [tensor for tensor in tensors if tensor.group == "live"]
    ranks = {match[1] for name in checkpoint.files if (match := re.match(r"__(\d+)_\d+\.distcp", name))}
    facts: dict[str, Any] = {"checkpoint": str(folder), **_origin(checkpoint)}
    facts["files"] = f"{len(checkpoint.files)} of {plural(len(ranks), 'rank')}" if ranks else len(checkpoint.files)
    facts["bytes on disk"] = sum(checkpoint.files.values())
    facts["precision of the weights"] = ", ".join(sorted({tensor.dtype for tensor in live})) or "no weights"
    facts["parameters"] = sum(checkpoint.tensors[tensor.name].numel for tensor in live)
    facts["layers"] = _layers(live)
    facts["tensor parallelism of the writer"] = _tensor_parallelism(live)
    facts["objects that are no tensors"] = len(checkpoint.objects)
    return Report({name: value for name, value in facts.items() if value is not None}, tensors)


def _line(tensor: StoredTensor) -> TensorLine:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorLine(_group(tensor.key), tensor.key, tensor.shape, dtype, tensor.bytes, tensor.cuts)


def _group(key: str) -> str:
    if is_of_the_model(key):
        return "live"
    first = key.partition(".")[0]
    if first in WEIGHTS:
        return first
    return "optimizer" if "optimizer" in key else "other"


def _origin(checkpoint: DistributedCheckpoint) -> dict[str, Any]:
    """Who wrote a checkpoint, and at which step, as far as its files say."""
    folder = checkpoint.folder
    if (folder / RUN_STATE).is_file():
        state = RunStateFile.read(folder)
        step = read_json_object(folder / RUN_STATE, "it is damaged", non_finite=True).get("step")
        kind = "distributed" if state.distributed_optimizer else "not distributed"
        manifest = Manifest.read(folder)
        by = {} if manifest is None else {"layout": manifest.layout_text}
        return {"written by": "asd_megatron, training", "step": step, **by, "optimizer": kind}
    common = read_common(checkpoint)
    given = arguments(common)
    facts: dict[str, Any] = {"written by": "Megatron-LM" if given else "Megatron-Core"}
    if folder.name == RELEASE and not given:
        facts["written by"] = "a conversion (Megatron-LM's `release` form, weights alone)"
    facts["step"] = common.get("iteration")
    facts["Megatron-LM's checkpoint version"] = common.get("checkpoint_version")
    layout = {name: given.get(key) for key, name in _LAYOUT_ARGUMENTS.items()}
    facts["layout"] = ", ".join(f"{name} {size}" for name, size in layout.items() if size is not None) or None
    return {name: value for name, value in facts.items() if isinstance(value, str | int | float)}


def _layers(live: Iterable[TensorLine]) -> str | None:
    """Their number, and whether they are stacked in one tensor or have one each."""
    apart = {match[1] for line in live if (match := re.match(r"decoder\.layers\.(\d+)\.", line.name))}
    if apart:
        return f"{len(apart)}, each with keys of its own"
    stacked = {line.shape[0] for line in live if line.name.startswith("decoder.layers.")}
    return f"{', '.join(map(str, sorted(stacked)))}, stacked" if stacked else None


def _tensor_parallelism(live: Iterable[TensorLine]) -> int | None:
    """Into how many parts the attention's output projection is cut along its input."""
    sizes = {line.cuts[-1] for line in live if line.name.endswith("self_attention.linear_proj.weight")}
    return sizes.pop() if len(sizes) == 1 else None


def _folder(folder: Path) -> Report:
    config = read_config(folder)
    facts: dict[str, Any] = {"model folder": str(folder), "architectures": shown(config.get("architectures"))}
    try:
        family, shape = shape_of(config)
    except UserError as error:
        facts["family"] = f"not supported: {error}"
    else:
        facts |= {"family": family.name, "layers": shape.layers, "hidden": shape.hidden, "vocabulary": shape.vocab}
        facts["head"] = "tied to the embedding" if shape.tied else "not tied"
        if shape.experts is not None:
            facts["experts"] = f"{shape.experts.count}, {shape.experts.per_token} for each token"
    tensors = []
    for path in weight_files(folder):
        tensors += _tensors(path)
    facts["files"] = len(weight_files(folder))
    facts["precision of the weights"] = ", ".join(f"{d} ({n})" for d, n in Counter(t.dtype for t in tensors).items())
    facts["parameters"] = sum(math.prod(t.shape) for t in tensors)
    facts["bytes of weights"] = sum(t.bytes for t in tensors)
    return Report(facts, tensors)


_TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


def _tensors(path: Path) -> list[TensorLine]:
    """Of a safetensors file, from its header."""
    lines = []
    try:
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                header = file.get_slice(name)
                shape, dtype = tuple(header.get_shape()), header.get_dtype()
                bits = re.search(r"\d+", dtype)
                bytes_ = math.prod(shape) * (int(bits[0]) // 8 if bits else 1)
                lines.append(TensorLine("weights", name, shape, _TYPES.get(dtype, dtype), bytes_))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}): download it again") from None
    return lines


def _summary(lines: list[TensorLine]) -> str:
    dtypes = ", ".join(sorted({line.dtype for line in lines}))
    count = sum(math.prod(line.shape) for line in lines)
    return (
        f"{plural(len(lines), 'tensor')}, {count:,} numbers, {dtypes}, {size_text(sum(line.bytes for line in lines))}"
    )


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value >= 10000 else str(value)

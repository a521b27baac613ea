"""The fastest settings that fit: layouts, recomputation, packs and servers searched for a number of GPUs.

The trainer's phases and the generation depend on different parts of a setting, so both are searched on their own for
every split of the GPUs and then combined. Layouts are taken in the order of a bound, their time without recomputation,
and the search of a split ends when the bound exceeds the times that were found: what it leaves out is slower.

What changes numbers is not chosen for speed: moments in bfloat16, and an optimizer in host memory, are proposed where
no layout of a split fits with float32 moments on the GPU. Overlap of generation and training changes what is trained,
and stays as given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from asd_megatron.distributed.layout import Layout
from asd_megatron.errors import UserError
from asd_megatron.models.gpt import NO_RECOMPUTE, Recompute
from asd_megatron.planner.layouts import between, layouts, server_sizes, splits
from asd_megatron.planner.loads import Batch
from asd_megatron.planner.memory import fits, holds_a_response
from asd_megatron.planner.reasons import reasons
from asd_megatron.planner.rollout import Generation, generation, places
from asd_megatron.planner.setting import Serving, Setting, Training
from asd_megatron.planner.shortage import lacks
from asd_megatron.planner.step_time import Phase, StepTime, assembled, training_phases

PACKS = (8192, 16384, 32768, 65536)
RECOMPUTE: tuple[Literal["none", "mlp", "full"], ...] = ("none", "mlp", "full")
KEPT = 4  # trainers of a split that are combined with servers
REFINEMENTS = 2


@dataclass(frozen=True)
class Proposal:
    """A setting that fits, its time, and in sentences why it is as it is."""

    setting: Setting
    time: StepTime
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Trainer:
    training: Training
    phases: tuple[Phase, ...]
    seconds: float


@dataclass
class Search:
    """Of one model and workload on `gpus` GPUs. `timed`, `checked`: trainers whose time, and whose memory was worked
    out, for the reader who asks how much a search looks at."""

    template: Setting
    gpus: int
    timed: int = 0
    checked: int = 0
    batch: Batch = field(init=False)
    _generations: dict[tuple[int, ...], Generation] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.batch = Batch(self.template.shape, self.template.workload)

    def run(self, top: int) -> list[Proposal]:
        """The `top` fastest settings with different layouts or splits. Raises UserError when nothing fits."""
        found = {split: self._split(split) for split in self._splits()}
        for _ in range(REFINEMENTS):
            found |= {split: self._split(split) for split in self._finer(found)}
        times = {setting: time for of_split in found.values() for setting, time in of_split.items()}
        if not times:
            raise UserError(self._nothing_fits())
        order = sorted(times, key=lambda setting: times[setting].total)
        fastest = times[order[0]]
        return [Proposal(setting, times[setting], reasons(setting, times[setting], fastest)) for setting in order[:top]]

    def _splits(self) -> list[int]:
        """GPUs of the trainer; all of them: colocated servers, or the embedded engine."""
        serving = self.template.serving
        if serving.engine == "embedded":
            return [self.gpus]
        apart = splits(self.template.gpu, self.gpus)
        return apart if serving.overlap else [*apart, self.gpus]

    def _finer(self, found: Mapping[int, Mapping[Setting, StepTime]]) -> list[int]:
        """More splits around the best one so far, colocated servers apart."""
        fastest = {split: min(time.total for time in times.values()) for split, times in found.items() if times}
        fastest.pop(self.gpus, None)
        if not fastest or self.gpus <= self.template.gpu.per_node:
            return []
        best = min(fastest, key=fastest.__getitem__)
        return between(self.template.gpu, self.gpus, [split for split in found if split != self.gpus], best)

    # ---------------------------------------------------------------- one split

    def _split(self, ranks: int) -> dict[Setting, StepTime]:
        """Settings with `ranks` GPUs for the trainer, each with the fastest servers that fit beside it."""
        found: dict[Setting, StepTime] = {}
        servings = self._servings(ranks)
        if not servings:
            return found
        for trainer in self._trainers(ranks, servings[-1]):
            beside = [replace(self.template, training=trainer.training, serving=serving) for serving in servings]
            times = [
                (setting, assembled(setting, self.batch, trainer.phases, self._generation(setting)))
                for setting in beside
                if self._fits(setting)
            ]
            if times:
                setting, time = min(times, key=lambda pair: pair[1].total)
                found[setting] = time
        return found

    def _servings(self, ranks: int) -> list[Serving]:
        """Servers on the other GPUs, or colocated on all, that hold a response of full length; the largest last."""
        given = self.template.serving
        if given.engine == "embedded":
            return [given]
        if ranks == self.gpus:
            given = replace(given, colocated=True, offload_optimizer=True, transport="cuda_ipc")
            return list(server_sizes(self.template.shape, self.template.gpu, given, ranks))
        transport = "distributed" if given.transport == "cuda_ipc" else given.transport
        given = replace(given, colocated=False, offload_optimizer=False, transport=transport)
        sizes = server_sizes(self.template.shape, self.template.gpu, given, self.gpus - ranks)
        return [serving for serving in sizes if holds_a_response(replace(self.template, serving=serving))]

    def _generation(self, setting: Setting) -> Generation:
        most = places(setting)
        data = setting.training.layout.data if setting.serving.engine == "embedded" else 0
        tensor = setting.training.layout.tensor if setting.serving.engine == "embedded" else 0
        key = (setting.serving.servers, setting.serving.tensor_parallel, most, data, tensor)
        if key not in self._generations:
            self._generations[key] = generation(setting, most)
        return self._generations[key]

    def _trainers(self, ranks: int, serving: Serving) -> list[Trainer]:
        """The fastest trainers of different layouts that fit beside the servers, the fastest first: with the template's
        optimizer, or where no layout fits with it, with one that needs less memory."""
        found = list(layouts(self.template.shape, self.template.gpu, ranks, self.template.workload.rollouts))
        for optimizer in optimizer_choices(self.template.training):
            best = self._fastest(found, optimizer, serving)
            if best:
                return best
        return []

    def _fastest(self, found: Sequence[Layout], optimizer: Training, serving: Serving) -> list[Trainer]:
        bounds: list[tuple[float, int, Training]] = []
        for layout in found:
            unbounded = replace(optimizer, layout=layout, recompute=NO_RECOMPUTE)
            for pack in self._packs(unbounded):
                training = replace(unbounded, pack=pack)
                bounds.append((self._trainer(training, serving).seconds, len(bounds), training))
        best: dict[Layout, Trainer] = {}
        possible: dict[Layout, bool] = {}
        for bound, _, training in sorted(bounds, key=lambda item: item[:2]):
            slowest = sorted(trainer.seconds for trainer in best.values())[KEPT - 1 : KEPT]
            if slowest and bound >= slowest[0]:
                break
            layout = training.layout
            if layout not in possible:
                frugal = replace(training, recompute=Recompute("full"), pack=PACKS[0])
                possible[layout] = self._fits(replace(self.template, training=frugal, serving=serving))
            trainer = self._recomputing(training, serving) if possible[layout] else None
            if trainer and (layout not in best or trainer.seconds < best[layout].seconds):
                best[layout] = trainer
        return sorted(best.values(), key=lambda trainer: trainer.seconds)[:KEPT]

    def _packs(self, training: Training) -> list[int]:
        """Sizes of a pack that differ in the number of packs; of those that do not, the smallest."""
        found: dict[tuple[float, float], int] = {}
        for pack in PACKS:
            student, teacher = self.batch.spread(replace(training, pack=pack))
            found.setdefault((student.busiest.packs, teacher.busiest.packs), pack)
        return list(found.values())

    def _recomputing(self, training: Training, serving: Serving) -> Trainer | None:
        """With the least recomputation that fits."""
        for kind in RECOMPUTE:
            chosen = replace(training, recompute=Recompute(kind))
            if self._fits(replace(self.template, training=chosen, serving=serving)):
                return self._trainer(chosen, serving)
        return None

    def _trainer(self, training: Training, serving: Serving) -> Trainer:
        self.timed += 1
        phases = training_phases(replace(self.template, training=training, serving=serving), self.batch)
        return Trainer(training, phases, sum(phase.seconds for phase in phases))

    def _fits(self, setting: Setting) -> bool:
        self.checked += 1
        return fits(setting)

    def _nothing_fits(self) -> str:
        shape, gpu = self.template.shape, self.template.gpu
        largest = max(
            layouts(shape, gpu, self.gpus, self.template.workload.rollouts),
            key=lambda layout: (layout.tensor * layout.pipeline * layout.expert, layout.context),
            default=None,
        )
        text = f"no layout of {self.gpus} x {gpu.name} holds this model, its optimizer and a pack of {PACKS[0]} tokens"
        if largest is not None:
            training = replace(self.template.training, layout=largest, recompute=Recompute("full"), pack=PACKS[0])
            missing = lacks(replace(self.template, training=optimizer_choices(training)[-1]))
            text += "".join(f"; {sentence}" for sentence in missing[:1])
        return text + ": plan with more GPUs, or with larger ones"


def optimizer_choices(training: Training) -> list[Training]:
    """The template's own optimizer, then those that need less memory. They need Transformer Engine, bfloat16 and a
    distributed optimizer."""
    choices = [training]
    if training.layers == "te" and training.dtype == "bfloat16" and training.distributed_optimizer:
        if training.moments == "float32" and training.offload == "none":
            choices.append(replace(training, moments="bfloat16"))
        if training.offload == "none":
            choices.append(replace(training, moments="float32", offload="host"))
    return choices


def propose(setting: Setting, gpus: int | None = None, top: int = 5) -> list[Proposal]:
    """The fastest settings of `gpus` GPUs (None: as many as the setting has), the fastest first.

    Of `setting` counts what is not searched: model, workload, GPU, dtype, layer implementation, FP8, copies, the
    engine and its limits, overlap. Raises UserError when nothing fits.
    """
    return Search(setting, setting.gpus if gpus is None else gpus).run(top)

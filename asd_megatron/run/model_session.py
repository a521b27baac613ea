"""What every program that runs a model opens on each rank: the joined ranks, the model and its tokenizer, requests to
stop. `session` adds what training needs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from asd_megatron.checkpoint.huggingface import read_config
from asd_megatron.config import AnyRecipe, Recipe, check_model
from asd_megatron.data.tokenizer import check_stop_token_ids, check_vocabulary, end_token_ids, load_tokenizer
from asd_megatron.distributed import device, rank_log
from asd_megatron.distributed.objects import meet, on_rank_zero, only_rank_zero
from asd_megatron.distributed.stop_signals import StopSignals
from asd_megatron.models.families import check_architecture
from asd_megatron.models.flops import flops_model
from asd_megatron.models.loading import FullTensor
from asd_megatron.models.port import ModelPort
from asd_megatron.observe.progress import Progress, print_line
from asd_megatron.run.clock import Clock
from asd_megatron.run.model import build_port, shares_prefixes
from asd_megatron.run.ranks import join_ranks
from asd_megatron.run.stopping import Stopping
from asd_megatron.trainer.batch import PackLayout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


class ModelSession:
    """The model of one rank and what belongs to it. Attributes are the same on every rank.

    `folder`: where the program writes. `source`: the Hugging Face folder of the model's configuration and tokenizer.
    """

    source: Path
    hf_config: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    end_ids: tuple[int, ...]
    port: ModelPort
    pack_layout: PackLayout

    def __init__(
        self,
        recipe: AnyRecipe,
        closing: ExitStack,
        signals: StopSignals | None,
        save_seconds: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """Joins the other ranks. `closing` takes what has to be closed at the end."""
        self.recipe: AnyRecipe = recipe
        self.closing = closing
        self.layout, self.process_groups = join_ranks(recipe, closing)
        self.stopping = Stopping(recipe, self.process_groups.host, signals, save_seconds)
        rank_log.set_levels(recipe.logging.level, on_console=self.is_root)
        self.folder = recipe.run.path
        self.clock = Clock()
        self.progress = Progress(recipe.run.steps, enabled=False)

    def read_source(self, source: Path) -> None:
        """Configuration and tokenizer of the Hugging Face folder. Raises UserError for a model that is not supported
        or does not fit the recipe."""
        self.source = source
        self.hf_config = read_config(source)
        check_architecture(self.hf_config)
        check_model(self.recipe, self.hf_config)
        self.tokenizer = load_tokenizer(source)
        check_vocabulary(self.tokenizer, int(self.hf_config["vocab_size"]))
        check_stop_token_ids(self.tokenizer, self.recipe.sampling.stop_token_ids or ())
        self.end_ids = end_token_ids(source, self.tokenizer)

    def open_model(self, tensors: Mapping[str, FullTensor] | None = None, *, training: bool) -> None:
        """The model of `read_source`, with that folder's weights or those of `tensors`. Collective. training: as
        `build_port`."""
        arguments = (self.recipe, self.hf_config, self.source, self.process_groups, self.layout)
        self.port = build_port(*arguments, tensors=tensors, training=training)

    def open_packs(self) -> None:
        """How this rank packs sequences."""
        self.pack_layout = PackLayout.of(
            self.layout,
            self.process_groups,
            self.port.device,
            pad_id=self.tokenizer.pad_token_id or 0,
            share_prefixes=shares_prefixes(self.recipe, self.port),
            alignment=self.port.precision.alignment,
            flops=flops_model(self.port.shape),
        )

    def say(self, text: str) -> None:
        """A line on global rank 0's console, with or without a progress bar."""
        if self.progress.enabled:
            self.progress.note(text)
        elif self.is_root:
            print_line(text, sys.stderr)

    # ---------------------------------------------------------------- ranks

    @property
    def is_root(self) -> bool:
        return self.process_groups.world.rank() == 0

    def on_root(self, action: Callable[[], T]) -> T:
        """Run `action` on global rank 0 and give its result to every rank; its UserError is raised on every rank.
        Collective."""
        return on_rank_zero(action, self.process_groups.host)

    def only_root(self, action: Callable[[], T]) -> T | None:
        """Run `action` on global rank 0; its result stays there, other ranks get None. Its UserError is raised on every
        rank. Collective."""
        return only_rank_zero(action, self.process_groups.host)

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Around the generation of rollouts, and the start of the servers that generate them. Colocated servers get
        the memory that PyTorch has cached, once every rank has freed its own. Collective."""
        if isinstance(self.recipe, Recipe) and self.recipe.rollout.placement == "colocated":
            device.free_cached_memory()
            meet(self.process_groups.host)
        yield

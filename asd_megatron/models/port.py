"""The interface to a Megatron-Core model: built from a Hugging Face config, loaded, run, sampled from, exported.

No module outside `models` names GPTModel, a Megatron parameter or a layout of weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from asd_megatron.distributed import device
from asd_megatron.distributed.layout import Layout, ProcessGroups
from asd_megatron.errors import UserError
from asd_megatron.models import gpt, te
from asd_megatron.models.attention import MIN_ROWS, DecodingCache, PackAttention, fill_rows
from asd_megatron.models.compat import resolve_layers
from asd_megatron.models.decoder import LocalStack, Stack
from asd_megatron.models.export import BUCKET_BYTES, Step
from asd_megatron.models.families import shape_of
from asd_megatron.models.family import Family, ModelShape
from asd_megatron.models.flex import FlexPackAttention
from asd_megatron.models.gpt import NO_RECOMPUTE, Implementation, Recompute
from asd_megatron.models.layers import CoreAttention
from asd_megatron.models.loading import FullTensor, Progress
from asd_megatron.models.model_parameters import ModelParameters, bare
from asd_megatron.models.module_stack import evaluating, sampling_modules
from asd_megatron.models.packed import packed_parameters
from asd_megatron.models.parameters import check_layout, padded_vocabulary
from asd_megatron.models.precision import BFLOAT16, Precision, ScoreFormats
from asd_megatron.models.rope import Rotation
from asd_megatron.models.routing import LoadBalance, MicroBatchRouting
from asd_megatron.ops import gemm
from asd_megatron.ops.vocab_shard import VocabShard
from asd_megatron.records import PackedTokens


class ModelPort:
    """This rank's part of one model.

    Attributes:
        chunks: the model chunks, one or one for each virtual stage; wrapped in Megatron's DDP after `wrap_ddp`.
        config: Megatron's TransformerConfig.
        vocab_size, padded_vocab_size: the latter is a multiple of the tensor-parallel size.
        max_positions, tied: of the Hugging Face config; tied: the embedding is the head.
        dtype, device: of all parameters.
        is_first_stage, is_last_stage: of the pipeline; the first has the embedding, the last the head.
        shares_prefixes: whether `forward` takes packs with `parents`.
        layers: `te` or `local`.
        attention: `flex` (FlexAttention), or `own`, that of `layers`.
        precision: in which number format its layers compute.
    """

    def __init__(
        self,
        family: Family,
        shape: ModelShape,
        process_groups: ProcessGroups,
        layout: Layout,
        config: Any,
        chunks: list[Any],
        *,
        how: Implementation,
    ) -> None:
        self.family, self.shape, self.process_groups, self.layout = family, shape, process_groups, layout
        self.config, self.chunks = config, chunks
        self.vocab_size, self.padded_vocab_size = shape.vocab, padded_vocabulary(shape.vocab, layout.tensor)
        self.max_positions, self.tied, self.dtype = shape.max_positions, shape.tied, config.params_dtype
        # Our attention reads a pack's segments and takes angles by position, Transformer Engine's has sequences only.
        self.shares_prefixes = layout.context == 1 and (how.layers == "local" or how.attention == "flex")
        self.device = device.device()
        self.is_first_stage = any(chunk.pre_process for chunk in chunks)
        self.is_last_stage = any(chunk.post_process for chunk in chunks)
        self.layers, self.attention, self.precision = how.layers, how.attention, how.precision
        self._fuses = how.fuse_weight_gradient
        self._stack: Stack | None = None  # set inside `sampling`, as is the next
        self._head: Tensor | None = None
        self._scorers: dict[int, LocalStack] = {}  # set inside `scoring`, by id of the chunk
        self._rotation = Rotation(shape.rotaries, self.device)
        self.parameters = ModelParameters(family, shape, process_groups, layout, [bare(chunk) for chunk in chunks])

    @classmethod
    def build(
        cls,
        hf_config: Mapping[str, Any],
        process_groups: ProcessGroups,
        layout: Layout,
        *,
        dtype: torch.dtype = torch.float32,
        layers: Literal["auto", "te", "local"] = "auto",
        attention: CoreAttention = "own",
        attention_backend: Literal["auto", "flash", "fused"] = "auto",
        recompute: Recompute = NO_RECOMPUTE,
        precision: Precision = BFLOAT16,
        fuse_weight_gradient: bool = True,
    ) -> ModelPort:
        """An unloaded model in `layout`. Raises UserError for what the family, the layout or this machine cannot
        represent. Parameters but `layers`: see `gpt.Implementation`."""
        family, shape = shape_of(hf_config)
        check_layout(shape, layout)
        how = Implementation(
            layers=resolve_layers(layers, dtype),
            attention=attention,
            attention_backend=attention_backend,
            recompute=recompute,
            precision=precision,
            fuse_weight_gradient=fuse_weight_gradient,
        )
        _check(how, shape, layout)
        config = gpt.transformer_config(family, shape, layout, dtype=dtype, how=how)
        with te.choosing_attention(how.layers):
            chunks = gpt.build_chunks(
                config, shape, layout, how=how, padded_vocab=padded_vocabulary(shape.vocab, layout.tensor)
            )
        return cls(family, shape, process_groups, layout, config, chunks, how=how)

    # ---------------------------------------------------------------- training

    def wrap_ddp(self, *, distributed_optimizer: bool, overlap_grad_reduce: bool) -> None:
        """Wrap the chunks in Megatron's DDP.

        Gradients accumulate in float32 `main_grad` buffers and are *summed* over data- and context-parallel ranks;
        nothing is averaged or divided by token counts, because the losses contain the global denominators.
        """
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )

        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=overlap_grad_reduce,
            use_distributed_optimizer=distributed_optimizer,
            **self.precision.data_parallel_keys(),
            check_for_nan_in_grad=False,  # the guard decides what a non-finite gradient means
            average_in_collective=False,
        )
        if self.layers == "te" and self._fuses:
            te.fuse_weight_gradients(self.chunks)
        self.chunks = [
            DistributedDataParallel(self.config, ddp, chunk, disable_bucketing=i > 0)
            for i, chunk in enumerate(self.chunks)
        ]

        def finalize(model: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
            finalize_model_grads(model, None, **kwargs)

        self.config.finalize_model_grads_func = finalize
        self.config.grad_scale_func = None
        if overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            self.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    @property
    def te_attention(self) -> bool:
        """Whether the core attention is Transformer Engine's."""
        return self.layers == "te" and self.attention == "own"

    def weight_gradients_text(self) -> str:
        """Who adds weight gradients to the float32 buffers, for the start-up report."""
        if self.layers == "te" and self._fuses:
            return "added to float32 buffers by Transformer Engine's layers"
        if self.config.gradient_accumulation_fusion:
            return "added to float32 buffers by Apex"
        return "added to float32 buffers after each layer's backward pass (not fused)"

    def load_balance(self, coefficient: float | None = None) -> LoadBalance | None:
        """For the updates of a model with experts, None for others. coefficient: of the auxiliary loss; None: the
        model's own."""
        experts = self.shape.experts
        if experts is None:
            return None
        own = experts.auxiliary_loss if coefficient is None else coefficient
        return LoadBalance(self.shape.layers, experts.count, own, self.device)

    def forward(self, chunk: torch.nn.Module, packed: PackedTokens, routing: MicroBatchRouting | None = None) -> Tensor:
        """Forward pass of one chunk over one micro-batch: its hidden states, on the last stage after the final norm.

        routing: what the routers of a model with experts are told about the T tokens.
        Returns [T, 1, H] in the model's dtype, or [T / tp, 1, H] under sequence parallelism (T a multiple of tp). On
        later pipeline stages the input is what Megatron's schedules set as the previous stage's output.
        """
        if packed.parents and not self.shares_prefixes:
            raise ValueError("the attention of this model does not support shared prefixes")
        if id(chunk) in self._scorers:
            return self._score(bare(chunk), self._scorers[id(chunk)], packed, routing)
        params = packed_parameters(
            packed,
            self._rotation,
            as_one=self.shares_prefixes,
            fused_rotation=self.config.apply_rope_fusion,
            te_attention=self.te_attention,
        )
        if routing is not None and self.config.sequence_parallel:
            routing = routing.sliced(self.process_groups.tp.rank(), self.layout.tensor)
        params.routing = routing
        return chunk(packed.input_ids[None], packed.position_ids[None], None, packed_seq_params=params)

    def _score(self, chunk: Any, stack: LocalStack, packed: PackedTokens, routing: MicroBatchRouting | None) -> Tensor:
        positions = packed.position_ids[None]
        attention = FlexPackAttention if self.attention == "flex" else PackAttention
        self._tell_routers(chunk, routing)
        hidden = stack.embed(packed.input_ids[None], positions) if chunk.pre_process else chunk.decoder.input_tensor
        try:
            return stack.run(hidden, positions, attention(packed), rows=1)
        finally:
            self._tell_routers(chunk, None)

    def _tell_routers(self, chunk: Any, routing: MicroBatchRouting | None) -> None:
        """For a forward without Megatron's layers, which do so themselves."""
        for layer in chunk.decoder.layers if self.shape.experts is not None else ():
            layer.mlp.router.micro_batch = routing

    @contextmanager
    def scoring(self, *, through_modules: bool | None = None, fp8: bool | None = None) -> Iterator[None]:
        """Inside, `forward` computes no gradients. The weights must not change inside.

        through_modules: run Megatron's modules instead of the inference forward (`models.decoder`), which gives the
        same numbers. None: only where the latter is impossible, with Transformer Engine's layers and with context,
        sequence or expert parallelism.
        fp8: whether a model with an FP8 recipe computes in it; None: as its `precision.scores` says.
        """
        if through_modules is None:
            cut = self.layout.context > 1 or self.config.sequence_parallel or self.layout.expert > 1
            through_modules = self.layers != "local" or cut
        if through_modules:
            with torch.no_grad(), evaluating(self.chunks), self._scored_precision(fp8):
                yield
            return
        self._scorers = {id(chunk): self._local_stack(bare(chunk)) for chunk in self.chunks}
        try:
            with torch.inference_mode():
                yield
        finally:
            self._scorers = {}

    def _scored_precision(self, fp8: bool | None) -> AbstractContextManager[None]:
        return nullcontext() if (self.precision.scores if fp8 is None else fp8) else te.in_bfloat16(self.config)

    @property
    def score_formats(self) -> ScoreFormats:
        return self.precision.score_formats(str(self.dtype).removeprefix("torch."))

    def _local_stack(self, chunk: Any) -> LocalStack:
        experts = self.process_groups.ep if self.layout.expert > 1 else None
        self._tell_routers(chunk, None)
        return LocalStack(chunk, self.shape, self.config, self._rotation, self._tensor_group, experts)

    @property
    def _tensor_group(self) -> dist.ProcessGroup | None:
        """None for a model that is not sharded."""
        return self.process_groups.tp if self.process_groups.tp.size() > 1 else None

    def head_weight(self) -> Tensor:
        """The head's weight on the last stage: [padded_vocab / tp, H], the live parameter (tied: this stage's copy)."""
        last = next(c for c in map(bare, self.chunks) if c.post_process)
        return last.shared_embedding_or_output_weight() if self.tied else last.output_layer.weight

    def head_shard(self) -> VocabShard:
        """How `head_weight` is sharded over the tensor-parallel group."""
        rows = self.padded_vocab_size // self.layout.tensor
        return VocabShard.of(self.vocab_size, rows, self._tensor_group, self.config.sequence_parallel)

    # ---------------------------------------------------------------- weights

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model by Hugging Face name, with its full shape, in export order."""
        return self.parameters.expected()

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's parameters by Megatron's names, in the model's dtype: those kept in FP8 as new tensors."""
        for chunk in self.parameters.chunks:
            for name, parameter in chunk.named_parameters():
                yield name, te.values(parameter.detach())

    def load(self, tensors: Mapping[str, FullTensor], *, progress: Progress | None = None) -> None:
        """Fill every parameter from slices of full tensors, reading nothing else. Raises one UserError, before anything
        is copied and the same on every rank, for all that is wrong with the tensors (`models.loading`). Collective.

        progress: told how many bytes of this rank's parameters are loaded.
        """
        self.parameters.load(tensors, progress=progress)

    def export(self, *, bucket_bytes: int = BUCKET_BYTES) -> Iterator[tuple[str, Tensor]]:
        """Stream every full tensor exactly once, by Hugging Face name, on global rank 0 alone, as copies that own their
        memory.

        Collective over one replica, the ranks that are first of `dp_cp` and the first to hold an expert: all of them
        must exhaust the iterator, which yields nothing except on rank 0; on other ranks it ends at once. The next
        bucket of at most `bucket_bytes` is in flight while the current one is consumed, so about two are alive at a
        time. Parameters must not change meanwhile. A slow consumer keeps the replica waiting, at most a group's timeout
        for each bucket. One that stops early must close the iterator, which then receives and drops the rest
        (one that was not begun must be exhausted). When a
        rank fails, the others raise, at the latest after the timeout.
        """
        return self.parameters.stream(lambda parameter: parameter, self.dtype, bucket_bytes)

    def export_steps(self, *, bucket_bytes: int = BUCKET_BYTES) -> Iterator[Step]:
        """Every full tensor exactly once, on the first global rank of the pipeline stage that has it, as `Step`s of at
        most `bucket_bytes`: nothing travels between stages. The experts of a layer that one rank holds are stacked.

        Collective: every rank takes the same steps and exhausts the iterator. Nothing is copied that does not have to
        be gathered: a step's tensors are valid until the next step. Parameters must not change meanwhile.
        """
        return self.parameters.steps(self.dtype, bucket_bytes)

    def export_gradients(self, *, bucket_bytes: int = BUCKET_BYTES) -> Iterator[tuple[str, Tensor]]:
        """As `export`, of the accumulated float32 gradients, between backward pass and optimizer step. Not with the
        distributed optimizer, which leaves each rank only a shard of them."""
        return self.parameters.stream(lambda parameter: parameter.main_grad, torch.float32, bucket_bytes)

    # ---------------------------------------------------------------- sampling

    @contextmanager
    def sampling(self, *, through_modules: bool | None = None) -> Iterator[None]:
        """Inside, `decode` samples with the model, without gradients. The weights must not change inside.

        through_modules: run Megatron's modules; None: only with Transformer Engine's layers. Under expert parallelism
        every rank holds copies of all experts inside, so that ranks may sample different numbers of tokens: collective
        over all ranks. Raises UserError for virtual stages and context parallelism, and for modules under expert
        parallelism.
        """
        if len(self.chunks) > 1 or self.layout.context > 1:
            raise UserError(
                "sampling on the training model needs one chunk a stage and no context parallelism: set "
                "parallelism.virtual_pipeline null and parallelism.context 1, or use rollout.engine sglang"
            )
        chunk = bare(self.chunks[0])
        through_modules = self.layers != "local" if through_modules is None else through_modules
        if through_modules and self.layout.expert > 1:
            raise UserError(
                "sampling on the training model under expert parallelism needs model.layers local: Transformer Engine's"
                " experts stay on their ranks; use rollout.engine sglang, or set parallelism.expert 1"
            )
        with ExitStack() as inside:
            try:
                if through_modules:
                    inside.enter_context(torch.no_grad())
                    inside.enter_context(te.in_bfloat16(self.config))  # single tokens have no FP8 product
                    self._stack = inside.enter_context(sampling_modules(chunk, self.config, self.shape, self._rotation))
                else:
                    inside.enter_context(torch.inference_mode())  # a sixth faster than `no_grad` with few rows
                    self._stack = self._local_stack(chunk)
                self._head = gemm.operand(self.head_weight()) if self.is_last_stage else None
                yield
            finally:
                self._stack = self._head = None

    def decode(self, input_ids: Tensor, position_ids: Tensor, cache: DecodingCache) -> Tensor | None:
        """One forward of the complete pipeline inside `sampling`: ids and positions int64 [B, s]. Collective over the
        model-parallel group.

        Returns float32 logits of each row's newest token [B, 1, vocab] on the last stage (equal on its tensor-parallel
        ranks), None on the others.
        """
        assert self._stack is not None, "decode works inside `sampling` only"
        pp = self.process_groups.pp
        rows, steps = input_ids.shape
        filled = max(rows, -(-MIN_ROWS // steps))
        input_ids, position_ids = fill_rows(input_ids, filled), fill_rows(position_ids, filled)
        if self.is_first_stage:
            hidden = self._stack.embed(input_ids, position_ids)
        else:
            hidden = torch.empty(steps, filled, self.shape.hidden, dtype=self.dtype, device=self.device)
            dist.recv(hidden, group=pp, group_src=pp.rank() - 1)
        hidden = self._stack.run(hidden, position_ids, cache, rows)
        if not self.is_last_stage:
            dist.send(hidden.contiguous(), group=pp, group_dst=pp.rank() + 1)
            return None
        assert self._head is not None
        newest = gemm.operand(fill_rows(cache.newest(hidden[:, :rows])[0], MIN_ROWS))
        logits = newest.new_empty(len(newest), len(self._head), dtype=gemm.accumulation_dtype(self.dtype))
        gemm.product(logits, newest, self._head)
        logits = self.head_shard().gather_ranks(logits[:rows])
        return logits.transpose(0, 1).reshape(rows, 1, -1)[..., : self.vocab_size]


def _check(how: Implementation, shape: ModelShape, layout: Layout) -> None:
    """Refuse what Transformer Engine, the model's shape or this machine cannot do. Raises UserError."""
    if how.recompute.kind == "mlp" and shape.experts is not None and how.layers == "local":
        raise UserError(
            "model.recompute mlp recomputes the experts' activation function in Transformer Engine's grouped products,"
            " and these layers are local: set model.recompute full or none"
        )
    if how.attention == "flex" and how.attention_backend != "auto":
        raise UserError(
            f"model.attention_backend {how.attention_backend} chooses among Transformer Engine's attentions, and with"
            " prefix sharing FlexAttention is used in their place: set batching.share_prefixes false, or leave"
            " model.attention_backend out"
        )
    if not how.precision.enabled:
        return
    if how.layers == "local":
        raise UserError(
            f"precision.fp8 {how.precision.fp8} needs Transformer Engine's layers and these are local: set"
            " model.layers te to see why it cannot be used, or precision.fp8 none"
        )
    machine = te.machine()
    problem = None if machine is None else how.precision.machine_problem(machine)
    problem = problem or how.precision.shape_problem(shape, layout.tensor)
    if problem is not None:
        raise UserError(problem)

"""Bytes that a micro-batch leaves on a rank for its backward pass, and what a layer needs beside them for a moment.

Per token of the rank's part of a pack (T tokens; context parallelism has divided it), with b bytes a number, hidden
size H, q and k numbers of all queries and of all keys, F of the MLP, t the tensor-parallel size and s = 1 / t under
sequence parallelism, otherwise 1. What one layer saves, as terms of its two halves (MLP: of a dense layer):

    layers   norm and input                 norm of q, k      rotation and core attention                   MLP
    te       2 b H s  each half             b (q + k) / t     b (2 q + 2 k) / t                             3 b F / t
    local    (4 + 2 b) H s  each half       (4 + b)(q + k)/t  4 b head_dim + a (2 q + 2 k)/t + b q / t      5 b F / t

* `local` was counted: every saved tensor of a layer, each storage once, by `torch.autograd.graph.saved_tensors_hooks`
  (`tests/planner/test_activations.py` does so again for every kind of layer). Norms keep a float32 copy; SwiGLU keeps
  its two halves, both factors and their product. a is the element size of attention's operands
  (`models.attention.attention_operand`): on a CPU twice b, so its result is there in both dtypes; on a GPU b, and
  keys and values are repeated for all query heads.
* `te` was read in the sources of Transformer Engine 2.18 and Megatron-Core 0.16.1, not measured.
  `LayerNormLinear` saves its input and the norm's output (its own slice of the tokens, which backward gathers again);
  the norms of queries and keys their inputs; flash attention rotated queries and keys, values, its output, which is
  also what the projection saves, and a float32 per token and head; the fused SwiGLU its input, `Linear` its output.
  Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models") count the same way for GELU
  and dropout, which these models do not have: 34 H bytes.

A window changes nothing but for `local` layers, which then save their mask.
"""

from __future__ import annotations

from dataclasses import dataclass

from asd_megatron.distributed.layout import Layout
from asd_megatron.models.family import ModelShape
from asd_megatron.models.gpt import NO_RECOMPUTE, Recompute
from asd_megatron.planner.setting import BYTES, Training

FLOAT = 4
INDEX = 8


def in_flight(layout: Layout, stage: int, micro_batches: int) -> int:
    """Forward passes of a chunk whose backward pass has not ended, at most. 1F1B: micro-batch by micro-batch, a stage
    runs ahead by the stages after it. Interleaved (Megatron's `get_pp_rank_microbatches`): twice as far, and through
    the chunks before its last one."""
    stages, chunks = layout.pipeline, layout.virtual_pipeline or 1
    after = stages - stage - 1
    most = after + 1 if chunks == 1 else 2 * after + (chunks - 1) * stages + 1
    return min(most, micro_batches * chunks)


def worst_expert_load(shape: ModelShape, layout: Layout) -> float:
    """Choices that one expert-parallel rank can get, over the mean: all tokens of all ranks choose its experts."""
    if shape.experts is None:
        return 1.0
    local = shape.experts.count // layout.expert
    return layout.expert * min(shape.experts.per_token, local) / shape.experts.per_token


@dataclass(frozen=True)
class Activations:
    """Of one micro-batch on one rank.

    Attributes:
        tokens: of the rank's part of the pack, padding included.
        longest: tokens of the longest sequence in it.
        on_cpu: whether it is computed on a CPU.
    """

    shape: ModelShape
    training: Training
    tokens: int
    longest: int = 0
    on_cpu: bool = False

    @property
    def element(self) -> int:
        """Bytes of a number of the model's dtype."""
        return BYTES[self.training.dtype]

    @property
    def _own(self) -> float:
        """The fraction of the tokens that this rank has between its linear layers."""
        layout = self.training.layout
        return 1 / layout.tensor if layout.sequence_parallel else 1.0

    @property
    def hidden(self) -> float:
        """Bytes of the hidden states as they pass from layer to layer."""
        return self.tokens * self._own * self.shape.hidden * self.element

    @property
    def gathered(self) -> float:
        """The same of all tokens, where sequence parallelism gathers them; otherwise 0."""
        return self.tokens * self.shape.hidden * self.element if self.training.layout.sequence_parallel else 0.0

    @property
    def _queries(self) -> float:
        """Numbers of a token's queries on this rank; `_keys`: of its keys."""
        return self.shape.heads * self.shape.head_dim / self.training.layout.tensor

    @property
    def _keys(self) -> float:
        return self.shape.kv_heads * self.shape.head_dim / self.training.layout.tensor

    @property
    def routed(self) -> float:
        """Choices of experts that this rank computes, of a mixture of experts: with `expert_load` times the mean."""
        if self.shape.experts is None:
            return 0.0
        load = self.training.expert_load if self.training.layout.expert > 1 else 1.0
        return self.tokens * self._own * self.shape.experts.per_token * load

    # ---------------------------------------------------------------- saved

    def saved(self, recompute: Recompute = NO_RECOMPUTE, window: int | None = None) -> float:
        """Bytes of one layer with this recomputation (`recompute.layers` is the caller's)."""
        if recompute.kind == "full":
            return self.hidden
        return self.attention(window) + (self._kept_mlp() if recompute.kind == "mlp" else self.mlp())

    def attention(self, window: int | None = None) -> float:
        """Of the attention half: its norm, projections, norms of heads, core attention."""
        b, t, heads = self.element, self.training.layout.tensor, self.shape.heads + self.shape.kv_heads
        q, k = self._queries, self._keys
        token = self._core(window)
        if self.shape.qk_norm == "projection":  # ours with both kinds of layers
            token += (FLOAT + b) * (q + k) + 2 * FLOAT
        elif self.shape.qk_norm == "head" and self.training.layers == "te":
            token += b * (q + k) + FLOAT * heads / t
        elif self.shape.qk_norm == "head":
            token += (FLOAT + b) * (q + k) + FLOAT * heads / t
            if b == FLOAT:  # keys are a view of the complete projection, which stays; of one key head queries too
                token += b * (q + k if self.shape.kv_heads > t else k)
        if self.training.layers == "local":
            token += 4 * b * self.shape.head_dim  # cosines and sines, of queries and of keys
        return self._norm_and_input() + self.tokens * token

    def _core(self, window: int | None) -> float:
        """Of the core attention and the projection after it, a token."""
        b, q, k = self.element, self._queries, self._keys
        heads = self.shape.heads / self.training.layout.tensor
        if self.training.layers == "local" and self.training.attention == "own":
            return self._local_core(window) + b * q
        token = b * (2 * q + 2 * k) + FLOAT * heads
        if self.training.attention == "flex":  # values are a view of the complete projection, which stays
            token += b * (q + k)
        return token + (q if self.training.fp8 else 0)  # the projection's input is one more tensor then

    def _local_core(self, window: int | None) -> float:
        """Of PyTorch's attention, a token: operands, result, log of the sums, places in the pack, and the mask of a
        window (of every token as many numbers as its sequence has tokens). Context parallelism has the keys of all
        ranks, and a mask."""
        b, q, k, context = self.element, self._queries, self._keys, self.training.layout.context
        a = 2 * b if self.on_cpu else b
        repeated = (k if self.on_cpu else q) * context
        masked = context > 1 or window is not None and window < self.longest
        sums = a if self.on_cpu else FLOAT
        heads = self.shape.heads / self.training.layout.tensor
        return a * (2 * q + 2 * repeated) + sums * heads + INDEX + (a * self.longest if masked else 0)

    def _norm_and_input(self) -> float:
        """Of a half's norm and the input of its first product."""
        if self.training.layers == "te":
            linear = 1 if self.training.fp8 else self.element
            return self.tokens * self._own * ((self.element + linear) * self.shape.hidden + FLOAT)
        return self.tokens * self._own * ((FLOAT + 2 * self.element) * self.shape.hidden + FLOAT)

    def mlp(self) -> float:
        """Of the other half: its norm, and the MLP or the experts."""
        b = self.element
        if self.shape.experts is not None:
            return self._norm_and_input() + self._router() + self.routed * self._expert()
        inner = 3 * b if self.training.layers == "te" else 5 * b
        if self.training.fp8:
            inner += 1 - b
        return self._norm_and_input() + self.tokens * inner * self.shape.ffn / self.training.layout.tensor

    def _expert(self) -> float:
        """Of one choice in its expert: its input, first product, activation and probability."""
        assert self.shape.experts is not None
        inner = 3 if self.training.layers == "te" else 6
        return self.element * (self.shape.hidden + inner * self.shape.experts.ffn) + FLOAT

    def _router(self) -> float:
        """Of the router and the dispatcher. Dense float32 probabilities, the softmax that the load balance is counted
        from, and for `te` a map of rows (int32, 2 experts + 1), for `local` one of choices (bool) and their places."""
        assert self.shape.experts is not None
        count, chosen = self.shape.experts.count, self.shape.experts.per_token
        places = FLOAT * (2 * count + 1) if self.training.layers == "te" else count + INDEX * chosen
        return self.tokens * self._own * (2 * FLOAT * count + (INDEX + FLOAT) * chosen + places)

    def _kept_mlp(self) -> float:
        """Of the second half when it is recomputed. Of a dense layer the input remains, which for `te` is the input of
        the norm, for `local` its output (so that the norm's own stays); where norms follow, both times the residual."""
        if self.shape.experts is not None:
            return self.mlp() - self.routed * self.element * self.shape.experts.ffn
        if self.training.layers == "te" or self.shape.post_norm:
            return self.hidden
        return self._norm_and_input()

    # ---------------------------------------------------------------- for a moment

    def workspace(self, recompute: Recompute = NO_RECOMPUTE) -> float:
        """Beside all that is saved, when the backward pass of a layer needs most. Of recomputed parts that is also what
        they would have saved.

        The backward pass of an MLP holds the gradient of the hidden states and the larger of two: at the second product
        its gathered gradient, the gradient of its input and (`local`, which does not add to the float32 buffers
        itself) of its weight; at the activation 2 F numbers a token more than are free by then.
        """
        again = 0.0
        if recompute.kind == "full":
            again = self.saved() - self.hidden
            if self.training.layers == "local" and not self.shape.post_norm:
                again += self.hidden  # the input itself, of which the norm makes a copy
        elif recompute.kind == "mlp":
            again = self.mlp() - self._kept_mlp()
        return again + self.hidden + self.gathered + self._mlp_backward()

    def _mlp_backward(self) -> float:
        b = self.element
        if self.shape.experts is not None:
            # Gradients of the experts' outputs as they arrive and in the experts' order, and of their inputs.
            wide = 2 * self.shape.experts.ffn if self.training.layers == "te" else 0
            return self.routed * b * (2 * self.shape.hidden + wide)
        inner = self.tokens * b * self.shape.ffn / self.training.layout.tensor
        return max(inner + self._weight_gradient(), 2 * inner)

    def _weight_gradient(self) -> float:
        """Of the largest matrix, before it is added to the float32 buffer (on a CPU as a float32 copy)."""
        if self.training.layers == "te":
            return 0.0
        each = self.element + (FLOAT if self.on_cpu and self.element < FLOAT else 0)
        return each * self.shape.hidden * self.shape.ffn / self.training.layout.tensor

    def forward_workspace(self) -> float:
        """Of a layer in a pass without gradients: the residual and its successor, and the wider of attention and MLP
        with the inputs of their products."""
        b = self.element
        q, k = self._queries, self._keys
        attention = self.tokens * (b * (2 * q + 2 * k) + self._core(None))
        if self.shape.experts is not None:
            wide = self.routed * b * (2 * self.shape.hidden + 3 * self.shape.experts.ffn)
        else:
            wide = self.tokens * b * 3 * self.shape.ffn / self.training.layout.tensor
        norm = self.tokens * self._own * self.shape.hidden * (FLOAT if self.training.layers == "local" else 0)
        return 3 * self.hidden + self.gathered + norm + max(attention, wide)

    def final_norm(self) -> float:
        """Saved by the norm after the last layer."""
        each = FLOAT + self.element if self.training.layers == "local" else self.element
        return self.tokens * self._own * (each * self.shape.hidden + FLOAT)

    def inputs(self) -> float:
        """Ids, positions and rotation angles of the pack."""
        return self.tokens * (2 * INDEX + FLOAT * self.shape.head_dim * len(self.shape.rotaries))

    def boundary(self, stage: int) -> float:
        """What Megatron's schedule holds of a micro-batch in flight: the stage's output, and its input where no layer
        saves that itself."""
        held = (stage > 0 and self.training.layers == "local") + (stage < self.training.layout.pipeline - 1)
        return held * self.hidden


def stage_saved(activations: Activations, stage: int, micro_batches: int) -> float:
    """Bytes saved on one rank of a stage when most micro-batches are in flight there: its layers, without the final
    norm. The layers of a chunk are the first of the model here, which matters for windows alone."""
    training, shape = activations.training, activations.shape
    layout, recompute = training.layout, training.recompute
    size = shape.layers // (layout.pipeline * (layout.virtual_pipeline or 1))
    first = stage * size
    chunk = 0.0
    for i in range(size):
        again = recompute if recompute.kind != "full" or recompute.layers is None or i < recompute.layers else None
        chunk += activations.saved(again or NO_RECOMPUTE, shape.attention[first + i].window)
    return in_flight(layout, stage, micro_batches) * (chunk + activations.inputs() + activations.boundary(stage))

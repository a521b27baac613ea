"""The typed containers that travel between the modules: problems, prompts, rollouts, per-token tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a reward's worker process reads problems without loading torch and numpy
    import numpy as np
    import torch
    from numpy.typing import ArrayLike
    from torch import Tensor

    TokenIds = np.ndarray[Any, np.dtype[np.int32]]
    """Token ids [n]: int32, 4 bytes a token where a Python tuple takes 36."""


class FinishReason(StrEnum):
    """Why a response ended."""

    STOP = "stop"  # an end token or a stop string
    LENGTH = "length"  # the token budget: a truncated response
    ABORT = "abort"  # the engine failed to finish it; never trained on


class DemonstrationSource(StrEnum):
    """Where the verified solution in a teacher's prompt came from."""

    GROUP = "group"  # another correct rollout of the same group
    SELF = "self"  # the rollout's own success (the sole correct one, when `exclude_self` is off)
    REFERENCE = "reference"  # the data set's reference solution
    REFERENCE_ANSWER = "reference_answer"  # only the final answer is known
    FEEDBACK_ONLY = "feedback_only"  # no solution block, the assessment line alone
    NONE = "none"  # no privileged context: u is masked to 0


@dataclass(frozen=True)
class Problem:
    """One verifiable problem. Exactly one of `prompt` (text) and `messages` (chat turns) is set.

    `prompt_id` is stable across runs: the line's own `id` if it has one, else a hash of its content.
    """

    prompt_id: str
    answer: str
    prompt: str | None = None
    messages: tuple[Mapping[str, str], ...] | None = None
    solution: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def question(self) -> str:
        """The text that the user asked: the raw prompt, or the last user turn."""
        if self.prompt is not None:
            return self.prompt
        return next(m["content"] for m in reversed(self.messages or ()) if m["role"] == "user")


@dataclass(frozen=True)
class Prompt:
    """A problem rendered to token ids, ready for an engine."""

    problem: Problem
    ids: tuple[int, ...]


@dataclass(frozen=True)
class SamplingParams:
    """How an engine samples `n` responses to a prompt. `top_k` 0 and `top_p` 1 switch the filters off; temperature 0 is
    greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 1024
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    n: int = 1


def as_array(values: ArrayLike, dtype: str) -> np.ndarray[Any, Any]:
    """The values [n] as a contiguous array; `values` itself where it is such an array already. Raises ValueError for
    another number of dimensions."""
    import numpy as np

    array = np.asarray(values, dtype=dtype, order="C")
    if array.ndim != 1:
        raise ValueError(f"an array of shape {array.shape} is no list of tokens")
    return array


def flat(arrays: Sequence[ArrayLike], dtype: torch.dtype) -> Tensor:
    """The arrays [n_i] one after another: [sum of n_i] on the CPU."""
    import numpy as np
    import torch

    return torch.from_numpy(np.concatenate(arrays) if arrays else np.zeros(0)).to(dtype)


def equal_fields(self: Any, other: Any) -> bool:
    """`__eq__` of dataclasses some of whose fields are arrays."""
    import numpy as np

    if other.__class__ is not self.__class__:
        return NotImplemented
    pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.compare)
    arrays = np.ndarray  # on either side: None == array is an array
    return all(np.array_equal(a, b) if isinstance(a, arrays) or isinstance(b, arrays) else a == b for a, b in pairs)


@dataclass(frozen=True, eq=False)
class Rollout:
    """One sampled response. Its numbers by token are numpy arrays; other sequences are converted.

    `prompt_ids`, `response_ids`: int32 [prompt tokens], [response tokens].
    `logprobs[t]` (float32) is the engine's log-probability (nats) of `response_ids[t]` at the sampling temperature,
    before top-p and top-k.
    `loss_mask[t]` (bool) is False for response tokens that were not sampled by the policy (tool output, forced tokens);
    not given: the policy sampled all.
    `weight_version` is that of the weights that sampled the first token; `version_changes` are (position, version)
    pairs: from that response position on, weights of that version sampled.
    `routed_experts` are the experts that the engine sent each token to (`rollout.routing_replay: engine`; None: not
    known, so the trainer routes by itself): int16 [prompt + response tokens - 1, layers, experts of a token], the most
    probable first. The last token has none: nothing is predicted from it. All are of the newest weights that sampled
    the response: after an interruption (partial rollouts, new weights amid a generation) the engine computes the
    earlier tokens again, so their routes can be others than those that they were sampled with.
    """

    prompt_id: str
    sample: int
    prompt_ids: TokenIds
    response_ids: TokenIds
    logprobs: np.ndarray[Any, np.dtype[np.float32]]
    finish_reason: FinishReason
    weight_version: int
    loss_mask: np.ndarray[Any, np.dtype[np.bool_]] = field(default_factory=lambda: as_array((), "bool"))
    text: str = ""
    version_changes: tuple[tuple[int, int], ...] = ()
    routed_experts: np.ndarray[Any, Any] | None = field(default=None, compare=False, repr=False)

    __eq__ = equal_fields

    def __post_init__(self) -> None:
        import numpy as np

        mask = self.loss_mask if len(self.loss_mask) else np.ones(len(self.response_ids), dtype=bool)
        object.__setattr__(self, "loss_mask", as_array(mask, "bool"))
        for name, dtype in (("prompt_ids", "int32"), ("response_ids", "int32"), ("logprobs", "float32")):
            object.__setattr__(self, name, as_array(getattr(self, name), dtype))
        if not len(self.response_ids) == len(self.logprobs) == len(self.loss_mask):
            raise ValueError(
                f"rollout {self.prompt_id}/{self.sample}: {len(self.response_ids)} response ids, "
                f"{len(self.logprobs)} log-probs and {len(self.loss_mask)} mask entries must be equally many"
            )
        tokens = len(self.prompt_ids) + len(self.response_ids)
        if self.routed_experts is not None and len(self.routed_experts) != tokens - 1:
            raise ValueError(
                f"rollout {self.prompt_id}/{self.sample}: {len(self.routed_experts)} routed tokens do not belong to "
                f"{tokens} tokens: all but the last have a route"
            )

    @property
    def truncated(self) -> bool:
        return self.finish_reason is FinishReason.LENGTH

    @property
    def across_versions(self) -> bool:
        """Whether several versions of the weights sampled it."""
        return bool(self.version_changes)


@dataclass(frozen=True)
class Group:
    """All rollouts of one prompt, complete. `rewards` is filled by the collector."""

    problem: Problem
    rollouts: tuple[Rollout, ...]
    rewards: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class Example:
    """A rewarded rollout with its group-relative advantage and its privileged prompt (int32 [tokens]; None: no context,
    u is 0). `overlong_penalty`: what its length takes from the reward that the advantage sees, at most 0; None: the
    recipe has no such penalty."""

    rollout: Rollout
    reward: float
    group_advantage: float
    teacher_prompt_ids: TokenIds | None = None
    demonstration_source: DemonstrationSource = DemonstrationSource.NONE
    demonstration_sample: int = -1
    overlong_penalty: float | None = None

    __eq__ = equal_fields

    def __post_init__(self) -> None:
        if self.teacher_prompt_ids is not None:
            object.__setattr__(self, "teacher_prompt_ids", as_array(self.teacher_prompt_ids, "int32"))

    @property
    def has_context(self) -> bool:
        return self.teacher_prompt_ids is not None


@dataclass(frozen=True)
class PackedTokens:
    """One packed (THD) micro-batch as one context-parallel rank holds it.

    Shapes: `input_ids`, `position_ids` int64 [T_local]; `cu_seqlens` int32 [sequences + 1], the padded boundaries of
    the complete pack before the context-parallel split (every length is a multiple of 2 * CP); `max_seqlen` the longest
    length. Each rank holds chunks r and 2 * CP - 1 - r of every sequence (the load-balanced layout of Transformer
    Engine).

    With `parents`, the boundaries are those of the segments of a prefix tree: segment i continues segment `parents[i]`
    < i (-1: it begins a sequence), and its tokens attend to all segments on the path to the root. (): no sharing. For a
    prompt of 6 tokens and two responses of 2 and 3:

        cu_seqlens 0 6 8 11      parents (-1, 0, 0)      position_ids 0 1 2 3 4 5 | 6 7 | 6 7 8

    `boundaries` are the numbers of `cu_seqlens` on the host, for planning that must not wait for the device; () where
    nobody kept them.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    parents: tuple[int, ...] = ()
    boundaries: tuple[int, ...] = ()

    def host_boundaries(self) -> tuple[int, ...]:
        """`boundaries`, copied from the device where nobody kept them."""
        return self.boundaries or tuple(self.cu_seqlens.tolist())


@dataclass(frozen=True)
class PackCounts:
    """What one micro-batch computes beside its padding. Of the complete pack: the same on all ranks that hold parts of
    it.

    `spans` has (position of the first token in its sequence, tokens) of each segment: the token at position p attends
    to p + 1 tokens. A prompt of 6 tokens and two responses of 2 and 3 that share it: (0, 6) (6, 2) (6, 3).
    `rows`: hidden states whose logits the head computes.
    """

    spans: tuple[tuple[int, int], ...]
    rows: int

    @property
    def tokens(self) -> int:
        """Tokens of the pack without padding; a shared prefix counts once."""
        return sum(length for _, length in self.spans)


@dataclass
class ComputedPacks:
    """The packs of one step, of one data-parallel rank: those of forward passes alone, and those of updates."""

    scored: list[PackCounts] = field(default_factory=list)
    trained: list[PackCounts] = field(default_factory=list)


@dataclass
class TokenTable:
    """Per-token numbers of a list of rollouts, flat over their response tokens.

    Rollout i owns rows offsets[i]:offsets[i+1]. For responses of 2 and 3 tokens:

        offsets            0 2 5
        row                0    1    2    3    4
        rollout, position  0,0  0,1  1,0  1,1  1,2

    Columns are [N] tensors on CPU (float32, masks bool), written to dumps and read by the metrics. A column that was
    not computed in this step is absent. Names: `student_logprobs`, `teacher_logprobs`, `engine_logprobs`,
    `reference_logprobs` (under the initial weights), `update_logprobs` (the student's in the number format of its
    update, where that is another than the scores'), `student_entropy`, `teacher_entropy` (nats), `pmi` (u, nats),
    `term` (what lambda multiplies), `divergence`, `reverse_kl`, `forward_kl` (nats), `agreement` (0 or 1), `advantage`,
    `loss_mask` (tokens that the loss sees), `has_context`, `clipped` (0 or 1), `importance`, `importance_affected`.
    Inside the trainer the same numbers are typed (`trainer/columns.py`).
    """

    offsets: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def for_lengths(cls, lengths: Sequence[int]) -> TokenTable:
        import torch

        offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
        offsets[1:] = torch.tensor(list(lengths), dtype=torch.int64).cumsum(0)
        return cls(offsets)

    @property
    def tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def rollouts(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> list[int]:
        """Tokens of each rollout."""
        return (self.offsets[1:] - self.offsets[:-1]).tolist()

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def __setitem__(self, name: str, values: Tensor) -> None:
        if values.shape != (self.tokens,):
            raise ValueError(f"column {name!r} has shape {tuple(values.shape)}, the table has {self.tokens} tokens")
        self.columns[name] = values

    def rows(self, name: str) -> list[Tensor]:
        """The column as one tensor for each rollout."""
        return list(self.columns[name].split(self.lengths))

    def spread(self, per_rollout: Tensor) -> Tensor:
        """[rollouts] -> [N]: each rollout's value at every one of its tokens."""
        return per_rollout.repeat_interleave(self.offsets[1:] - self.offsets[:-1])

"""What this rank is doing, for the watch over the ranks: its phase, its progress, and the call that it is in.

    position    counts up where a phase begins and where all ranks meet on the host group. Every rank passes the same
                places in the same order, so of two ranks the one with the lower position is behind
    marks       counts up with work inside a phase: a micro-batch, a decoded token of a batch, a tensor read or written
    operation   the call that the main thread is in, read from its stack by the thread that watches

The main thread pays for an addition at each of these places. A rank makes progress as long as one of the two numbers
moves.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import torch.distributed as dist

Phase = Literal["start", "rollout", "scoring", "update", "checkpoint", "evaluation"]
PHASES: tuple[Phase, ...] = get_args(Phase)

_PACKAGE = str(Path(__file__).parents[1])
_COMMUNICATION = ("/torch/distributed/", "/megatron/core/pipeline_parallel/p2p_communication")
_CALLERS = 2  # of the package, named in an operation


@dataclass
class _Activity:
    phase: Phase = "start"
    position: int = 0
    marks: int = 0


_now = _Activity()


def restart() -> None:
    """A run begins in this process, in the phase `start`."""
    _now.phase, _now.position, _now.marks = "start", 0, 0


def enter(phase: Phase) -> None:
    """A phase begins; it lasts until the next one does. On every rank, in the same order."""
    _now.phase = phase
    _now.position += 1


def count_collective(group: dist.ProcessGroup) -> None:
    """This rank comes to a collective of `group`; counted when all ranks meet there, in the main thread."""
    import torch.distributed as dist  # not for what starts servers alone

    if group.size() > 1 and group.size() == dist.get_world_size() and _in_main_thread():
        _now.position += 1


def mark() -> None:
    """Some work of the phase is done."""
    _now.marks += 1


def phase() -> Phase:
    """The present phase."""
    return _now.phase


@dataclass(frozen=True)
class Report:
    """What one rank is doing. waiting: its main thread is in a call of torch.distributed. collectives: by the name of a
    process group, how many collectives of it have begun on this rank."""

    phase: Phase
    position: int
    marks: int
    waiting: bool
    operation: str
    collectives: Mapping[str, int]

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Report | None:
        """None for a text that is no report."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return None


def report(groups: Sequence[dist.ProcessGroup] = ()) -> Report:
    """What this rank is doing; called in another thread than the main one. groups: those whose collectives are counted:
    of no group that also has point-to-point transfers, which gloo counts with them."""
    waiting, operation = _operation(sys._current_frames().get(threading.main_thread().ident or 0))
    return Report(_now.phase, _now.position, _now.marks, waiting, operation, _counts(groups))


def _counts(groups: Sequence[dist.ProcessGroup]) -> dict[str, int]:
    try:
        return {group.group_name: int(group._get_sequence_number_for_group()) for group in groups}  # type: ignore[attr-defined]
    except RuntimeError:  # a group that is being destroyed
        return {}


def _operation(frame: FrameType | None) -> tuple[bool, str]:
    """Whether a stack waits for other ranks, and its innermost call in words:

    all_reduce in meet (distributed/objects.py:154), called by generating (run/session.py:241)
    """
    if frame is None:
        return False, "unknown"
    innermost, waiting = frame.f_code.co_name, False
    callers: list[str] = []
    found: FrameType | None = frame
    while found is not None and len(callers) < _CALLERS:
        file = found.f_code.co_filename
        if file.startswith(_PACKAGE):
            callers.append(f"{found.f_code.co_name} ({file[len(_PACKAGE) + 1 :]}:{found.f_lineno})")
        elif not callers:
            waiting |= any(part in file for part in _COMMUNICATION)
        found = found.f_back
    if not callers:
        return waiting, f"{innermost} ({frame.f_code.co_filename}:{frame.f_lineno})"
    text = ", called by ".join(callers)
    return waiting, text if frame.f_code.co_filename.startswith(_PACKAGE) else f"{innermost} in {text}"


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()

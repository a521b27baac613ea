"""The rollout bank: responses on disk until their step is trained and saved, so that a stop or a kill loses none.

    RUN/bank/step_000061.jsonl    the groups drawn for step 61: their responses, as they finish or are suspended

Checkpoint and bank share the work. The checkpoint of step s names the problems that are drawn and not trained on
(`Collector.state`); all others follow from (seed, step). The bank has their tokens, and is written in the background.

**Guarantee.** A run that resumes from the checkpoint of step s, however it ended,

* draws exactly the problems that it would have drawn: none is skipped, none is drawn for two steps;
* continues every response with the stored ids, log-probs and versions, never from text: a finished response is not
  sampled again, an unfinished one is continued from the last suspension (the end of a step with partial rollouts, or a
  stop on request);
* loses at most what servers had sampled of unfinished responses since then, and finished responses that came in the
  last milliseconds before a kill. A node that loses its power may lose the last seconds.

A damaged, missing or unwritable bank loses tokens, never problems: they are sampled again.

**Weights that are gone.** Steps after s are repeated, and their updates may differ in the last bits: weights of a
version v > s that were made before the kill do not exist any more. A rollout of theirs has log-probs of its own policy,
so an importance weight could correct it. But its version would name other weights from now on (staleness and mismatch
would be measured against the wrong ones), no recipe limits the distance between the two branches, and those weights may
be what the run was taken back from. Therefore a response is cut at its first token of a version > s and continued from
there. What is left is what the resumed run itself had sampled by then: where it is cut depends on the moment of an
update alone, not on the text, and no problem is dropped, so lengths are not biased. Responses of steps after s that
weights of versions <= s sampled (the step in hand; with overlap the next one too) are complete and are used.

**Dropped**, counted and sampled again: a group with a response whose first token is older than `max_staleness` allows
(0 without overlap and partial rollouts; all of the group, since the old responses are the long ones), and one of other
sampling settings, prompt ids, seed or model. With stop strings unfinished responses are dropped too: one that spans the
cut would be missed.

**Size.** Responses of problems not trained on yet, and of trained steps after the newest checkpoint those of weights
that it has: with overlap at most three steps' and the carried ones, about 11 bytes a token, and with routing replay the
routed experts. A file goes when none of its groups is needed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from asd_megatron.errors import plural
from asd_megatron.files import remove_partial, system_reason
from asd_megatron.records import FinishReason, SamplingParams, equal_fields
from asd_megatron.rollout import journal

if TYPE_CHECKING:
    from asd_megatron.records import TokenIds

log = logging.getLogger(__name__)

Key = tuple[int, str]
"""A group: the step that its problem was drawn for, and the problem's id."""
_NAME = re.compile(r"step_(\d{6,})\.jsonl")


@dataclass(frozen=True, eq=False)
class Response:
    """The tokens of a sample so far, their log-probs, and (position, version): the first position of each version of
    the weights. `finish_reason` None: it is unfinished. `routed_experts`: of a finished one, as in `Rollout`."""

    ids: TokenIds = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    logprobs: np.ndarray[Any, np.dtype[np.float32]] = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    versions: tuple[tuple[int, int], ...] = ()
    finish_reason: FinishReason | None = None
    routed_experts: np.ndarray[Any, Any] | None = field(default=None, repr=False)

    __eq__ = equal_fields

    def until(self, version: int) -> Response:
        """Without the tokens from the first one on that weights newer than `version` sampled."""
        cut = next((position for position, number in self.versions if number > version), None)
        if cut is None:
            return self
        kept = tuple(pair for pair in self.versions if pair[0] < cut)
        return Response(self.ids[:cut], self.logprobs[:cut], kept)


@dataclass
class _Held:
    """What is known of a group that no engine has. `restored`: it was read from disk."""

    settings: str
    responses: dict[int, Response]
    restored: bool

    @property
    def tokens(self) -> int:
        return sum(len(response.ids) for response in self.responses.values())


class RolloutBank:
    """The bank of one run, on global rank 0. Methods return at once, but for the first `begin_step` (it reads what is
    on disk) and `close`; none raises for what the disk does. `keep` may be called in any thread.

    folder: RUN/bank. resumed: the step whose weights the run continues with; 0: the initial ones. saved_step: the step
    of the newest complete checkpoint, whenever it is asked for. identity: what stored responses must share with the run
    beside their sampling settings: its seed, its model. say: prints a line.
    `restored_groups`, `restored_tokens`, `dropped_tokens` count what was read from disk, since the start: groups with
    responses that are used, their tokens, and tokens that are not used.
    """

    def __init__(
        self, folder: Path, *, resumed: int, saved_step: Callable[[], int], identity: str, say: Callable[[str], None]
    ) -> None:
        self._folder, self._resumed, self._saved_step = folder, resumed, saved_step
        self._identity, self._say = identity, say
        self._journal = journal.Journal(folder, partial(self._warn, "written"))
        self._held: dict[Key, _Held] = {}
        self._oldest: dict[Key, int | None] = {}  # of every group on disk: the oldest version of its tokens
        self._settled: dict[Key, int] = {}  # the step that trained on the group, or did not need it
        self._oldest_allowed: int | None = None
        self._lock = threading.Lock()
        self._read = False
        self.restored_groups = 0
        self.restored_tokens = 0
        self.dropped_tokens = 0

    # ---------------------------------------------------------------- steps

    def begin_step(self, left_over: Set[Key], oldest_allowed: int | None) -> None:
        """Groups of a step are drawn next. left_over: those that earlier steps left. oldest_allowed: the oldest version
        of a first token that the step may train on; None: any."""
        self._oldest_allowed = oldest_allowed
        if not self._read:
            self._read = True
            self._restore(left_over)

    def end_step(self, step: int, left_over: Set[Key]) -> None:
        """`step` has its groups; of those drawn up to now only `left_over` may be trained on later. Files that nothing
        needs any more are removed."""
        for key in self._oldest.keys() | self._held.keys():
            if key[0] <= step and key not in left_over and key not in self._settled:
                self._settled[key] = step
                self._drop(key, "not asked for again")
        self._prune()

    def close(self) -> None:
        """Write what waits, and remove what the newest checkpoint makes useless. Safe to call twice."""
        if not self._read:
            return
        self._prune()
        self._journal.close()
        if not self._oldest:
            with suppress(OSError):  # there is none, or it has somebody else's file
                self._folder.rmdir()

    # ---------------------------------------------------------------- groups

    def draw(self, key: Key, prompt_ids: Iterable[int], params: SamplingParams) -> dict[int, Response]:
        """The responses that there are of a group that is requested now, by sample; the others are sampled."""
        settings = _settings(self._identity, prompt_ids, params)
        held = self._held.get(key)
        if held is not None:
            reason = self._unusable(held, settings)
            if reason is not None:
                self._drop(key, reason)
            else:
                del self._held[key]
                found = self._usable(held, params)
                if held.restored and found:
                    self.restored_groups += 1
                    self.restored_tokens += sum(len(response.ids) for response in found.values())
                return found
        self._oldest[key] = None
        self._journal.append(_file(key[0]), {"id": key[1], "settings": settings})
        return {}

    def keep(self, key: Key, sample: int, response: Response) -> None:
        """A response of a group that was drawn: finished, or the tokens of an unfinished one so far."""
        if len(response.ids) == 0:
            return
        with self._lock:
            if key in self._oldest:
                known = self._oldest[key]
                self._oldest[key] = min(response.versions[0][1], response.versions[0][1] if known is None else known)
                self._journal.append(_file(key[0]), _record(key[1], sample, response))

    def hold(self, key: Key, params: SamplingParams, prompt_ids: Iterable[int], found: dict[int, Response]) -> None:
        """A group that was drawn and is aborted: the responses that it has are kept for its next `draw`."""
        if found and key not in self._settled:
            self._held[key] = _Held(_settings(self._identity, prompt_ids, params), found, restored=False)

    def _unusable(self, held: _Held, settings: str) -> str | None:
        if held.settings != settings:
            return "of other sampling settings, prompts, seed or model"
        first = [r.versions[0][1] for r in held.responses.values() if r.versions]
        if self._oldest_allowed is not None and min(first, default=self._oldest_allowed) < self._oldest_allowed:
            return f"of weights older than version {self._oldest_allowed}"
        return None

    def _usable(self, held: _Held, params: SamplingParams) -> dict[int, Response]:
        """The group's responses; unfinished ones only where they can be continued."""
        found = {sample: _at_limit(r, params.max_new_tokens) for sample, r in held.responses.items()}
        if not params.stop:
            return found
        kept = {sample: r for sample, r in found.items() if r.finish_reason is not None}
        self.dropped_tokens += held.restored * sum(len(r.ids) for sample, r in found.items() if sample not in kept)
        return kept

    def _drop(self, key: Key, reason: str) -> None:
        held = self._held.pop(key, None)
        if held is not None and held.restored:
            self.dropped_tokens += held.tokens
            tokens = plural(held.tokens, "stored token")
            log.info("%s of problem %s of step %d dropped: %s", tokens, key[1], key[0], reason)

    # ---------------------------------------------------------------- files

    def _restore(self, left_over: Set[Key]) -> None:
        """Read what earlier starts of the run left, and keep of it on disk what this one can use."""
        gone = damaged = 0
        try:
            remove_partial(self._folder)
            for path in sorted(self._folder.glob("step_*.jsonl")):
                match = _NAME.fullmatch(path.name)
                if match is None:
                    continue
                step = int(match[1])
                groups, lines = _read_groups(path)
                damaged += lines
                for name, held in groups.items():
                    if step > self._resumed or (step, name) in left_over:  # others were trained on
                        gone += self._take_over((step, name), held)
                self._rewrite(path, step)
        except OSError as error:
            self._warn("read", system_reason(error))
        self.dropped_tokens += gone
        self._report(gone, damaged)

    def _take_over(self, key: Key, held: _Held) -> int:
        """Hold what there is of a group by weights that still exist; returns how many tokens are of others."""
        tokens = held.tokens
        cut = {sample: response.until(self._resumed) for sample, response in held.responses.items()}
        held.responses = {sample: response for sample, response in cut.items() if len(response.ids)}
        if held.responses:
            self._held[key] = held
            self._oldest[key] = min(response.versions[0][1] for response in held.responses.values())
        return tokens - held.tokens

    def _rewrite(self, path: Path, step: int) -> None:
        kept = [(name, held) for (drawn, name), held in self._held.items() if drawn == step]
        if not kept:
            path.unlink()
            return
        records: list[Mapping[str, Any]] = []
        for name, held in kept:
            records.append({"id": name, "settings": held.settings})
            records += [_record(name, sample, response) for sample, response in sorted(held.responses.items())]
        journal.write(path, records)

    def _report(self, gone: int, damaged: int) -> None:
        if damaged:
            self._say(f"warning: rollout bank: {plural(damaged, 'line')} torn or damaged, left out")
        if not self._held and not gone:
            return
        responses = [response for held in self._held.values() for response in held.responses.values()]
        finished = sum(response.finish_reason is not None for response in responses)
        tokens = sum(len(response.ids) for response in responses)
        lost = f"; {plural(gone, 'token')} of weights after step {self._resumed} dropped" if gone else ""
        self._say(
            f"rollout bank: {plural(finished, 'finished response')} and {len(responses) - finished} begun"
            f" ({plural(tokens, 'token')}) of {plural(len(self._held), 'group')} are not sampled again{lost}"
        )

    def _prune(self) -> None:
        """Remove the files of which no group is needed: one that is not settled, or that would be asked for again by a
        run that resumes from the newest checkpoint and finds tokens of weights that it has."""
        saved = self._saved_step()
        with self._lock:
            needed = {
                step
                for (step, name), oldest in self._oldest.items()
                if (settled := self._settled.get((step, name))) is None
                or settled > saved
                and oldest is not None
                and oldest <= saved
            }
            for step in {step for step, _ in self._oldest} - needed:
                self._journal.remove(_file(step))
            self._oldest = {key: oldest for key, oldest in self._oldest.items() if key[0] in needed}
            self._settled = {key: settled for key, settled in self._settled.items() if key[0] in needed}

    def _warn(self, verb: str, reason: str) -> None:
        self._say(f"warning: {self._folder} cannot be {verb} ({reason}): a resumed run samples its responses again")


def _file(step: int) -> str:
    return f"step_{step:06d}.jsonl"


def _settings(identity: str, prompt_ids: Iterable[int], params: SamplingParams) -> str:
    """What a stored response must have been sampled with, as a digest."""
    text = json.dumps([identity, list(map(int, prompt_ids)), asdict(params)])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _record(name: str, sample: int, response: Response) -> Mapping[str, Any]:
    routes = {} if response.routed_experts is None else {"routed_experts": response.routed_experts}
    return {
        "id": name,
        "sample": sample,
        "finish_reason": response.finish_reason,
        "versions": response.versions,
        "ids": response.ids,
        "logprobs": response.logprobs,
        **routes,
    }


def _read_groups(path: Path) -> tuple[dict[str, _Held], int]:
    """The groups of a file by problem, and how many lines cannot be used. A later record of a sample replaces an
    earlier one, and a new draw all of them. Raises OSError."""
    records, unusable = journal.read(path)
    found: dict[str, _Held] = {}
    for record in records:
        try:
            name = record["id"]
            if "settings" in record:
                found[name] = _Held(record["settings"], {}, restored=True)
            else:
                found[name].responses[int(record["sample"])] = _response(record)  # KeyError: its draw is damaged
        except (AttributeError, KeyError, TypeError, ValueError):
            unusable += 1
    return found, unusable


def _response(record: journal.Record) -> Response:
    """Raises an error of several kinds for a record that is none of a response."""
    ids, logprobs, reason = record["ids"], record["logprobs"], record["finish_reason"]
    versions = tuple((int(position), int(version)) for position, version in record["versions"])
    positions = [position for position, _ in versions]
    if len(ids) != len(logprobs) or positions[:1] != [0] or positions != sorted(set(positions)):
        raise ValueError("its parts do not fit together")
    return Response(
        ids.astype(np.int32),
        logprobs.astype(np.float32),
        versions,
        None if reason is None else FinishReason(reason),
        record.get("routed_experts"),
    )


def _at_limit(response: Response, limit: int) -> Response:
    """An unfinished response that has all the tokens that it may have is finished."""
    full = response.finish_reason is None and len(response.ids) >= limit
    return replace(response, finish_reason=FinishReason.LENGTH) if full else response

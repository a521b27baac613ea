"""One synchronisation with fake servers and transports: order, labels, verification, failures at every stage."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from asd_megatron.rollout.sglang.weight_sync.protocol import NamedTensors, Receiver, VerificationError
from asd_megatron.rollout.sglang.weight_sync.synchronise import SyncReport, synchronise
from asd_megatron.rollout.sglang.weight_sync.verification import Probe, WeightVerifier
from tests.rollout.sglang.weight_sync.world import FakeReceiver

LABEL = "0123abcd-7"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 0,
    "hidden_size": 4,
    "num_attention_heads": 1,
    "vocab_size": 64,
    "tie_word_embeddings": True,
}
MODEL = [("model.embed_tokens.weight", torch.randn(64, 4)), ("model.norm.weight", torch.randn(4))]
ALL_STEPS = ["/pause_generation", "/update_weight_version", "/begin_weight_update", "/end_weight_update"]
ALL_STEPS += ["/update_weight_version", "/continue_generation"]


class FakeTransport:
    """Records what it was sent; fails as configured."""

    def __init__(self, failures: dict[str, str] | None = None, *, needs_session: bool = True) -> None:
        self.needs_session = needs_session
        self.sent: list[tuple[str, Tensor]] = []
        self.urls: list[str] = []
        self._failures = failures or {}

    def send(self, receivers: Sequence[Receiver], tensors: NamedTensors, label: str) -> dict[str, str]:
        self.sent = list(tensors)
        self.urls = [receiver.url for receiver in receivers]
        return {url: why for url, why in self._failures.items() if url in self.urls}

    def close(self) -> None: ...


class Checking:
    """The answers of a server that holds the tensors that it was last given."""

    def __init__(self, hashes: dict[str, str] | None = None, ranks: Sequence[int] = (0,)) -> None:
        self.hashes, self.ranks = hashes or {}, ranks
        self.logprobs: list[float | None] = [-1.0, -2.0]

    def __call__(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/weights_checker":
            return {
                "success": True,
                "ranks": [
                    {"checksums": self.hashes, "parallelism_info": [{"role": "target", "tp_rank": rank}]}
                    for rank in self.ranks
                ],
            }
        if path == "/generate":
            tokens = zip([None, *self.logprobs], body["input_ids"], strict=True)
            return {"meta_info": {"input_token_logprobs": [[logprob, token, None] for logprob, token in tokens]}}
        return {"success": True}


def _verifier(probe: Probe | None = None) -> WeightVerifier:
    return WeightVerifier(CONFIG, dtype=torch.float32, device="cpu", probe=probe)


def _right() -> dict[str, str]:
    """Checksums of MODEL as a server reports them."""
    verifier = _verifier()
    list(verifier.watch(MODEL, [FakeReceiver()]))
    assert verifier._checksums is not None
    return verifier._checksums.expected(1, 0)


def _labels(receiver: FakeReceiver) -> list[str]:
    return [body["new_version"] for path, body in receiver.calls if path == "/update_weight_version"]


def test_order_and_labels() -> None:
    receivers, transport = [FakeReceiver("http://a"), FakeReceiver("http://b")], FakeTransport()
    report = synchronise(transport, receivers, MODEL, LABEL)
    for receiver in receivers:
        assert receiver.paths == ALL_STEPS
        assert _labels(receiver) == [f"{LABEL}-incomplete", LABEL]
        assert receiver.calls[0] == ("/pause_generation", {"mode": "retract"})
        assert not receiver.calls[1][1]["abort_all_requests"]
    assert transport.sent == MODEL
    assert (report.failures, report.alive, report.tensors, report.bytes) == ({}, (), 2, 4 * (256 + 4))
    assert (report.checked, report.probes) == (0, {})


def test_a_transport_without_sessions_opens_none() -> None:
    receiver = FakeReceiver()
    synchronise(FakeTransport(needs_session=False), [receiver], MODEL, LABEL)
    assert receiver.paths == [path for path in ALL_STEPS if "weight_update" not in path]


def test_a_session_left_open_is_ended_first() -> None:
    open_sessions = [True]

    def answer(path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/begin_weight_update":
            if open_sessions:
                return {"success": False, "message": "a weight-update session is already open"}
            open_sessions.append(True)
        if path == "/end_weight_update":
            open_sessions.clear()
        return {}

    receiver = FakeReceiver(answer=answer)
    assert synchronise(FakeTransport(), [receiver], MODEL, LABEL).failures == {}
    begin, end = "/begin_weight_update", "/end_weight_update"
    assert [path for path in receiver.paths if path in (begin, end)] == [begin, end, begin, end]


@pytest.mark.parametrize("path", ALL_STEPS[:4])
def test_a_failed_server_stays_paused_and_incomplete_while_the_others_go_on(path: str) -> None:
    def answer(asked: str, body: dict[str, Any]) -> dict[str, Any]:
        if asked == path:
            raise OSError("connection refused")
        return {}

    broken, good, transport = FakeReceiver("http://broken", answer), FakeReceiver("http://good"), FakeTransport()
    report = synchronise(transport, [broken, good], MODEL, LABEL)
    assert report.failures == {"http://broken": "connection refused"}
    assert transport.sent == MODEL
    assert good.paths == ALL_STEPS
    assert "/continue_generation" not in broken.paths
    assert LABEL not in _labels(broken)
    assert report.alive == (() if path in ALL_STEPS[:2] else ("http://broken",))


def test_what_the_transport_could_not_bring_is_named() -> None:
    a, b = FakeReceiver("http://a"), FakeReceiver("http://b")
    report = synchronise(FakeTransport({"http://a": "cut off"}), [a, b], MODEL, LABEL)
    assert report.failures == {"http://a": "cut off"}
    assert report.alive == ("http://a",)
    assert _labels(a) == [f"{LABEL}-incomplete"] * 2
    assert b.paths == ALL_STEPS


def test_tensors_are_read_to_their_end_whatever_happens() -> None:
    class Careless(FakeTransport):
        def send(self, receivers: Sequence[Receiver], tensors: NamedTensors, label: str) -> dict[str, str]:
            next(iter(tensors))
            raise KeyError("a bug")

    read: list[str] = []

    def stream() -> Any:
        for name, tensor in MODEL:
            read.append(name)
            yield name, tensor

    with pytest.raises(KeyError):
        synchronise(Careless(), [FakeReceiver()], stream(), LABEL, verifier=_verifier())
    assert read == [name for name, _ in MODEL]
    read.clear()
    assert synchronise(FakeTransport(), [], stream(), LABEL, verifier=_verifier()).failures == {}
    assert read == [name for name, _ in MODEL]


def test_a_verification_counts_what_it_compared() -> None:
    checking = Checking(_right())
    probe = Probe((5, 6, 7), (-1.0, -2.00004), 3e-5)  # the tolerance is of the mean
    receiver = FakeReceiver(answer=checking)
    report = synchronise(FakeTransport(), [receiver], MODEL, LABEL, verifier=_verifier(probe))
    assert report.checked == 2
    difference = report.probes[receiver.url]
    assert (difference.mean, difference.maximum) == pytest.approx((2e-5, 4e-5)) and not difference.exceeded
    assert receiver.paths == [*ALL_STEPS[:4], "/weights_checker", *ALL_STEPS[4:], "/generate"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": "0" * 16}, "http://fake, rank 0, .*model.norm.weight differs"),
        ({"model.norm.weight": None}, "model.norm.weight is missing there"),
        ({"model.layers.0.more": "1" * 16}, "model.layers.0.more is not the trainer's"),
    ],
)
def test_other_weights_stop_everything_before_the_server_gets_its_label(
    change: dict[str, str | None], message: str
) -> None:
    hashes = {name: value for name, value in {**_right(), **change}.items() if value is not None}
    receiver = FakeReceiver(answer=Checking(hashes))
    with pytest.raises(VerificationError, match=message):
        synchronise(FakeTransport(), [receiver], MODEL, LABEL, verifier=_verifier())
    assert _labels(receiver) == [f"{LABEL}-incomplete"]
    assert "/continue_generation" not in receiver.paths


def test_a_server_that_never_answers_is_a_failure_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own time limit fails: the others and the tensors do not wait for it."""
    monkeypatch.setattr("asd_megatron.rollout.sglang.weight_sync.synchronise.SLACK_SECONDS", 0.2)
    released = threading.Event()

    def hang(path: str, body: dict[str, Any]) -> dict[str, Any]:
        released.wait(60)
        return {}

    monkeypatch.setattr("asd_megatron.rollout.sglang.weight_sync.synchronise.ALIVE_SECONDS", 0.05)
    silent, good, transport = FakeReceiver("http://silent", hang), FakeReceiver("http://good"), FakeTransport()
    try:
        report = synchronise(transport, [silent, good], MODEL, LABEL, timeout=0.05)
    finally:
        released.set()
    assert "did not answer within" in report.failures["http://silent"]
    assert (list(report.failures), report.alive, transport.urls) == (["http://silent"], (), ["http://good"])
    assert good.paths == ALL_STEPS


def test_more_ranks_than_expected_are_named() -> None:
    receiver = FakeReceiver(answer=Checking(_right(), ranks=(0, 1)))
    with pytest.raises(VerificationError, match=r"ranks \[0, 1\], but should have 1"):
        synchronise(FakeTransport(), [receiver], MODEL, LABEL, verifier=_verifier())


def test_an_unknown_form_of_checksums_is_named() -> None:
    receiver = FakeReceiver()
    with pytest.raises(VerificationError, match="in an unknown form"):
        synchronise(FakeTransport(), [receiver], MODEL, LABEL, verifier=_verifier())


@pytest.mark.parametrize("found", [-2.5, float("nan"), None])  # None: NaN in SGLang's JSON
def test_other_logprobs_warn_first_and_stop_when_they_come_again(
    found: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    checking, verifier = Checking(_right()), _verifier(Probe((5, 6, 7), (-1.0, -2.0), 1e-3))
    receiver = FakeReceiver(answer=checking)

    def update(logprob: float | None, label: str = LABEL) -> SyncReport:
        caplog.clear()
        checking.logprobs[1] = logprob
        return synchronise(FakeTransport(), [receiver], MODEL, label, verifier=verifier)

    report = update(found)
    assert report.failures == {} and report.probes[receiver.url].exceeded
    assert _labels(receiver)[-1] == LABEL  # it serves
    (record,) = caplog.records
    assert record.levelname == "WARNING" and receiver.url in record.message
    assert "token 2" in record.message and "rollout.verify_tolerance" in record.message
    assert not update(-2.0).probes[receiver.url].exceeded and not caplog.records
    assert update(found).probes[receiver.url].exceeded  # not in a row
    assert update(found).probes[receiver.url].exceeded  # the same weights again, as after an evaluation
    with pytest.raises(VerificationError, match=r"2 weight updates in a row.*rollout\.verify_tolerance"):
        update(found, "0123abcd-8")


def test_each_servers_probe_is_counted_for_itself() -> None:
    wrong, right = Checking(_right()), Checking(_right())
    wrong.logprobs[0] = -9.0
    verifier = _verifier(Probe((5, 6, 7), (-1.0, -2.0), 1e-3))
    for first, second in ((wrong, right), (right, wrong)):
        receivers = [FakeReceiver("http://a", first), FakeReceiver("http://b", second)]
        report = synchronise(FakeTransport(), receivers, MODEL, LABEL, verifier=verifier)
        assert [url for url, probe in report.probes.items() if probe.exceeded] == [
            receiver.url for receiver in receivers if receiver._answer is wrong
        ]


def test_memory_is_taken_back_before_a_server_generates() -> None:
    receiver = FakeReceiver()

    def take_back(taker: Receiver) -> None:
        taker.call("/resume_memory_occupation", {}, 1.0)

    synchronise(FakeTransport(), [receiver], MODEL, LABEL, before_generating=take_back)
    assert receiver.paths == [*ALL_STEPS[:4], "/resume_memory_occupation", *ALL_STEPS[4:]]


def test_a_probe_needs_one_logprob_a_token_but_the_first() -> None:
    with pytest.raises(ValueError, match="3 tokens"):
        Probe((1, 2, 3), (0.0,), 1e-3)

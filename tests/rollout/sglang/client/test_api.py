"""One server over HTTP: what is asked, what is accepted, what is an error of which kind."""

from __future__ import annotations

import asyncio
import copy
import shutil
import ssl
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from asd_megatron.errors import UserError
from asd_megatron.rollout.sglang.client.api import (
    InvalidAnswer,
    ServerBusy,
    ServerDown,
    ServerRefused,
    SGLangServer,
    new_session,
    read_generation,
)
from tests.rollout.sglang.fake_sglang import ADMIN_KEY, API_KEY, FakeSGLang, made_from

Use = Callable[[SGLangServer], Awaitable[Any]]


@pytest.fixture
def fake() -> Iterator[FakeSGLang]:
    server = FakeSGLang(label="tag-1")
    yield server
    server.close()


def ask(url: str, use: Use, api_key: str = API_KEY, admin_key: str = ADMIN_KEY, ca_file: str | None = None) -> Any:
    async def run() -> Any:
        async with new_session() as session:
            return await use(SGLangServer(url, session, api_key, admin_key, ca_file))

    return asyncio.run(run())


def sample(server: SGLangServer) -> Awaitable[Any]:
    return server.generate([3, 4], {"max_new_tokens": 5})


def test_a_sample(fake: FakeSGLang) -> None:
    answer = ask(fake.url + "/", sample)
    assert tuple(answer.output_ids) == tuple(made_from([3, 4], 5))
    assert tuple(answer.logprobs) == (-0.5,) * 5
    assert (answer.finish_reason, answer.label, answer.spans) == ("length", "tag-1", ((0, "tag-1"),))


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("reset", ServerDown),
        ("500", ServerDown),
        ("502", ServerDown),
        ("503", ServerBusy),
        ("429", ServerBusy),
        ("400", ServerRefused),
        ("404", ServerRefused),
        ("malformed", InvalidAnswer),
        ("nan", InvalidAnswer),
    ],
)
def test_each_failure_is_of_its_kind_and_names_the_server(fake: FakeSGLang, fault: str, kind: type[Exception]) -> None:
    fake.faults.append(fault)
    with pytest.raises(kind, match=fake.url) as caught:
        ask(fake.url, sample)
    if fault.isdigit():
        assert fault in str(caught.value)
        assert f"status {fault}" in str(caught.value)


def test_proxies_of_the_environment_are_not_used(fake: FakeSGLang, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert ask(fake.url, sample).label == "tag-1"
    ask(fake.url, lambda server: server.healthy(5.0))


def test_nobody_listens() -> None:
    with pytest.raises(ServerDown, match="cannot be reached"):
        ask("http://127.0.0.1:9", sample)


def test_no_answer_in_time(fake: FakeSGLang) -> None:
    fake.hung = True
    with pytest.raises(ServerDown, match="in time"):
        ask(fake.url, lambda server: server.healthy(0.1))


def test_each_key_opens_its_own_doors(fake: FakeSGLang) -> None:
    with pytest.raises(UserError, match="ASD_MEGATRON_API_KEY"):
        ask(fake.url, sample, api_key="wrong")
    with pytest.raises(UserError, match="ASD_MEGATRON_ADMIN_KEY"):
        ask(fake.url, lambda server: server.post("/x", {}, 5.0), admin_key="wrong")
    assert ask(fake.url, lambda server: server.post("/x", {}, 5.0)) == {"success": True}


def test_administration_falls_back_to_the_only_key_there_is(fake: FakeSGLang) -> None:
    assert ask(fake.url, lambda server: server.post("/x", {}, 5.0), api_key=ADMIN_KEY, admin_key="")["success"]


def test_answers_that_are_no_objects_are_wrapped(fake: FakeSGLang) -> None:
    assert ask(fake.url, lambda server: server.post("/text", None, 5.0)) == {"text": "Cache flushed."}
    assert ask(fake.url, lambda server: server.post("/list", {"a": 1}, 5.0)) == {"value": [{"a": 1}]}


def test_what_could_not_be_carried_out_says_why(fake: FakeSGLang) -> None:
    with pytest.raises(ServerRefused, match="it failed") as caught:
        ask(fake.url, lambda server: server.post("/fails", {}, 5.0))
    assert caught.value.status == 400


def test_unusable_certificate_file(tmp_path: Path) -> None:
    async def run() -> None:
        async with new_session() as session:
            SGLangServer("https://localhost:1", session, ca_file=str(tmp_path / "none.pem"))

    with pytest.raises(UserError, match="none.pem"):
        asyncio.run(run())


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_a_server_with_its_own_certificate(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    arguments = f"req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=fake -keyout {key} -out {certificate}".split()
    subprocess.run(["openssl", *arguments, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, key)
    fake = FakeSGLang(label="tag-1", tls=tls)
    try:
        assert ask(fake.url, sample, ca_file=str(certificate)).label == "tag-1"
        with pytest.raises(ServerDown, match="certificate"):
            ask(fake.url, sample)
    finally:
        fake.close()


GOOD = {
    "output_ids": [5, 6, 7],
    "meta_info": {
        "finish_reason": {"type": "stop", "matched": 7},
        "weight_version": "b",
        "weight_versions": [{"version": "a", "start": 0, "end": 2}, {"version": "b", "start": 2, "end": 3}],
        "output_token_logprobs": [[-1.0, 5, None], [-2.0, 6, None], [0, 7, None]],
    },
}


def test_spans_are_kept() -> None:
    answer = read_generation(GOOD)
    assert answer.spans == ((0, "a"), (2, "b"))
    assert tuple(answer.logprobs) == (-1.0, -2.0, 0)


def test_a_server_without_spans() -> None:
    answer = copy.deepcopy(GOOD)
    del answer["meta_info"]["weight_versions"]  # type: ignore[attr-defined]
    assert read_generation(answer).spans == ()


@pytest.mark.parametrize(
    "change",
    [
        {"finish_reason": {"type": "error"}},
        {"finish_reason": None},
        {"weight_version": None},
        {"weight_version": "c"},
        {"output_token_logprobs": None},
        {"output_token_logprobs": [[-1.0, 5, None], [-2.0, 6, None]]},
        {"output_token_logprobs": [[-1.0, 5, None], [-2.0, 9, None], [0, 7, None]]},
        {"output_token_logprobs": [[-1.0, 5, None], [None, 6, None], [0, 7, None]]},
        {"output_token_logprobs": [[-1.0, 5, None], [float("-inf"), 6, None], [0, 7, None]]},
        {"weight_versions": [{"version": "a", "start": 0, "end": 1}, {"version": "b", "start": 2, "end": 3}]},
        {"weight_versions": [{"version": "b", "start": 0, "end": 2}]},
    ],
)
def test_parts_that_do_not_belong_together(change: dict[str, Any]) -> None:
    answer = {**GOOD, "meta_info": {**GOOD["meta_info"], **change}}  # type: ignore[dict-item]
    with pytest.raises((AttributeError, IndexError, KeyError, TypeError, ValueError)):
        read_generation(answer)


@pytest.mark.parametrize("token", [-1, 1 << 31, 7.0])
def test_an_id_that_no_token_has(token: Any) -> None:
    answer = copy.deepcopy(GOOD)
    answer["output_ids"][2] = answer["meta_info"]["output_token_logprobs"][2][1] = token  # type: ignore[index]
    with pytest.raises(ValueError, match="not all token ids"):
        read_generation(answer)

"""Whom the server lets in, what it reads, and that nothing makes it fail."""

from __future__ import annotations

import json
import os
import socket
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grok_local.errors import OptionError
from grok_local.runtime.jobs.openai import CHAT, TEXT, fields_of
from grok_local.serve.guard import Guard, names_of
from grok_local.serve.listening import key_for
from tests.serve.conftest import Running, Start

KEYS = {"message", "type", "param", "code"}


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "localhost.evil.example", "", "127.0.0.1.x"])
def test_a_name_that_was_bound_anew(server: Running, host: str) -> None:
    with server.http() as http:
        answer = http.get("/v1/models", headers={"host": host})
    assert answer.status_code == 403
    assert set(answer.json()["error"]) == KEYS


@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1", "[::1]:8080", "LOCALHOST"])
def test_names_of_this_machine(server: Running, host: str) -> None:
    with server.http() as http:
        assert http.get("/v1/models", headers={"host": host}).status_code == 200


def test_pages_of_other_origins(server: Running) -> None:
    own = server.url
    with server.http() as http:
        for origin in ("http://evil.example", "null", "https://localhost", own.replace("127.0.0.1", "localhost")):
            for method in ("OPTIONS", "GET", "POST"):
                answer = http.request(method, "/v1/models", headers={"origin": origin})
                assert answer.status_code == 403
                assert not [name for name in answer.headers if name.startswith("access-control")]
        assert http.get("/v1/models", headers={"origin": own}).status_code == 200
        assert http.get("/v1/models", headers={"sec-fetch-site": "cross-site"}).status_code == 403


def test_headers_that_protect(server: Running) -> None:
    with server.http() as http:
        for answer in (http.get("/v1/models"), http.get("/nothing"), http.get("/", headers={"host": "x"})):
            assert "default-src 'self'" in answer.headers["content-security-policy"]
            assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
            assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_key(start: Start) -> None:
    with start(key="secret") as server, server.http() as http:
        assert http.get("/v1/models").status_code == 401
        assert http.get("/v1/models", headers={"x-api-key": "Secret"}).status_code == 401
        assert http.get("/v1/models", headers={"x-api-key": "secret"}).status_code == 200
        assert http.get("/health").status_code == 200
        with pytest.raises(openai.AuthenticationError, match="wrong API key"):
            server.openai(api_key="secre").models.list()
        assert server.openai(api_key="secret").models.list().data[0].id == "tiny"


def test_elsewhere_there_is_always_a_key() -> None:
    assert key_for("127.0.0.1", None) == key_for("localhost", None) == (None, False)
    key, is_new = key_for("0.0.0.0", None)  # noqa: S104
    assert is_new
    assert key != key_for("0.0.0.0", None)[0]  # noqa: S104
    assert len(key or "") > 20
    assert key_for("0.0.0.0", "mine") == ("mine", False)  # noqa: S104
    with pytest.raises(OptionError):
        key_for("127.0.0.1", " ")


def test_elsewhere_any_address_is_a_name() -> None:
    async def app(*_: Any) -> None: ...

    guard = Guard(app, host="0.0.0.0", key="k")  # noqa: S104
    names = ("192.168.1.2", socket.gethostname().lower(), "evil.example")
    assert [guard.is_known(name) for name in names] == [True, True, False]


def test_a_machine_in_its_network_has_names(start: Start) -> None:
    with start(names=names_of(["GPUbox."]), key="k") as server, server.http() as http:
        key = {"x-api-key": "k"}
        for host in ("gpubox:8080", "GPUbox", "localhost"):
            assert http.get("/v1/models", headers={"host": host, **key}).status_code == 200
        refused = http.get("/v1/models", headers={"host": "evil.example", **key})
        assert (refused.status_code, "--name" in refused.json()["error"]["message"]) == (403, True)


def test_a_proxy_s_pages_may_ask_and_no_others(start: Start) -> None:
    with start(names=names_of(["grok.example.com"])) as server, server.http() as http:
        own = "https://grok.example.com"
        for host in ("localhost", "grok.example.com"):
            for origin in (own, f"{own}:8443", "http://GROK.example.com"):
                assert http.get("/v1/models", headers={"host": host, "origin": origin}).status_code == 200
        for origin in ("https://evil.example", "https://grok.example.com.evil.example", "file://grok.example.com"):
            assert http.get("/v1/models", headers={"host": "grok.example.com", "origin": origin}).status_code == 403
        rebound = {"host": "evil.example", "origin": "http://evil.example"}
        assert http.get("/v1/models", headers=rebound).status_code == 403


@pytest.mark.parametrize("name", ["", "http://gpubox", "gpubox:8080", "a b", "*", "gpubox/", "-x"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(OptionError, match="--name"):
        names_of([name])


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("PUT", "/v1/models", 405),
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models/a/b:c", 405),
        ("GET", "/v1/models/", 404),
        ("GET", "/v1/models/%00", 404),
        ("GET", "/v1/models/%20", 404),
    ],
)
def test_what_is_not_there(server: Running, method: str, path: str, status: int) -> None:
    with server.http() as http:
        answer = http.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == KEYS


@pytest.mark.parametrize(
    "path", ["/", "/health", "/metrics", "/v1/models", "/v1/models/tiny", "/tokenizer_info", "/local/machine", "/none"]
)
def test_head_says_what_get_would(server: Running, path: str) -> None:
    with server.http() as http:
        told, asked = http.get(path), http.head(path)
        assert http.head("/v1/completions").status_code == 405
    assert (asked.status_code, asked.content) == (told.status_code, b"")
    assert asked.headers["content-type"] == told.headers["content-type"]


@pytest.mark.parametrize(
    ("data", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b'{"prompt": NaN}', "application/json", 400),
        (b'{"prompt": "x", "temperature": 1e999}', "application/json", 400),
        (b'{"prompt": "\\ud800"}', "application/json", 400),
        (b'{"prompt": "\xff"}', "application/json", 400),
        (b'{"prompt": "\xed\xa0\x80", "echo": true}', "application/json", 400),
        (b'{"prompt": "x", "model": "\xed\xa0\xbd"}', "application/json", 400),
        ('{"prompt": "\\ud83d"}'.encode("utf-16"), "application/json", 400),
        (b"[" * 100000, "application/json", 400),
        (b'{"prompt": ' + b"[" * 80 + b"]" * 80 + b"}", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"prompt=x", "application/x-www-form-urlencoded", 415),
        (b" " * (17 << 20), "application/json", 413),
    ],
)
def test_bodies_that_are_none(server: Running, data: bytes, kind: str, status: int) -> None:
    with server.http() as http:
        answer = http.post("/v1/completions", content=data, headers={"content-type": kind})
    assert answer.status_code == status
    assert set(answer.json()["error"]) == KEYS


def test_a_body_of_no_known_length_is_cut_off(server: Running) -> None:
    with server.http() as http:
        answer = http.post(
            "/v1/completions",
            content=(b" " * (1 << 20) for _ in range(18)),
            headers={"content-type": "application/json"},
        )
    assert answer.status_code == 413


def test_long_headers(server: Running) -> None:
    with server.http() as http:
        assert http.get("/v1/models", headers={"x": "y" * 100_000}).status_code == 431


def test_prompts_are_not_in_the_log(start: Start) -> None:
    for wanted in (False, True):
        with start(logs_prompts=wanted) as server, server.http() as http:
            http.post("/v1/completions", json={"prompt": "a secret", "max_tokens": 2})
            assert ("a secret" in "".join(server.log)) == wanted
            assert "2 tokens in" in "".join(server.log)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
@settings(
    max_examples=int(os.environ.get("GROK_LOCAL_FUZZ_EXAMPLES", "60")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_body_makes_it_fail(server: Running, data: st.DataObject) -> None:
    url = data.draw(st.sampled_from([TEXT, CHAT, "/tokenize", "/detokenize"]))
    known = [*fields_of(url if url in (TEXT, CHAT) else TEXT, served=True), "content", "tokens"]
    body = data.draw(st.dictionaries(st.sampled_from(known), VALUES, max_size=5))
    if data.draw(st.booleans()):
        body = {"prompt": [5, 6], "messages": [{"role": "user", "content": "x"}], **body}
        del body["messages" if url == TEXT else "prompt"]
    body.setdefault("max_tokens", 2) if url in (TEXT, CHAT) and "max_completion_tokens" not in body else None
    with server.http() as http:
        answer = http.post(url, content=json.dumps(body), headers={"content-type": "application/json"})
        assert answer.status_code in (200, 400), answer.text
        if answer.status_code == 400:
            assert set(answer.json()["error"]) == KEYS
        assert http.get("/health").status_code == 200

"""Bodies that do not come whole, or not as they should, and what of one may stand there and mean nothing."""

from __future__ import annotations

import gzip
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.serve.conftest import Running, Start


@pytest.mark.parametrize(
    ("path", "kind", "begun"),
    [
        ("/v1/completions", "application/json", b'{"prompt"'),
        ("/v1/messages", "application/json", b"{"),
        (
            "/v1/files",
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n{',
        ),
    ],
)
def test_a_client_that_leaves_amid_its_body_is_no_error(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture, path: str, kind: str, begun: bytes
) -> None:
    with start(home=tmp_path) as server:
        _send_and_leave(server, path, kind, begun)
        end = time.monotonic() + 20
        while (path, 499) not in server.service.requests:
            assert time.monotonic() < end
            time.sleep(0.01)
    assert server.log == []
    assert not caplog.records


def _send_and_leave(server: Running, path: str, kind: str, begun: bytes) -> None:
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port)) as sock:
        head = f"POST {path} HTTP/1.1\r\nhost: {address.netloc}\r\ncontent-type: {kind}\r\ncontent-length: 1000\r\n\r\n"
        sock.sendall(head.encode() + begun)
        time.sleep(0.1)


def test_a_name_that_stands_twice_is_refused(trained_server: Running) -> None:
    headers = {"content-type": "application/json"}
    form = {"content-type": "multipart/form-data; boundary=x"}
    part = '--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    with trained_server.http() as http:
        answers = [
            http.post("/v1/completions", content=b'{"prompt": "a", "prompt": "b"}', headers=headers),
            http.post("/v1/chat/completions", content=b'{"messages": [{"role": "a", "role": "b"}]}', headers=headers),
            http.post("/v1/files", content=f"{part}{part}--x--\r\n", headers=form),
            http.get("/v1/files?limit=1&limit=2"),
        ]
    assert [answer.status_code for answer in answers] == [400] * 4
    assert all("stands twice" in answer.json()["error"]["message"] for answer in answers)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages", "/tokenize", "/v1/files"])
def test_a_compressed_body_is_refused_as_that(trained_server: Running, path: str) -> None:
    kind = "multipart/form-data; boundary=x" if path == "/v1/files" else "application/json"
    headers = {"content-type": kind, "content-encoding": "gzip"}
    with trained_server.http() as http:
        answer = http.post(path, content=gzip.compress(b'{"prompt": "x"}'), headers=headers)
        plain = http.post("/tokenize", json={"prompt": "x"}, headers={"content-encoding": "identity"})
    assert (answer.status_code, plain.status_code) == (415, 200)
    assert answer.json()["error"]["message"] == "content-encoding 'gzip': send it uncompressed"


def test_what_asks_for_nothing_may_stand_there(server: Running) -> None:
    messages = [{"role": "user", "content": "x", "tool_calls": []}]
    empty: dict[str, Any] = {"tools": [], "logit_bias": {}}
    of_a_stream = {"stream": True, "stream_options": {"include_obfuscation": False}}
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"prompt": "x", **empty, "suffix": ""}),
        ("/v1/completions", {"prompt": "x", **of_a_stream}),
        ("/v1/chat/completions", {"messages": messages, **empty, "tool_choice": "none"}),
        ("/v1/messages", {"messages": messages, "system": [], **empty, "tool_choice": {"type": "none"}}),
        ("/v1/messages", {"messages": messages, "system": "", "mcp_servers": []}),
        ("/v1/messages/count_tokens", {"messages": messages, "system": "", "tools": []}),
        ("/tokenize", {"prompt": "x", "tools": []}),
    ]
    with server.http() as http:
        for path, body in bodies:
            limit = {"max_tokens": 1} if path not in ("/tokenize", "/v1/messages/count_tokens") else {}
            answer = http.post(path, json={**body, **limit})
            assert (answer.status_code, "warnings" in answer.text) == (200, False), answer.text

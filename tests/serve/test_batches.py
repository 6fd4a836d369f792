"""Files and batches as the official client sees them: what is kept, what comes of it, and what is in between."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from grok_local.serve.jobs.batch_record import BatchRecord
from grok_local.serve.jobs.file_store import FileStore
from samples.grammars import AMBIGUOUS
from tests.serve.conftest import Running, Start, started

TEXT: Any = "/v1/completions"


@pytest.fixture(scope="module")
def kept(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with started(packed, home=tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture(scope="module")
def client(kept: Running) -> openai.OpenAI:
    return kept.openai(max_retries=0)


def line(number: int, **body: Any) -> dict[str, Any]:
    given = {"prompt": f"line {number}", "max_tokens": 3, "temperature": 0, **body}
    return {"custom_id": f"line-{number}", "method": "POST", "url": TEXT, "body": given}


def uploaded(client: openai.OpenAI, *lines: Any) -> str:
    text = "".join(one if isinstance(one, str) else json.dumps(one) + "\n" for one in lines)
    return client.files.create(file=("lines.jsonl", io.BytesIO(text.encode())), purpose="batch").id


def submitted(client: openai.OpenAI, *lines: Any, **more: Any) -> str:
    file = uploaded(client, *lines)
    return client.batches.create(input_file_id=file, endpoint=TEXT, completion_window="24h", **more).id


def until(found: Callable[[], bool], *, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end
        time.sleep(0.01)


def ended(client: openai.OpenAI, id: str) -> Any:
    until(lambda: client.batches.retrieve(id).status in ("completed", "failed", "cancelled"))
    return client.batches.retrieve(id)


def lines_of(client: openai.OpenAI, id: str | None) -> dict[str, Any]:
    values = [json.loads(text) for text in client.files.content(id).text.splitlines()] if id else []
    assert len({value["custom_id"] for value in values}) == len(values)
    return {value["custom_id"]: value for value in values}


def test_a_file_is_kept_as_it_came(client: openai.OpenAI) -> None:
    lines = [json.dumps(line(number)) + "\n" for number in range(3)]
    file = client.files.create(file=("ä.jsonl", io.BytesIO("".join(lines).encode())), purpose="batch")
    assert (file.object, file.filename, file.purpose, file.bytes) == ("file", "ä.jsonl", "batch", len("".join(lines)))
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).text == "".join(lines)
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)


def test_files_come_in_pages(client: openai.OpenAI) -> None:
    ids = [uploaded(client, line(number)) for number in range(5)]
    listed = [file.id for file in client.files.list(limit=2, purpose="batch")]
    assert set(ids) <= set(listed)
    assert len(set(listed)) == len(listed)
    assert [file.id for file in client.files.list(order="asc")] == listed[::-1]
    assert client.files.list(purpose="batch_output", limit=1).object == "list"  # type: ignore[attr-defined]


def test_a_batch_says_what_its_lines_say_alone(kept: Running, client: openai.OpenAI) -> None:
    wrong = line(9, max_tokens="many")
    id_ = submitted(client, *[line(number) for number in range(9)], wrong, metadata={"who": "me"})
    batch = ended(client, id_)
    assert (batch.object, batch.status, batch.endpoint, batch.metadata) == ("batch", "completed", TEXT, {"who": "me"})
    assert batch.request_counts.to_dict() == {"total": 10, "completed": 9, "failed": 1}
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    results, errors = lines_of(client, batch.output_file_id), lines_of(client, batch.error_file_id)
    assert set(results) == {f"line-{number}" for number in range(9)}
    for number in range(9):
        alone = client.completions.create(model="tiny", **line(number)["body"])
        response = results[f"line-{number}"]["response"]
        assert response["status_code"] == 200
        assert response["body"]["choices"][0]["text"] == alone.choices[0].text
    assert errors["line-9"]["response"]["status_code"] == 400
    assert "max_tokens" in errors["line-9"]["response"]["body"]["error"]["message"]
    assert client.files.retrieve(batch.output_file_id).purpose == "batch_output"
    assert next(iter(client.batches.list(limit=1))).id == id_
    assert not [path for path in kept.service.batches.folder.iterdir() if path.suffix != ".json"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("lines", "code", "number", "param"),
    [
        (["{broken\n"], "invalid_line", 1, None),
        ([line(0), line(0)], "invalid_line", 1, None),
        (["\n", {**line(0), "url": "/v1/chat/completions"}], "invalid_line", 2, "url"),
        ([{**line(0), "method": "GET"}], "invalid_line", 1, "method"),
        ([{**line(0), "body": 5}], "invalid_line", 1, "body"),
        ([{"prompt": "x"}], "invalid_line", 1, "custom_id"),
        ([{**line(0), "bdy": 5}], "invalid_line", 1, None),
        ([line(0), {**line(1), "custom_id": "\ud83d"}], "invalid_line", 2, None),
        ([line(0, model="\ud83d")], "invalid_line", 1, None),
        ([line(0, prompt="\udc00 x", echo=True)], "invalid_line", 1, None),
        (["\n"], "empty_file", None, None),
    ],
)
def test_a_broken_file(
    client: openai.OpenAI, lines: list[Any], code: str, number: int | None, param: str | None
) -> None:
    batch = ended(client, submitted(client, *lines))
    assert batch.status == "failed"
    assert batch.failed_at
    first = batch.errors.data[0]
    assert (first.code, first.line, first.param) == (code, number, param)
    assert first.message


def test_a_file_that_is_no_text(client: openai.OpenAI) -> None:
    file = client.files.create(file=("x", io.BytesIO(b"\xff\xfe\x00")), purpose="batch").id
    batch = client.batches.create(input_file_id=file, endpoint=TEXT, completion_window="24h")
    assert batch.status == "validating"
    assert ended(client, batch.id).errors.data[0].code == "invalid_file"


def test_what_is_refused(kept: Running, client: openai.OpenAI) -> None:
    file = uploaded(client, line(0))
    good = {"input_file_id": file, "endpoint": TEXT, "completion_window": "24h"}
    changes: list[tuple[dict[str, Any], int, str]] = [
        ({"input_file_id": "file-none"}, 404, "there is none"),
        ({"input_file_id": "../../etc/passwd"}, 404, "there is none"),
        ({"input_file_id": None}, 400, "input_file_id"),
        ({"endpoint": "/v1/embeddings"}, 400, "/v1/chat/completions or /v1/completions"),
        ({"completion_window": "1h"}, 400, "24h"),
        ({"metadata": {"a": 1}}, 400, "metadata"),
        ({"endpiont": 1}, 400, "did you mean 'endpoint'"),
    ]
    with kept.http() as http:
        unknown = http.post("/v1/batches", json={**good, "input_file_id": "file-none"}).json()["error"]
        assert (unknown["param"], unknown["code"]) == ("input_file_id", "not_found")
        for change, status, said in changes:
            answer = http.post("/v1/batches", json={**good, **change})
            assert (answer.status_code, said in answer.json()["error"]["message"]) == (status, True), answer.text
        for path in ("/v1/files/..%2f..%2fetc", "/v1/batches/none", "/v1/files/none/content"):
            assert http.get(path).status_code == 404
        assert http.get("/v1/files?limit=0").status_code == 400
        assert http.get("/v1/batches?after=none").status_code == 400
        assert http.get("/v1/batches?page=2").status_code == 400
        assert http.post("/v1/files", data={"purpose": "batch"}).status_code == 415
        for files, data, said in (
            ({"file": b"{}"}, {"purpose": "fine-tune"}, "purpose"),
            ({"fil": b"{}"}, {"purpose": "batch"}, "did you mean 'file'"),
            ({"x": b""}, {}, "not supported"),
        ):
            answer = http.post("/v1/files", files=files, data=data)
            assert (answer.status_code, said in answer.json()["error"]["message"]) == (400, True), answer.text
        headers = {"content-type": "multipart/form-data; boundary=x"}
        for body in (b"", b"--x", b"--x\r\n\r\n", b"nonsense"):
            assert http.post("/v1/files", content=body, headers=headers).status_code == 400
        assert http.post("/v1/files", content=b"", headers={"content-type": "multipart/form-data"}).status_code == 400
        large = iter(
            [b'--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n', *[b"x" * (1 << 20)] * 66]
        )
        assert http.post("/v1/files", content=large, headers=headers).status_code == 413


def test_a_line_whose_grammar_becomes_too_large_fails_alone(client: openai.OpenAI) -> None:
    batch = ended(client, submitted(client, line(0), line(1, grammar=AMBIGUOUS, max_tokens=60), line(2)))
    assert batch.request_counts.to_dict() == {"total": 3, "completed": 2, "failed": 1}
    response = lines_of(client, batch.error_file_id)["line-1"]["response"]
    assert response["status_code"] == 400
    assert "too large" in response["body"]["error"]["message"]


def test_who_asks_goes_before_a_batch_and_it_goes_on(start: Start, tmp_path: Path) -> None:
    with start(seconds=0.02, home=tmp_path) as server:
        client = server.openai()
        id_ = submitted(client, *[line(number, max_tokens=60) for number in range(8)])
        until(lambda: server.service.loop.running == 4)
        answer = client.completions.create(model="tiny", prompt="now", max_tokens=3)
        assert answer.usage
        batch = client.batches.retrieve(id_)
        assert (batch.status, batch.request_counts and batch.request_counts.completed) == ("in_progress", 0)
        assert ended(client, id_).request_counts.completed == 8


def test_a_cancelled_batch_keeps_what_is_done(start: Start, tmp_path: Path) -> None:
    with start(seconds=0.02, home=tmp_path) as server:
        client = server.openai()
        id_ = submitted(
            client, *[line(number, max_tokens=2 if number < 2 else 150, ignore=None) for number in range(12)]
        )
        waiting = submitted(client, line(0))
        with pytest.raises(openai.ConflictError):
            client.files.delete(client.batches.retrieve(waiting).input_file_id)
        until(lambda: client.batches.retrieve(id_).request_counts.completed >= 2)  # type: ignore[union-attr]
        assert client.batches.cancel(waiting).status == "cancelled"
        assert client.batches.cancel(id_).status in ("cancelling", "cancelled")
        batch = ended(client, id_)
        assert (batch.status, bool(batch.cancelling_at), bool(batch.cancelled_at)) == ("cancelled", True, True)
        results, errors = lines_of(client, batch.output_file_id), lines_of(client, batch.error_file_id)
        assert len(results) == batch.request_counts.completed >= 2
        assert set(results) | set(errors) == {f"line-{number}" for number in range(12)}
        assert not set(results) & set(errors)
        assert {error["error"]["code"] for error in errors.values()} == {"batch_cancelled"}
        until(lambda: not server.service.loop.running)
        with pytest.raises(openai.ConflictError):
            client.batches.cancel(id_)
        assert client.files.delete(batch.input_file_id).deleted


def test_another_server_goes_on_and_every_line_is_there_once(start: Start, tmp_path: Path) -> None:
    with start(seconds=0.02, home=tmp_path) as server:
        client = server.openai()
        id_ = submitted(client, *[line(number, max_tokens=2 + 4 * number) for number in range(16)])
        until(lambda: client.batches.retrieve(id_).request_counts.completed >= 3)  # type: ignore[union-attr]
    with start(home=tmp_path) as server:
        client = server.openai()
        batch = ended(client, id_)
        assert batch.request_counts.to_dict() == {"total": 16, "completed": 16, "failed": 0}
        assert len(lines_of(client, batch.output_file_id)) == 16
        assert batch.error_file_id is None


def test_a_batch_waits_for_the_model_that_began_it(start: Start, packed: Path, tmp_path: Path) -> None:
    with start(seconds=0.05, home=tmp_path) as server:
        client = server.openai()
        id_ = submitted(client, *[line(number, max_tokens=50) for number in range(8)])
        until(lambda: bool(server.service.loop.running))
    with start(home=tmp_path, loading={"context": 512}) as other:
        client = other.openai()
        until(lambda: bool(client.batches.retrieve(id_).to_dict()["note"]))
        assert "context was 256, is 512" in str(client.batches.retrieve(id_).to_dict()["note"])
        assert ended(client, submitted(client, line(0))).status == "completed"
    with start(home=tmp_path) as server:
        assert ended(server.openai(), id_).request_counts.completed == 8


def test_one_server_at_a_time(start: Start, tmp_path: Path) -> None:
    with start(home=tmp_path) as first, start(home=tmp_path) as second:
        assert first.openai().batches.list().data == []
        with pytest.raises(openai.InternalServerError, match="another grok-local serve"):
            second.openai().batches.list()
        assert second.openai().completions.create(model="tiny", prompt="x", max_tokens=2).choices


def test_a_batch_survives_an_engine_that_fails_once(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grok_local.errors import ModelError

    with start(home=tmp_path) as server:
        step, broken = type(server.engine).step, threading.Event()

        def fail(*arguments: Any) -> Any:
            if not broken.is_set():
                broken.set()
                raise ModelError("broken")
            return step(server.engine, *arguments)

        server.engine.step = fail  # type: ignore[method-assign, assignment]
        client = server.openai()
        id_ = submitted(client, *[line(number) for number in range(6)])
        until(lambda: "broken" in str(client.batches.retrieve(id_).to_dict()["note"]))
        assert ended(client, submitted(client, line(7))).status == "completed"  # and the first is tried again
        assert ended(client, id_).request_counts.completed == 6


def test_half_a_character_of_a_batch_from_before_does_not_keep_it_from_ending(start: Start, tmp_path: Path) -> None:
    files = FileStore(tmp_path / "files")
    text = json.dumps({**line(0), "custom_id": "\ud83d"}) + "\n"
    file = files.write("file-" + "0" * 32, lambda out: out.write(text.encode()), "x", "batch")
    (tmp_path / "batches").mkdir()
    record = BatchRecord("batch_1", TEXT, file.id, None, "24h", 1, total=1, made_with={})
    record.turn("cancelling")
    record.save(tmp_path / "batches")
    with start(home=tmp_path) as server:
        batch = ended(server.openai(), "batch_1")
        assert batch.status == "cancelled"
        (error,) = lines_of(server.openai(), batch.error_file_id).values()
        assert (error["custom_id"], error["error"]["code"]) == ("\ud83d", "batch_cancelled")


def test_a_file_s_name_in_any_encoding(kept: Running) -> None:
    headers = {"content-type": "multipart/form-data; charset=unicode_escape; boundary=x"}
    form = (
        b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="\\\\ud83d"\r\n\r\n{}\r\n--x--\r\n'
    )
    with kept.http() as http:
        answer = http.post("/v1/files", content=form, headers=headers)
        assert answer.status_code == 200, answer.text
        assert http.get("/v1/files").status_code == 200


@pytest.mark.parametrize("damaged", [b"\xff", b"\n"])
def test_results_wait_for_lines_that_cannot_be_read(start: Start, tmp_path: Path, damaged: bytes) -> None:
    with start(seconds=0.02, home=tmp_path) as server:
        client = server.openai()
        id_ = submitted(client, *[line(number, max_tokens=2 + 4 * number) for number in range(12)])
        until(lambda: client.batches.retrieve(id_).request_counts.completed >= 3)  # type: ignore[union-attr]
        file = client.batches.retrieve(id_).input_file_id
    path = tmp_path / "files" / f"{file}.jsonl"
    whole, results = path.read_bytes(), tmp_path / "batches" / f"{id_}.results"
    path.write_bytes(damaged)
    done = results.read_bytes()
    with start(home=tmp_path) as server:
        client = server.openai()
        until(lambda: "it could not go on" in str(client.batches.retrieve(id_).to_dict()["note"]))
        assert client.batches.retrieve(id_).status == "in_progress"
    assert results.read_bytes() == done
    assert not list(results.parent.glob("*.replaced"))
    path.write_bytes(whole)
    with start(home=tmp_path) as server:
        client = server.openai()
        batch = ended(client, id_)
        assert batch.request_counts.to_dict() == {"total": 12, "completed": 12, "failed": 0}
        assert len(lines_of(client, batch.output_file_id)) == 12


def test_cancelling_waits_for_lines_that_cannot_be_read_and_says_so(start: Start, tmp_path: Path) -> None:
    with start(seconds=0.05, home=tmp_path) as server:
        client = server.openai()
        first = submitted(client, *[line(number, max_tokens=200) for number in range(8)])
        id_ = submitted(client, line(0))
        until(lambda: client.batches.retrieve(id_).status == "in_progress")
        path = tmp_path / "files" / f"{client.batches.retrieve(id_).input_file_id}.jsonl"
        whole = path.read_bytes()
        path.write_bytes(b"\xff")
        batch = client.batches.cancel(id_)
        assert (batch.status, "cannot be read" in str(batch.to_dict()["note"])) == ("cancelling", True)
        path.write_bytes(whole)
        client.batches.cancel(first)
        assert ended(client, id_).status == "cancelled"


def test_a_file_that_cannot_be_read_at_a_start_is_not_deleted(start: Start, tmp_path: Path) -> None:
    with start(home=tmp_path) as server:
        file = uploaded(server.openai(), line(0))
    about = tmp_path / "files" / f"{file}.json"
    aside = about.rename(tmp_path / "aside")
    about.symlink_to(about)  # whoever reads it gets an OSError
    with start(home=tmp_path) as server:
        assert file not in [one.id for one in server.openai().files.list()]
    about.unlink()
    aside.rename(about)
    with start(home=tmp_path) as server:
        assert server.openai().files.content(file).text


def test_a_batch_that_has_ended_can_be_deleted(kept: Running, client: openai.OpenAI) -> None:
    id_ = submitted(client, line(0))
    batch = ended(client, id_)
    with kept.http() as http:
        assert http.delete(f"/v1/batches/{id_}").json() == {"id": id_, "object": "batch", "deleted": True}
        assert http.delete(f"/v1/batches/{id_}").status_code == 404
        assert http.get(f"/v1/batches/{id_}").status_code == 404
    assert not list(kept.service.batches.folder.glob(f"{id_}*"))  # type: ignore[union-attr]
    for file in (batch.input_file_id, batch.output_file_id):
        assert client.files.delete(file).deleted


def test_a_batch_under_way_cannot_be_deleted(start: Start, tmp_path: Path) -> None:
    with start(seconds=0.05, home=tmp_path) as server, server.http() as http:
        client = server.openai()
        id_ = submitted(client, line(0, max_tokens=200))
        answer = http.delete(f"/v1/batches/{id_}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "batch_open")
        client.batches.cancel(id_)
        ended(client, id_)

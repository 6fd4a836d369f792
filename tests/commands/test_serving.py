"""`serve` as a program: what it says, how it ends, and what it needs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import grok_local
from tests.workers import Worker


@contextmanager
def serving(model: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """The process, its address, and the lines it has said."""
    command = [
        sys.executable,
        "-m",
        "grok_local",
        "serve",
        "-m",
        str(model),
        "--port",
        "0",
        "--context",
        "256",
        *options,
    ]
    env = {**os.environ, "COLUMNS": "300", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stderr
        said: list[str] = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"serving .* at (http://\S+), 2 answers together", line):
                break
        else:
            raise AssertionError(said)
        rest = threading.Thread(target=lambda: said.extend(process.stderr or ()))
        rest.start()
        try:
            yield process, found[1], said
        finally:
            process.kill()
            process.wait()
            rest.join()


def post(url: str, body: Any, **headers: str) -> tuple[int, Any]:
    answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=30)
    return answer.status_code, answer.json()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_ends_it_and_what_is_under_way(packed: Path, number: signal.Signals, code: int) -> None:
    with serving(packed, "--parallel", "2", "--routing-map") as (process, url, said):
        assert post(url, {"prompt": "What", "max_tokens": 2})[0] == 200
        routing = httpx.get(f"{url}/local/routing").json()
        assert {sum(layer) % 2 for layer in routing["counts"]} == {0}
        assert sum(routing["counts"][0]) > 0
        machine = httpx.get(f"{url}/local/machine").json()
        assert machine["parallel"] == 2
        assert machine["plan"]["verdict"]
        answers: list[tuple[int, Any]] = []
        body = {"prompt": "What", "regex": "[a-z ]*", "n": 100, "max_tokens": 240}
        asking = threading.Thread(target=lambda: answers.append(post(url, body)))
        asking.start()
        while not _running(url):
            pass
        process.send_signal(number)
        assert process.wait(10) == code
        asking.join()
        assert (answers[0][0], answers[0][1]["error"]["code"]) in [(503, "server_stopping"), (200, "server_stopping")]
    assert "Traceback" not in "".join(said)


def test_a_lost_worker_is_told_and_ends_it(packed: Path) -> None:
    with Worker() as worker:
        options = ("--parallel", "2", "--worker", worker.endpoint, "--gpu-layers", "99")
        with serving(packed, *options) as (process, url, said):
            assert post(url, {"prompt": "What", "max_tokens": 2})[0] == 200
            worker.end()
            status, body = post(url, {"prompt": "What else", "max_tokens": 2})
            assert (status, worker.endpoint in body["error"]["message"]) == (503, True)
            assert process.wait(20) == 1
    (line,) = (line for line in said if line.startswith("error: "))
    assert worker.endpoint in line
    assert "Traceback" not in "".join(said)


def test_a_process_that_is_lost_while_it_is_idle_ends_it(packed: Path) -> None:
    with Worker() as worker:
        options = ("--parallel", "2", "--worker", worker.endpoint, "--gpu-layers", "99")
        with serving(packed, *options) as (process, _, said):
            (child,) = psutil.Process(process.pid).children()
            child.kill()
            assert process.wait(20) == 1
    assert "SIGKILL" in said[-1]


def test_elsewhere_it_makes_a_key(packed: Path) -> None:
    with serving(packed, "--parallel", "2", "--host", "0.0.0.0") as (_, url, said):  # noqa: S104
        here = url.replace("0.0.0.0", "127.0.0.1")  # noqa: S104
        assert post(here, {"prompt": "x"})[0] == 401
        while not (found := re.search(r"API key: (\S+)", "".join(said))):
            pass
        status, _ = post(here, {"prompt": "x"}, authorization=f"Bearer {found[1]}")
        assert status == 200


def test_without_fastapi_a_line_says_how_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "fastapi.py").write_text("raise ImportError")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "grok_local", "serve"]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path, "COLUMNS": "300"}
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: serve needs FastAPI and uvicorn: ")
    assert "pip install" in ended.stderr


def test_reproducible_results_do_not_depend_on_who_else_asks(packed: Path) -> None:
    texts = [f"Line {n}: {'what it says, ' * n}and so on" for n in range(6)]
    with serving(packed, "--parallel", "2", "--reproducible") as (_, url, _):
        alone = [_scores(url, text) for text in texts]
        with ThreadPoolExecutor(len(texts)) as together:
            assert list(together.map(lambda text: _scores(url, text), texts)) == alone
    with grok_local.load(packed, context=256, reproducible=True) as model:
        for found, score in zip(alone, model.score(texts), strict=True):
            # To the last place: the server sums what a softmax divides by with two more numbers beside it.
            assert found[1:] == pytest.approx(score.logprobs[1:], rel=1e-13)


def _scores(url: str, text: str) -> list[float]:
    status, body = post(url, {"prompt": text, "max_tokens": 0, "echo": True, "logprobs": 1})
    assert status == 200
    scores: list[float] = body["choices"][0]["logprobs"]["token_logprobs"]
    return scores


def _running(url: str) -> bool:
    return "grok_local_running 2\n" in httpx.get(f"{url}/metrics").text


def test_a_batch_survives_a_kill_and_every_line_is_there_once(packed: Path) -> None:
    count = 24
    lines = [
        {
            "custom_id": str(n),
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": f"line {n}", "max_tokens": 40, "regex": "[a-z ]{150,}"},
        }
        for n in range(count)
    ]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    with serving(packed, "--parallel", "2") as (process, url, _):
        file = httpx.post(f"{url}/v1/files", files={"file": data}, data={"purpose": "batch"}).json()["id"]
        body = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
        batch = httpx.post(f"{url}/v1/batches", json=body).json()["id"]
        for least in (1, 2):
            while _batch(url, batch)["request_counts"]["completed"] < least:
                pass
        process.kill()
    with serving(packed, "--parallel", "2") as (process, url, _):
        while _batch(url, batch)["request_counts"]["completed"] < 6:
            pass
        process.kill()
    with serving(packed, "--parallel", "2") as (_, url, _):
        while (found := _batch(url, batch))["status"] != "completed":
            pass
        results = httpx.get(f"{url}/v1/files/{found['output_file_id']}/content").text.splitlines()
    assert found["request_counts"] == {"total": count, "completed": count, "failed": 0}
    assert sorted(int(json.loads(line)["custom_id"]) for line in results) == list(range(count))


def _batch(url: str, id: str) -> Any:
    return httpx.get(f"{url}/v1/batches/{id}").json()

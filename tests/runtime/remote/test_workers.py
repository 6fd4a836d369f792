"""Workers and what becomes of us when they, or the process that talks to them, die. Real processes on the loopback."""

from __future__ import annotations

import functools
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import grok_local
from grok_local.errors import ContextError, GGUFError, ModelError, OptionError, WorkerError, WorkerLost
from grok_local.placement.load_options import LoadRequest
from grok_local.placement.wishes import Wishes
from grok_local.runtime.engine.llama import LlamaEngine
from grok_local.runtime.engine.sampling import Sampling
from grok_local.runtime.graph.rows import Draw, Row
from grok_local.runtime.remote.client import RemoteEngine
from grok_local.runtime.remote.probing import PROTOCOL, parse_endpoint, probe_worker, probe_workers
from grok_local.runtime.remote.server import serve_worker
from grok_local.runtime.text.structure import structure_of
from samples.grammars import AMBIGUOUS
from tests.workers import Worker, free_port, wait_until

GREETING = struct.pack("<QBBBx24x", 28, *PROTOCOL, 0)


def is_gone(pid: int) -> bool:
    # What nobody reaps is not ours: the parent is dead, and init may be a shell.
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    """To be left alive."""
    with Worker() as running:
        yield running


@pytest.fixture
def mortal() -> Iterator[Worker]:
    with Worker() as running:
        yield running


@contextmanager
def engine(packed: Path, *workers: Worker, **options: Any) -> Iterator[RemoteEngine]:
    """With the whole model on the workers, if there are any."""
    wishes = Wishes(context=512, gpu_layers=99 if workers else 0)
    endpoints = tuple(worker.endpoint for worker in workers)
    engine = RemoteEngine(LoadRequest(packed, wishes, 1, endpoints), **options)
    try:
        yield engine
    finally:
        engine.close()
        assert not psutil.pid_exists(engine.pid)  # reaped: no zombie


def compute(engine: RemoteEngine, seconds: float = 20) -> None:
    """Until something happens."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not engine.interrupted:
        engine.evaluate([5] * 500)
        engine.evaluate([6])


@contextmanager
def after(seconds: float, act: Callable[[], object]) -> Iterator[None]:
    timer = threading.Timer(seconds, act)
    timer.start()
    yield
    timer.join()


@contextmanager
def relay(endpoint: str, *, limit: int, then: Callable[[], object]) -> Iterator[str]:
    """Passes everything on until `limit` bytes went to the worker; then calls `then`, and nobody gets in any more."""
    listening = socket.create_server(("127.0.0.1", 0))
    left = limit

    def pump(source: socket.socket, sink: socket.socket, *, counted: bool) -> None:
        nonlocal left
        with suppress(OSError):
            while left > 0 and (data := source.recv(1 << 16)):
                left -= len(data) * counted
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def serve() -> None:
        while left > 0:
            client, _ = listening.accept()
            with client, socket.create_connection(parse_endpoint(endpoint)) as upstream:
                back = threading.Thread(target=pump, args=(upstream, client), kwargs={"counted": False})
                back.start()
                pump(client, upstream, counted=True)
                if left <= 0:
                    listening.close()
                    then()
                back.join()

    thread = threading.Thread(target=serve)
    thread.start()
    yield f"127.0.0.1:{listening.getsockname()[1]}"
    thread.join()


# -- asking workers ----------------------------------------------------------------------------------------------------


def test_devices_are_numbered_over_all_workers(worker: Worker, mortal: Worker) -> None:
    devices = probe_workers([mortal.endpoint, worker.endpoint])
    assert [(device.name, device.endpoint) for device in devices] == [
        ("RPC0", mortal.endpoint),
        ("RPC1", worker.endpoint),
    ]
    for device in devices:
        assert device.kind == "worker"
        assert 0 < device.free <= device.total == psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [("a:1", ("a", 1)), ("10.0.0.2", ("10.0.0.2", 50052)), ("some-box.local:65535", ("some-box.local", 65535))],
)
def test_endpoints(endpoint: str, expected: tuple[str, int]) -> None:
    assert parse_endpoint(endpoint) == expected


@pytest.mark.parametrize(
    "endpoint", ["", ":", ":1", "a:", "a:0", "a:65536", "a:b", "a b:1", "a:1\n", "a:١", "http://a:1", "ä:1", "a\0:1"]
)
def test_what_is_no_endpoint(endpoint: str) -> None:
    with pytest.raises(OptionError, match="HOST:PORT"):
        probe_workers([endpoint])


def test_workers_given_wrongly(worker: Worker) -> None:
    with pytest.raises(OptionError, match="IPv6"):
        parse_endpoint("[::1]:50052")
    with pytest.raises(OptionError, match="twice"):
        probe_workers([worker.endpoint, worker.endpoint])
    with pytest.raises(OptionError, match="twice"):
        probe_workers([worker.endpoint, worker.endpoint.replace("127.0.0.1", "localhost")])


def test_every_unusable_worker_has_its_line(worker: Worker, packed: Path) -> None:
    refusing, unknown = f"127.0.0.1:{free_port()}", "nowhere.invalid"
    with pytest.raises(WorkerError) as caught:
        RemoteEngine(LoadRequest(packed, Wishes(), 1, (refusing, worker.endpoint, unknown, "a..b")))
    first, second, third = caught.value.problems
    assert f"worker {refusing} refuses the connection" in first
    assert f"worker {unknown} is not known" in second
    assert "worker a..b is not known" in third


@contextmanager
def server(answers: bytes, *, hangs_up: bool = True) -> Iterator[str]:
    """Accepts one client, says `answers` to it, and hangs up or keeps silent."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            peer, _ = listening.accept()
            with peer:
                peer.settimeout(5)
                try:
                    peer.sendall(answers)
                    if hangs_up:
                        peer.shutdown(socket.SHUT_WR)
                    while peer.recv(4096):
                        pass
                except OSError:
                    pass  # the client had enough

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        thread.join()


@pytest.mark.parametrize(
    ("answers", "hangs_up", "words"),
    [
        (b"", False, "busy with another client"),
        (b"", True, "hangs up"),
        (GREETING, True, "hangs up"),
        (struct.pack("<QBBBx24x", 28, 8, 0, 0), True, r"version 8\.0 .* this machine 7\.0"),
        (struct.pack("<QBBBx24x", 28, 7, 1, 0), True, r"version 7\.1 .* this machine 7\.0"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", False, "nonsense"),
        (struct.pack("<Q", 1 << 60), False, "nonsense"),
        (GREETING + struct.pack("<QI", 4, 0), False, "0 devices"),
        (GREETING + struct.pack("<QI", 4, 1 << 31), False, "nonsense"),
        (GREETING + struct.pack("<QIQQQ", 4, 1, 16, 1, 1 << 63), False, "nonsense"),
    ],
)
def test_what_is_no_worker(answers: bytes, hangs_up: bool, words: str) -> None:
    with server(answers, hangs_up=hangs_up) as endpoint, pytest.raises(WorkerError, match=words) as caught:
        probe_worker(endpoint, timeout=0.3)
    assert endpoint in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=40, deadline=None)
@given(st.booleans(), st.binary(max_size=200) | st.binary(max_size=60).map(lambda rest: GREETING + rest))
def test_whatever_a_server_says(hangs_up: bool, answers: bytes) -> None:
    started = time.monotonic()
    with server(answers, hangs_up=hangs_up) as endpoint, pytest.raises(WorkerError):
        probe_worker(endpoint, timeout=0.1)
    assert time.monotonic() - started < 2


def test_a_worker_serves_one_client_at_a_time(worker: Worker) -> None:
    with socket.create_connection(parse_endpoint(worker.endpoint)), pytest.raises(WorkerError, match="busy"):
        probe_worker(worker.endpoint, timeout=0.2)


# -- being a worker ----------------------------------------------------------------------------------------------------


def test_a_worker_says_what_it_serves_and_leaves_at_once() -> None:
    code, output, errors = Worker().end(signal.SIGINT)
    assert (code, output) == (130, "")
    assert "CPU: " in errors
    assert "note: this protocol has no authentication and no encryption" in errors
    code, output, errors = Worker(host="0.0.0.0").end(signal.SIGTERM)  # noqa: S104  # that is what it warns of
    assert (code, output) == (0, "")
    assert "WARNING: this protocol has no authentication and no encryption" in errors


def test_where_no_worker_can_listen(worker: Worker) -> None:
    for listen, words in ((worker.endpoint, "in use"), ("192.0.2.7:50052", "assign"), ("nowhere.invalid", "listen at")):
        with pytest.raises(WorkerError, match=words):
            serve_worker(listen)
    for options in ({"listen": "x:y"}, {"threads": 0}):
        with pytest.raises(OptionError):
            serve_worker(**options)


# -- an engine in another process --------------------------------------------------------------------------------------


def test_it_has_all_that_an_engine_has(packed: Path) -> None:
    wishes = Wishes(context=64)
    local, far = LlamaEngine(LoadRequest(packed, wishes, 1)), RemoteEngine(LoadRequest(packed, wishes, 1))
    assert [name for name in dir(local) if not name.startswith("_") and not hasattr(far, name)] == []
    for name in ("bos", "context_size", "threads", "vocabulary"):
        assert getattr(far, name) == getattr(local, name)
    assert far.metadata.keys() == local.metadata.keys()
    assert far.headers[0].tensors == local.headers[0].tensors
    local.close()
    far.close()


def test_a_model_on_a_worker_computes_the_same(packed: Path, worker: Worker) -> None:
    local = LlamaEngine(LoadRequest(packed, Wishes(context=512, gpu_layers=0), 1))
    ids = local.tokenize("Some words that are none, to begin with")
    expected = local.logits(ids)
    local.close()
    with engine(packed, worker) as far:
        assert {held.place for held in far.placement.held if held.weights > 1_000_000} == {"RPC0"}
        assert far.tokenize("Some words that are none, to begin with") == ids
        np.testing.assert_allclose(far.logits(ids), expected, atol=1e-3)


def test_text_from_a_worker(packed: Path, worker: Worker) -> None:
    options: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 1, "seed": 1, "repeat_penalty": 1.3}]
    texts = []
    for workers in ([], [worker.endpoint]):
        with grok_local.load(packed, context=512, threads=1, workers=workers) as model:
            texts.append(["".join(model.generate("Once", max_tokens=20, **chosen)) for chosen in options])
    assert texts[0] == texts[1]


def test_a_conversation_on_a_worker(packed: Path, mortal: Worker) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    with grok_local.load(packed, context=512, threads=1, workers=[mortal.endpoint]) as model:
        reply = model.chat(messages, temperature=1, seed=1)
        next(reply)
        model.interrupt()
        list(reply)
        assert reply.finish_reason == "interrupted"
        reply = model.chat([*messages, {"role": "assistant", "content": reply.text}, *messages], temperature=0)
        next(reply)
        assert reply.stats.cached_tokens > 0
        mortal.end()
        with pytest.raises(WorkerLost, match=mortal.endpoint):
            list(reply)


def test_the_vocabulary_is_asked_while_the_child_is_busy(packed: Path) -> None:
    local = LlamaEngine(LoadRequest(packed, Wishes(context=64), 1))
    with engine(packed) as far:
        os.kill(far.pid, signal.SIGSTOP)
        busy = threading.Thread(target=far.evaluate, args=([5, 6],))
        busy.start()
        for text in ("", "Some words", " \n\u00e4\U0001f600" * 2000):
            ids = local.tokenize(text)
            assert far.tokenize(text) == ids
            assert far.continue_ids(text) == local.continue_ids(text)
            assert far.detokenize(ids) == local.detokenize(ids)
        assert far.control_names() == local.control_names()
        assert [far.special_text(name) for name in ("bos", "eos")] == [
            local.special_text(name) for name in ("bos", "eos")
        ]
        for token in range(0, local.vocabulary, 7):
            assert (far.piece(token), far.is_end(token)) == (local.piece(token), local.is_end(token))
        assert busy.is_alive()
        os.kill(far.pid, signal.SIGCONT)
        busy.join()
        assert far.failure is None
    local.close()


def test_errors_come_over_as_they_are(packed: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "x.gguf"
    damaged.write_bytes(packed.read_bytes()[:-100_000])
    with pytest.raises(GGUFError, match="truncated"):
        RemoteEngine(LoadRequest(damaged, Wishes(), 1))
    with pytest.raises(ModelError, match="TypeError"):
        RemoteEngine(LoadRequest(packed, Wishes(), threads="one"))  # type: ignore[arg-type]
    with engine(packed) as far:
        with pytest.raises(OptionError, match="99999") as caught:
            far.detokenize([99_999])
        assert caught.value.problems == (str(caught.value),)
        with pytest.raises(ContextError, match="empty"):
            far.evaluate([])
        assert far.evaluate([5, 6]) == 2
        assert far.cached[0] == [5, 6]
    with pytest.raises(ModelError, match="closed"):
        far.tokenize("x")


def test_a_draw_comes_over_with_what_its_grammar_died_of(packed: Path) -> None:
    with engine(packed) as far:
        form = structure_of({"grammar": AMBIGUOUS})
        assert form
        chain = far.begin_sampling(Sampling(), [], form.grammar)
        found = far.step([Row(5, 0, 0, True)], [Draw(0, chain)])
        assert found
        assert isinstance(found[0].error, OptionError)
        assert far.cached[0] == [5]


def test_an_interrupt_ends_the_call_and_not_the_engine(packed: Path) -> None:
    with engine(packed) as far:
        started = time.monotonic()
        with after(0.3, far.interrupt):
            compute(far)
        assert time.monotonic() - started < 2
        far.interrupted = False
        assert far.evaluate([5, 6, 7]) > 0


def ask(engine: RemoteEngine, seconds: float = 20) -> None:
    """Much is said, little computed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert engine.cached


@pytest.mark.parametrize("work", [compute, ask])
def test_ctrl_c_leaves_the_engine_usable(packed: Path, work: Callable[[RemoteEngine], None]) -> None:
    with engine(packed) as far:
        far.evaluate([5])
        for _ in range(20 if work is ask else 3):
            with after(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)), pytest.raises(KeyboardInterrupt):
                work(far)
            assert far.tokenize("x") == far.tokenize("x")
            assert far.evaluate([5, 6, 7]) > 0
            assert far.cached[0] == [5, 6, 7]


# -- deaths ------------------------------------------------------------------------------------------------------------


def test_a_worker_dies_in_the_middle(packed: Path, mortal: Worker, worker: Worker) -> None:
    with engine(packed, mortal, worker) as far:
        started = time.monotonic()
        with after(0.3, mortal.end), pytest.raises(WorkerLost) as caught:
            compute(far)
        assert time.monotonic() - started < 4
        (problem,) = caught.value.problems
        assert f"worker {mortal.endpoint} refuses the connection" in problem
        assert far.failure is caught.value
        with pytest.raises(ModelError, match="closed"):
            far.evaluate([5])
    probe_worker(worker.endpoint)  # lives, and is free


def test_a_worker_dies_while_it_is_idle(packed: Path, mortal: Worker) -> None:
    with engine(packed, mortal) as far:
        mortal.end()
        with pytest.raises(WorkerLost, match=mortal.endpoint):
            far.evaluate([5])


def test_a_worker_dies_while_it_is_loaded(packed: Path, mortal: Worker) -> None:
    with relay(mortal.endpoint, limit=500_000, then=mortal.end) as endpoint:
        before, started = psutil.Process().children(), time.monotonic()
        with pytest.raises(WorkerLost, match=endpoint):
            RemoteEngine(LoadRequest(packed, Wishes(context=512, gpu_layers=99), 1, (endpoint,)))
        assert time.monotonic() - started < 5
    assert set(psutil.Process().children()) < set(before)  # no child, and the worker is gone


def test_a_silent_worker_and_an_interrupt(packed: Path, mortal: Worker) -> None:
    with engine(packed, mortal, grace=2.0) as far:
        mortal.process.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        with after(0.1, far.interrupt), pytest.raises(WorkerLost, match=f"{mortal.endpoint} says nothing"):
            far.evaluate([5])
        assert 2 < time.monotonic() - started < 4


def test_the_child_dies(packed: Path, worker: Worker) -> None:
    deaths = (((worker,), signal.SIGSEGV, WorkerLost), ((), signal.SIGKILL, ModelError))
    for workers, number, error in deaths:
        with engine(packed, *workers) as far:
            kill = functools.partial(os.kill, far.pid, number)
            with after(0.2, kill), pytest.raises(error, match=number.name):
                compute(far)


def test_a_child_that_dies_while_nobody_asks_it_is_missed(packed: Path) -> None:
    with engine(packed) as far:
        assert far.failure is None
        os.kill(far.pid, signal.SIGKILL)
        wait_until(lambda: far.failure is not None)
        assert signal.SIGKILL.name in str(far.failure)


def test_a_file_that_changes_ends_both_kinds_of_engine(packed: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(packed.read_bytes())
    request = LoadRequest(path, Wishes(context=64), 1)
    local, far = LlamaEngine(request), RemoteEngine(request)
    os.utime(path, (1, 1))
    for one in (local, far):
        with pytest.raises(ModelError, match="changed"):
            one.evaluate([5])
        assert "changed" in str(one.failure)
        one.close()


def test_llama_cpps_own_words_come_over(packed: Path, tmp_path: Path) -> None:
    """Damage that only llama.cpp's assertions notice: no expert is used."""
    key = b"grok.expert_used_count\x04\x00\x00\x00"
    damaged = tmp_path / "x.gguf"
    damaged.write_bytes(packed.read_bytes().replace(key + b"\x02", key + b"\x00"))
    with pytest.raises(ModelError, match=r"gave up \(\S+\.cpp:\d+: "):
        RemoteEngine(LoadRequest(damaged, Wishes(), 1))


def test_the_child_ends_with_its_parent(packed: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"  # as users write them: nothing keeps it from being imported
    script.write_text(
        "import sys, pathlib\n"
        "from grok_local.placement.load_options import load_request\n"
        "from grok_local.runtime.remote.client import RemoteEngine\n"
        "engine = RemoteEngine(load_request(pathlib.Path(sys.argv[1]), {}))\n"
        "print(engine.pid, flush=True)\n"
        "while True:\n"
        "    engine.evaluate([5] * 500)\n"
        "    engine.evaluate([6])\n"
    )
    parent = subprocess.Popen([sys.executable, script, packed], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    child = int(parent.stdout.readline())
    time.sleep(0.2)
    assert not is_gone(child)
    parent.kill()
    parent.communicate()
    wait_until(lambda: is_gone(child), seconds=5)

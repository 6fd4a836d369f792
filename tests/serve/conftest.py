from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import grok_local
from grok_local.library.built_in import CHECKPOINT
from grok_local.library.names import model_request
from grok_local.runtime.jobs.batch_lines import Author
from grok_local.runtime.text.model import Model
from grok_local.serve.app import make_app
from grok_local.serve.engine_loop import EngineLoop
from grok_local.serve.figures import Figures
from grok_local.serve.jobs.batch_queue import Means, kept_batches
from grok_local.serve.listening import Server, bound
from grok_local.serve.service import Service
from samples.slow_engine import SlowEngine

PLACES = 4


@dataclass
class Running:
    """A server on a free port of this machine, in a thread."""

    url: str
    service: Service
    engine: SlowEngine
    log: list[str] = field(default_factory=list)
    clients: list[openai.OpenAI] = field(default_factory=list)

    def openai(self, **options: Any) -> openai.OpenAI:
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=options.pop("api_key", "none"), **options)
        self.clients.append(client)
        return client

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)


Start = Callable[..., "contextlib.AbstractContextManager[Running]"]


@contextlib.contextmanager
def started(
    path: Path | str,
    *,
    seconds: float = 0.0,
    queue: int = 64,
    key: str | None = None,
    home: Path | None = None,
    names: Collection[str] = (),
    **options: Any,
) -> Any:
    loading: Any = {"context": 256, "parallel": PLACES, "threads": 1, **options.pop("loading", {})}
    request = model_request(path, loading)
    engine = SlowEngine(request, seconds=seconds)
    figures = Figures(per_token=1.0, per_prompt_token=0.1)
    log: list[str] = []
    with (
        Model(request, engine) as model,
        bound("127.0.0.1", 0) as sock,
        EngineLoop(model, places=PLACES, most_waiting=queue, figures=figures) as loop,
        contextlib.ExitStack() as stack,
    ):
        service = Service(model, "tiny", loop, "fp_test", lambda: {"verdict": "it fits"}, log.append, **options)
        if home:
            made_with = {"model": str(path), "context": model.context_size}
            means = Means(loop, service.tasks, Author("tiny", "fp_test"), made_with, model.context_size, log.append)
            service.batches = stack.enter_context(kept_batches(home, means))
        app = make_app(service, host="127.0.0.1", key=key, names=names)
        ready = threading.Event()
        server = Server(app, ready=ready.set, leaving=lambda: None, is_lost=lambda: loop.failure is not None)
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        try:
            assert ready.wait(20)
            yield (running := Running(f"http://127.0.0.1:{sock.getsockname()[1]}", service, engine, log))
        finally:
            for client in running.clients:
                client.close()
            loop.stop()
            server.should_exit = True
            thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(packed: Path) -> Iterator[Running]:
    """A server of a model without sense, which computes fast. Shared by a module's tests."""
    with started(packed) as running:
        yield running


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model, which was trained: its numbers hardly depend on what is computed beside them."""
    return grok_local.quantize_checkpoint(CHECKPOINT, tmp_path_factory.mktemp("trained") / "tiny.gguf").path


@pytest.fixture(scope="module")
def trained_server(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of it, with batches. Shared by a module's tests."""
    with started(trained, home=tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture
def start(packed: Path) -> Start:
    """Starts a server of its own: `with start(seconds=0.1) as server`."""
    return lambda **options: started(packed, **options)

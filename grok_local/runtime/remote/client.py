"""An engine in a process of its own, which may use workers on other machines.

llama.cpp's RPC backend aborts the process when a worker, or the way to it, fails. Here that is the end of a child, and
an error for us.
"""

from __future__ import annotations

import functools
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from grok_local.errors import GrokLocalError, ModelError, WorkerLost
from grok_local.formats.gguf_file import Header
from grok_local.machine.facts import Say
from grok_local.placement.load_options import LoadRequest
from grok_local.runtime.engine.interrupts import ctrl_c_later
from grok_local.runtime.engine.llama import LlamaEngine
from grok_local.runtime.engine.protocol import Placement
from grok_local.runtime.engine.sampling import Sampling
from grok_local.runtime.engine.tokens import BareVocabulary, Tokens
from grok_local.runtime.remote.child import INTERRUPT, LOAD
from grok_local.runtime.remote.probing import complaints, probe_workers

__all__ = ["RemoteEngine"]

P = ParamSpec("P")
R = TypeVar("R")

GRACE = 20.0  # seconds that an interrupted call has to return: a worker computes its whole batch first
_PATIENCE = 30.0  # seconds of silence, after which the user is told
_LOOK = 50  # milliseconds after which a waiting call looks whether it is interrupted
_ENDING = 3.0  # seconds
_ONE_KERNEL = {"GGML_CPU_TILED_MM": "0"}  # of those that depend on how many rows there are
_DYING = 0.1  # seconds in which a dead process may still accept connections


def _forwarded(method: Callable[Concatenate[LlamaEngine, P], R]) -> Callable[Concatenate[RemoteEngine, P], R]:
    """The engine's method, executed in the child."""

    @functools.wraps(method)
    def call(self: RemoteEngine, /, *arguments: P.args, **options: P.kwargs) -> R:
        result: R = self._call(method.__name__, *arguments, **options)
        return result

    return call


def _at_home(method: Callable[Concatenate[Tokens, P], R]) -> Callable[Concatenate[RemoteEngine, P], R]:
    """The vocabulary's method, executed here: who prepares a prompt does not wait for the child's step."""

    @functools.wraps(method)
    def call(self: RemoteEngine, /, *arguments: P.args, **options: P.kwargs) -> R:
        return method(self._open_tokens(), *arguments, **options)

    return call


class RemoteEngine:
    """An `Engine` in a child process. The request's workers are asked what they have before it starts.

    The constructor raises as LlamaEngine's does, and WorkerError for workers that cannot be used. Every method may
    raise WorkerLost, or without workers ModelError, when the child has died; then the engine is closed. Not
    thread-safe but for `interrupt`, and what is asked of the vocabulary, which this process has too.
    """

    batch_size: int
    bos: int
    context_size: int
    headers: list[Header]
    placement: Placement
    threads: int
    vocabulary: int

    def __init__(self, request: LoadRequest, *, say: Say | None = None, grace: float = GRACE) -> None:
        devices = probe_workers(request.workers)
        self._workers = tuple(dict.fromkeys(device.endpoint for device in devices))
        self._say, self._grace = say, grace
        self._failure: GrokLocalError | None = None
        self._tokens: BareVocabulary | None = None
        self._ended: list[int] = []
        self._calling = threading.RLock()
        self.interrupted = False
        # "idle"; "talking" while bytes go over the connection; "waiting" for an answer. Ctrl-C leaves it waiting; what
        # another handler raises leaves it as it is, and the next call finds it there.
        self._state = "idle"
        self._process, self._connection = _start(reproducible=request.reproducible)
        self._answered = select.poll()
        self._answered.register(self._connection, select.POLLIN)
        self._stop = weakref.finalize(self, _stop, self._process, self._connection)
        self._stop.atexit = False  # the child ends with this process anyway
        try:
            self.__dict__.update(self._call(LOAD, request, devices))
            self._tokens = BareVocabulary(request.path, context_size=self.context_size)
        except BaseException:
            self.close()
            raise

    tokenize = _at_home(Tokens.tokenize)
    continue_ids = _at_home(Tokens.continue_ids)
    detokenize = _at_home(Tokens.detokenize)
    piece = _at_home(Tokens.piece)
    special_text = _at_home(Tokens.special_text)
    control_names = _at_home(Tokens.control_names)
    is_end = _at_home(Tokens.is_end)
    evaluate = _forwarded(LlamaEngine.evaluate)
    extend = _forwarded(LlamaEngine.extend)
    logits = _forwarded(LlamaEngine.logits)
    tail_logits = _forwarded(LlamaEngine.tail_logits)
    score = _forwarded(LlamaEngine.score)
    evaluate_together = _forwarded(LlamaEngine.evaluate_together)
    expert_stats = _forwarded(LlamaEngine.expert_stats)
    routing_counts = _forwarded(LlamaEngine.routing_counts)
    save = _forwarded(LlamaEngine.save)
    restore = _forwarded(LlamaEngine.restore)
    step = _forwarded(LlamaEngine.step)
    copy = _forwarded(LlamaEngine.copy)
    forget = _forwarded(LlamaEngine.forget)

    def begin_sampling(self, options: Sampling, recent: Sequence[int], grammar: str | None = None) -> int:
        """A way to choose tokens, for draws; `recent` are the last tokens so far, `grammar` says what may come."""
        while self._ended:
            self._call("end_sampling", self._ended.pop())
        chain: int = self._call("begin_sampling", options, recent, grammar)
        return chain

    def end_sampling(self, chain: int) -> None:
        """It is not needed any more. The child is told later: this may be called in the middle of another call."""
        self._ended.append(chain)

    @property
    def pid(self) -> int:
        """The child's."""
        return self._process.pid

    @property
    def failure(self) -> GrokLocalError | None:
        """What the child died of, though nobody closed the engine, or why it cannot compute any more."""
        with self._calling:
            if self._stop.alive and self._process.poll() is not None:
                self._lost()
            return self._failure

    @property
    def metadata(self) -> dict[str, Any]:
        """The GGUF's metadata."""
        return self.headers[0].metadata

    @property
    def cached(self) -> list[list[int]]:
        """The tokens in the KV cache, of each sequence."""
        ids: list[list[int]] = self._call("cached")
        return ids

    def interrupt(self) -> None:
        """End the evaluation that is under way; from a signal handler or another thread.

        Where it has not ended after twenty seconds the child is killed, and the call raises WorkerLost.
        """
        self.interrupted = True  # whoever waits for the child tells it

    def close(self) -> None:
        """End the child; the engine is unusable afterwards. Takes seconds at most; safe to call twice."""
        self._stop()
        self._tokens = None  # whoever is using it has it until then

    def _open_tokens(self) -> Tokens:
        if (found := self._tokens) is None:
            raise ModelError("the model is closed")
        return found

    def _call(self, name: str, /, *arguments: Any, **options: Any) -> Any:
        with self._calling:
            return self._answer_to(name, *arguments, **options)

    def _answer_to(self, name: str, /, *arguments: Any, **options: Any) -> Any:
        if not self._stop.alive:
            raise ModelError("the model is closed")
        if self._state == "waiting":
            self._receive(interrupted=True)  # what the call before, broken off, still answers
        elif self._state == "talking":
            self.close()
            self._failure = ModelError("an interrupt cut off the talk with the model's process: load the model again")
            raise self._failure
        self._send((name, arguments, options, self.interrupted))
        kind, value = self._receive()
        if kind == "failure":
            self._failure = value
        if kind in ("error", "failure"):
            raise value
        return value

    def _send(self, request: tuple[Any, ...]) -> None:
        with ctrl_c_later(self):
            self._state = "talking"
            with suppress(ConnectionError):  # it has ended: its last words may be there to be read
                self._connection.send(request)
            self._state = "waiting"

    def _receive(self, *, interrupted: bool = False) -> tuple[str, Any]:
        self._wait(interrupted=interrupted)
        with ctrl_c_later(self):
            self._state = "talking"
            try:
                kind, value = self._connection.recv()
            except (EOFError, OSError):
                raise self._lost() from None
            if kind == "aborted":
                raise self._lost(f"llama.cpp gave up ({value})")
            self._state = "idle"
        return kind, value

    def _wait(self, *, interrupted: bool) -> None:
        deadline = None
        patience = time.monotonic() + _PATIENCE
        try:
            while not self._answered.poll(_LOOK):
                if self._say and time.monotonic() > patience:
                    self._say(f"no answer for {_PATIENCE:g} s: {self._suspects()}; Ctrl-C gives up")
                    patience += 10 * _PATIENCE
                if interrupted or self.interrupted:
                    deadline = deadline or time.monotonic() + self._grace
                    if time.monotonic() > deadline:
                        raise self._lost(f"no answer within {self._grace:g} s of an interrupt")
                    self._process.send_signal(INTERRUPT)
        except KeyboardInterrupt:
            self._process.send_signal(INTERRUPT)  # nobody wants the answer any more
            raise

    def _suspects(self) -> str:
        names = ", ".join(self._workers)
        return (
            f"the weights are on their way, or a worker is slow or hangs ({names})" if names else "it is slow, or hangs"
        )

    def _lost(self, reason: str = "") -> WorkerLost | ModelError:
        """Close the engine; the error that says what its end was."""
        self.close()
        time.sleep(_DYING)
        end = f"the model is lost ({reason or _cause(self._process.returncode)})"
        problems = [f"{end}: {line}" for line in complaints(self._workers)]
        self._failure = found = WorkerLost(problems or end) if self._workers else ModelError(end)
        return found


def _start(*, reproducible: bool) -> tuple[subprocess.Popen[bytes], Connection]:
    """The child, and the connection to it. In a session of its own, where no Ctrl-C reaches it."""
    ours, theirs = Pipe()
    with theirs:
        command = [sys.executable, "-m", "grok_local.runtime.remote.child", str(theirs.fileno()), str(os.getpid())]
        process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=_environment() | (_ONE_KERNEL if reproducible else {}),
            start_new_session=True,
        )
    return process, ours


def _environment() -> dict[str, str]:
    # It imports what we import, and not what lies in the current folder by chance.
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "GGML_NO_BACKTRACE": "1"}


def _stop(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    process.terminate()
    try:
        process.wait(_ENDING)
    except subprocess.TimeoutExpired:
        process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_ENDING)


def _cause(code: int | None) -> str:
    if code is None or code >= 0:
        return f"its process ended with code {code}"
    name = signal.Signals(-code).name
    return f"its process ended by {name}" + (", for want of memory perhaps" if -code == signal.SIGKILL else "")

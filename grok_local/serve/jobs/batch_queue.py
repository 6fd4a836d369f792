"""Batches, one after another, in a thread of their own and on places that nobody who waits needs.

A batch is kept with every status that it comes to, and its results line by line in a ledger, so that whatever ends the
server costs what was under way and nothing else. Each results' file has a name that follows from the batch's: it is
written twice at most, and is there once.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grok_local.errors import GrokLocalError, OutputError, RefusedError
from grok_local.files import locked
from grok_local.runtime.jobs.batch_job import BatchProgress, prepared, run
from grok_local.runtime.jobs.batch_lines import Asked, id_of, read_batch
from grok_local.runtime.jobs.ledger import Ledger
from grok_local.serve.jobs.background import Background
from grok_local.serve.jobs.batch_record import BatchRecord, problem, problems_of
from grok_local.serve.jobs.file_store import FileStore
from grok_local.serve.jobs.outcome import forget, publish, results_path

if TYPE_CHECKING:
    from collections.abc import Callable

    from grok_local.runtime.jobs.batch_lines import Author
    from grok_local.runtime.text.batch import Tasks
    from grok_local.serve.engine_loop import EngineLoop

__all__ = ["BatchQueue", "Means", "kept_batches"]

_MOST_OPEN = 100
_PAUSE = 30.0  # seconds until a batch is tried again that could not go on


@dataclass(frozen=True)
class Means:
    """What batches are answered with. `made_with` is what results depend on beside their lines: a batch that was begun
    with something else waits for it. `size` is how many tokens prompt and answer may have together.
    """

    engine: EngineLoop
    tasks: Tasks
    author: Author
    made_with: dict[str, Any]
    size: int
    say: Callable[[str], None]


@contextmanager
def kept_batches(folder: Path, means: Means) -> Iterator[BatchQueue | None]:
    """The batches of a folder, while they are worked on; None where another server does. Raises OutputError."""
    with ExitStack() as stack:
        queue = _opened(folder, means, stack)
        if queue is None:
            means.say("note: another grok-local serve keeps files and batches; this one has none")
        else:
            queue.start()
            stack.callback(queue.stop)
        yield queue


def _opened(folder: Path, means: Means, stack: ExitStack) -> BatchQueue | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not stack.enter_context(locked(folder / "lock")):
            return None
        return BatchQueue(folder / "batches", FileStore(folder / "files"), means)
    except OSError as error:
        raise OutputError(f"{folder}: batches cannot be kept there ({error.strerror or error})") from None


@dataclass(eq=False)
class BatchQueue:
    """The batches in `folder`, of lines in `files`. Any thread may use it."""

    folder: Path
    files: FileStore
    means: Means
    _records: dict[str, BatchRecord] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock, self._ending, self._news = threading.RLock(), threading.Lock(), threading.Event()
        self._current: tuple[BatchRecord, Background] | None = None
        self._is_closing = False
        self._thread = threading.Thread(target=self._work, name="grok-local-batches", daemon=True)
        for path in sorted(self.folder.glob("batch_*.json")):
            if record := BatchRecord.read(path):
                self._records[record.id] = record
            else:
                self.means.say(f"note: {path}: a batch that cannot be read; it is left as it is")

    def start(self) -> None:
        """Go on with what is unfinished."""
        self._thread.start()

    def stop(self) -> None:
        """Leave the rest to the next start."""
        with self._lock:
            self._is_closing = True
            if self._current:
                self._current[1].cancel()
        self._news.set()
        self._thread.join()

    # -- what clients ask ----------------------------------------------------------------------------------------------

    def create(
        self, *, endpoint: str, input_file_id: str, completion_window: str, metadata: dict[str, str] | None
    ) -> BatchRecord:
        """Raises RefusedError where there is no such file, or too many batches wait already."""
        with self._lock:
            waiting = sum(record.is_open for record in self._records.values())
            if waiting >= _MOST_OPEN:
                raise RefusedError(429, f"{waiting} batches wait: cancel some", code="too_many_batches")
            self.files.get(input_file_id, param="input_file_id")
            name = f"batch_{uuid.uuid4().hex}"
            record = BatchRecord(name, endpoint, input_file_id, metadata, completion_window, int(time.time()))
            self._records[record.id] = record
            record.save(self.folder)
        return record

    def validate(self, record: BatchRecord) -> None:
        """Read its lines for the first time, and have them answered if they can be."""
        if record.status == "validating":
            self._checked_lines(record)
        self._news.set()

    def all(self) -> list[BatchRecord]:
        """The newest first."""
        with self._lock:
            return sorted(self._records.values(), key=lambda record: (-record.created_at, record.id))

    def get(self, id: str) -> BatchRecord:
        """Raises RefusedError where there is none of that id."""
        with self._lock:
            if id not in self._records:
                raise RefusedError(404, f"batch {id!r:.80}: there is none", code="not_found", param="id")
            return self._records[id]

    def cancel(self, id: str) -> BatchRecord:
        """End it with the step under way; what is done can be had. Raises RefusedError where it has ended."""
        with self._lock:
            record = self.get(id)
            if not record.is_open:
                raise RefusedError(409, f"batch {id}: it is {record.status} already", code="batch_ended")
            self._turn(record, "cancelling")
            is_current = self._current is not None and self._current[0] is record
            if self._current is not None and is_current:
                self._current[1].cancel()
        if not is_current:
            try:
                self._finish(record)
            except (GrokLocalError, OSError) as error:
                self._pause(record, str(error))
                self._news.set()
        return record

    def remove(self, id: str) -> None:
        """Forget one that has ended; its files stay. Raises RefusedError where there is none, or it has not ended."""
        with self._lock:
            record = self.get(id)
            if record.is_open:
                raise RefusedError(409, f"batch {id}: it is {record.status}: cancel it first", code="batch_open")
            del self._records[id]
            for path in self.folder.glob(f"{record.id}.*"):
                path.unlink(missing_ok=True)

    def remove_file(self, id: str) -> None:
        """Raises RefusedError where there is no such file, or a batch still needs it."""
        with self._lock:
            users = [record.id for record in self._records.values() if record.is_open and record.input_file_id == id]
            if users:
                raise RefusedError(409, f"file {id}: {users[0]} needs it: cancel that first", code="file_in_use")
            self.files.remove(id)

    # -- the thread of batches -----------------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._is_closing:
            self._news.clear()
            worked = [self._tried(record) for record in reversed(self.all()) if record.is_open]
            if not any(worked):
                self._news.wait(_PAUSE if worked else None)

    def _tried(self, record: BatchRecord) -> bool:
        """Go on with a batch. Says whether it came to an end; what cannot go on now is tried again later."""
        try:
            with self._working(record) as runner:
                self._go_on(record, runner)
        except GrokLocalError as error:
            self._pause(record, str(error))
        except Exception as error:
            self._pause(record, f"an error of grok-local's own: {error!r}")
        return not record.is_open

    @contextmanager
    def _working(self, record: BatchRecord) -> Iterator[Background]:
        """While a batch is the thread's, which is then the one to end it."""
        runner = Background(self.means.engine)
        with self._lock:
            self._current = record, runner
            if self._is_closing:
                runner.cancel()
        try:
            yield runner
        finally:
            with self._lock:
                self._current = None

    def _go_on(self, record: BatchRecord, runner: Background) -> None:
        record.note = self._misfit(record) if record.status == "in_progress" else None
        if record.note:
            return
        asked = self._checked_lines(record)
        if record.status == "in_progress":
            self._answer(record, asked, runner)
        is_done = record.completed + record.failed == record.total
        if record.is_open and (is_done or record.status == "cancelling"):
            self._finish(record)

    def _answer(self, record: BatchRecord, asked: list[Asked], runner: Background) -> None:
        """Have the lines answered that have no result yet. Raises what the model died of."""
        with self._ledger(record, asked) as ledger:
            done, failed = len(ledger.done), sum(ledger.done.values())

            def watch(progress: BatchProgress) -> None:
                record.failed = failed + progress.failed
                record.completed = done + progress.done - record.failed

            watch(BatchProgress(0, 0, 0, 0, 0))
            todo = (one for one in asked if one.id not in ledger.done)
            wanted = takewhile(lambda _: not runner.is_cancelled, todo)
            job = prepared(wanted, self.means.tasks, size=self.means.size)
            run(runner, job, self.means.author, write=ledger.write, watch=watch)

    def _ledger(self, record: BatchRecord, asked: list[Asked]) -> Ledger:
        lines: dict[str | int, str] = {one.id: one.digest for one in asked}
        return Ledger(results_path(self.folder, record), record.made_with or {}, lines, key=id_of)

    def _checked_lines(self, record: BatchRecord) -> list[Asked]:
        """Its lines; of what is validated for the first time, and is no batch, none. Raises OutputError where they are
        not those that were validated: without them its results would be nobody's.
        """
        if record.made_with is not None:
            return self._lines_again(record)
        try:
            asked = self._lines(record)
            problems = problems_of(asked, record.endpoint)
        except (ValueError, OSError, RefusedError) as error:
            asked, problems = [], [problem("invalid_file", f"it cannot be read: {error}")]
        with self._lock:
            if record.status == "validating":
                record.total, record.errors = len(asked), problems
                record.made_with = dict(self.means.made_with)
                self._turn(record, "failed" if problems else "in_progress")
        return asked if record.is_open else []

    def _lines_again(self, record: BatchRecord) -> list[Asked]:
        try:
            asked = self._lines(record)
        except (ValueError, OSError, RefusedError) as error:
            if record.status == "cancelling" and isinstance(error, RefusedError):
                record.note = f"its lines without a result are not listed: {error}"
                return []
            raise OutputError(f"{record.input_file_id}: its lines cannot be read: {error}") from None
        if len(asked) != record.total:
            raise OutputError(f"{record.input_file_id}: it has {len(asked)} lines, and had {record.total}")
        return asked

    def _lines(self, record: BatchRecord) -> list[Asked]:
        """Raises ValueError, OSError, RefusedError."""
        return read_batch(self.files.path(record.input_file_id).read_text("utf-8"), as_text=False)

    def _misfit(self, record: BatchRecord) -> str | None:
        """Why this server cannot go on with a batch that another one began."""
        now = self.means.made_with
        before = record.made_with or {}
        if different := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
            told = "; ".join(f"{name} was {before.get(name)!r:.60}, is {now.get(name)!r:.60}" for name in different)
            return f"it was begun otherwise ({told}): it goes on when a server is started that way"
        return None

    def _finish(self, record: BatchRecord) -> None:
        """Make files of its results."""
        with self._ending:
            if not record.is_open:
                return
            if record.status != "cancelling":
                self._turn(record, "finalizing")
            publish(record, self._checked_lines(record), self.files, folder=self.folder)
            self._turn(record, "cancelled" if record.status == "cancelling" else "completed")
            forget(record, folder=self.folder)
        told = f"{record.completed} of {record.total} lines, {record.failed} failed"
        self.means.say(f"{record.id}: {record.status}, {told}")

    def _turn(self, record: BatchRecord, status: str) -> None:
        with self._lock:
            record.turn(status)
            record.save(self.folder)

    def _pause(self, record: BatchRecord, reason: str) -> None:
        if not self._is_closing:
            record.note = f"it could not go on, and is tried again: {reason}"
            self.means.say(f"{record.id}: {record.note}")

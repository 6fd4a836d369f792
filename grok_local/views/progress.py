"""How far a job is, and what became of it: a bar, lines, or JSON events."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from grok_local.errors import OutputError
from grok_local.units import format_bytes, format_figure, format_seconds, printable

if TYPE_CHECKING:
    from grok_local.hub.fetch import FetchReport
    from grok_local.quantize.convert import QuantizeReport

__all__ = ["Show", "batch_view", "fetch_summary", "progress_view", "quantize_summary"]

_LINE_EVERY = 5.0  # seconds, where no bar can be drawn

_PHASES = {
    "check": "checking",
    "pack": "packing",
    "fetch": "fetching",
    "headers": "reading headers",
    "arrive": "fetching and packing",
}


class Event(Protocol):
    """What the views show of any job's progress."""

    @property
    def phase(self) -> str: ...
    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def label(self) -> str: ...
    @property
    def bytes_read(self) -> int: ...


Show = Callable[[Event], None]


class Progressed(Protocol):
    """How far a batch is: its lines, and the tokens of its answers."""

    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def generated(self) -> int: ...
    @property
    def rest(self) -> int: ...


@contextmanager
def progress_view(label: str, *, as_json: bool) -> Iterator[Show]:
    """A function that shows progress: a bar on a terminal, else a line now and then, or JSON events on stdout."""
    console = Console(stderr=True)
    if as_json:
        yield _json_events
    elif console.is_terminal:
        with _bar(console) as show:
            yield show
    else:
        yield _lines(label)


def _json_events(event: Event) -> None:
    try:
        print(json.dumps({"event": "progress", **asdict(event)}), flush=True)  # type: ignore[call-overload]
    except BrokenPipeError:
        raise
    except OSError as error:  # of stdout: the files that are being written are innocent
        raise OutputError(f"output: {error.strerror or error}") from None


@contextmanager
def _bar(console: Console) -> Iterator[Show]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[tensor]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        rate = _Rate()
        task = bar.add_task("", total=None, speed="", tensor="")

        def show(event: Event) -> None:
            bar.update(
                task,
                description=_PHASES[event.phase],
                total=event.total,
                completed=event.done,
                speed=rate.text(event),
                tensor=escape(printable(event.label)),
            )

        yield show


def _lines(label: str) -> Show:
    rate, last = _Rate(), [0.0]

    def show(event: Event) -> None:
        if time.monotonic() - last[0] >= _LINE_EVERY or event.done == event.total:
            last[0] = time.monotonic()
            percent = 100 * event.done / max(event.total, 1)
            with suppress(OSError):  # nobody may be listening: the work goes on
                print(
                    f"{label}: {percent:.0f}% {rate.text(event)} {printable(event.label)}", file=sys.stderr, flush=True
                )

    return show


class _Rate:
    """Bytes read or fetched per second, since the first event."""

    def __init__(self) -> None:
        self._start: tuple[float, int] | None = None

    def text(self, event: Event) -> str:
        now = time.monotonic()
        if self._start is None:
            self._start = (now, event.bytes_read)
        elapsed = now - self._start[0]
        return f"{format_bytes((event.bytes_read - self._start[1]) / elapsed)}/s" if elapsed > 0.5 else ""


@contextmanager
def batch_view() -> Iterator[Callable[[Progressed], None]]:
    """A function that shows how far a batch is: a bar on a terminal, else a line now and then, on stderr."""
    console, pace = Console(stderr=True), _Pace()
    if not console.is_terminal:
        yield _batch_lines(pace)
        return
    columns = (TextColumn("{task.fields[lines]}"), BarColumn(), TextColumn("{task.fields[pace]}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1, lines="", pace="")

        def show(now: Progressed) -> None:
            total = now.generated + now.rest
            bar.update(task, total=total, completed=now.generated, lines=_lines_done(now), pace=pace.text(now))

        yield show


def _batch_lines(pace: _Pace) -> Callable[[Progressed], None]:
    last, told = [time.monotonic()], list[str]()

    def show(now: Progressed) -> None:
        is_over = now.done == now.total
        if time.monotonic() - last[0] >= _LINE_EVERY or (is_over and told):  # the last line told is how it ended
            last[0] = time.monotonic()
            told[:] = [_lines_done(now), "" if is_over else pace.text(now)]
            with suppress(OSError):  # nobody may be listening: the work goes on
                print(", ".join(filter(None, told)), file=sys.stderr, flush=True)

    return show


def _lines_done(now: Progressed) -> str:
    failed = f", {now.failed} failed" if now.failed else ""
    return f"{now.done} of {now.total} lines{failed}"


class _Pace:
    """Tokens a second since the first one came, and how long the rest takes at that pace if every answer is long."""

    def __init__(self) -> None:
        self._start: tuple[float, int] | None = None

    def text(self, now: Progressed) -> str:
        moment = time.monotonic()
        if self._start is None or not now.generated:
            self._start = (moment, now.generated)
        seconds, tokens = moment - self._start[0], now.generated - self._start[1]
        if tokens <= 0 or seconds < 0.5:
            return "reading prompts" if not now.generated else ""
        speed = tokens / seconds
        return f"{format_figure(speed)} tok/s, at most {format_seconds(now.rest / speed)} left"


def quantize_summary(report: QuantizeReport) -> Iterator[str]:
    """What became of a checkpoint, in a few lines."""
    for line in (*report.fallbacks, *report.notes):
        yield f"note: {printable(line)}"
    if report.resumed_pieces:
        yield f"continued: {report.resumed_pieces} pieces were packed already"
    size = f"{report.tensors} tensors, {format_bytes(report.bytes)}"
    if report.unchanged:
        yield f"{printable(str(report.path))}: there already, packed from this checkpoint with these options ({size})"
    else:
        parts = f" in {len(report.paths)} parts" if len(report.paths) > 1 else ""
        yield f"{printable(str(report.path))}: {size}{parts}, {report.seconds:.1f} s"


def fetch_summary(report: FetchReport) -> Iterator[str]:
    """What is in the folder now, and what to do with it."""
    yield from (f"note: {note}" for note in report.notes)
    came = (
        f"{format_bytes(report.fetched)} fetched in {report.seconds:.0f} s"
        if report.fetched
        else "all there already, none changed since it was hashed"
    )
    files = f"{report.files} files, {format_bytes(report.bytes)}"
    yield f"{printable(str(report.folder))}: {files}, every hash right ({came})"

"""What people see: progress bars, tables. Everything here goes to the console it is given."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.markup import escape as escape_markup
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from grok_local.units import format_bytes, printable

if TYPE_CHECKING:
    from grok_local.formats.gguf_file import Header
    from grok_local.hub.fetch import FetchReport
    from grok_local.library.inventory import Entry
    from grok_local.quantize.convert import QuantizeReport
    from grok_local.quantize.sources.checkpoint import Checkpoint
    from grok_local.quantize.verify import TensorCheck, VerifyReport

__all__ = [
    "checkpoint_tables",
    "describe_checkpoint",
    "describe_gguf",
    "entries_table",
    "fetch_summary",
    "gguf_tables",
    "print_tables",
    "progress_view",
    "quantize_summary",
    "verify_table",
]

_LINE_EVERY = 5.0  # seconds, where no bar can be drawn
_LONG = 8  # items of an array that are shown

_PHASES = {"check": "checking", "pack": "packing", "fetch": "fetching"}


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
    print(json.dumps({"event": "progress", **asdict(event)}), flush=True)  # type: ignore[call-overload]


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
                tensor=event.label,
            )

        yield show


def _lines(label: str) -> Show:
    rate, last = _Rate(), [0.0]

    def show(event: Event) -> None:
        if time.monotonic() - last[0] >= _LINE_EVERY or event.done == event.total:
            last[0] = time.monotonic()
            percent = 100 * event.done / max(event.total, 1)
            with suppress(OSError):  # nobody may be listening: the work goes on
                print(f"{label}: {percent:.0f}% {rate.text(event)} {event.label}", file=sys.stderr, flush=True)

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


def describe_gguf(headers: list[Header]) -> dict[str, Any]:
    """What `inspect --json` prints for a GGUF."""
    return {
        "kind": "gguf",
        "files": [str(header.path) for header in headers],
        "bytes": sum(header.size for header in headers),
        "metadata": {key: _plain(value) for key, value in headers[0].metadata.items()},
        "tensors": [
            {
                "name": t.name,
                "type": t.type.name,
                "shape": t.shape,
                "bytes": t.nbytes,
                "offset": t.offset,
                "file": t.path.name,
            }
            for header in headers
            for t in header.tensors
        ],
    }


def _plain(value: Any) -> Any:
    """The value as JSON has it; of a long array, the beginning."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, bool | int | float | str):
        return value
    items = [
        _plain(item.item() if hasattr(item, "item") and not hasattr(item, "__len__") else item)
        for item in value[:_LONG]
    ]
    return items if len(value) <= _LONG else {"length": len(value), "first": items}


def gguf_tables(headers: list[Header]) -> Iterator[Table]:
    """Metadata, then tensors."""
    described = describe_gguf(headers)
    keys = Table(
        "key", "value", title=_cell(f"{headers[0].path.name}: {format_bytes(described['bytes'])}"), title_justify="left"
    )
    for key, value in described["metadata"].items():
        long = isinstance(value, dict)
        keys.add_row(_cell(key), _cell(f"{value['length']} of {value['first']} ..." if long else str(value)))
    yield keys
    tensors = Table("tensor", "type", "shape", "size", "offset", title_justify="left")
    for tensor in described["tensors"]:
        tensors.add_row(*_tensor_row(tensor), str(tensor["offset"]))
    yield tensors


def _cell(text: str) -> str:
    """Text from a file, harmless to rich and to the terminal."""
    return escape_markup(printable(text))


def _tensor_row(tensor: dict[str, Any]) -> tuple[str, str, str, str]:
    return _cell(tensor["name"]), tensor["type"], " x ".join(map(str, tensor["shape"])), format_bytes(tensor["bytes"])


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `inspect --json` prints for a checkpoint."""
    return {
        "kind": "checkpoint",
        "release": "grok-1",
        "folder": str(checkpoint.folder),
        "bytes": checkpoint.nbytes,
        "dimensions": asdict(checkpoint.dimensions),
        "tensors": [
            {
                "name": tensor.leaf.path,
                "type": "int8" if tensor.stored.scales else "float32",
                "shape": tensor.stored.weight.shape,
                "bytes": tensor.stored.weight.nbytes,
                "scales": tensor.stored.scales.shape if tensor.stored.scales else None,
                "file": tensor.path.name,
                "becomes": tensor.leaf.gguf_name,
            }
            for tensor in checkpoint.tensors
        ],
    }


def checkpoint_tables(checkpoint: Checkpoint) -> Iterator[Table]:
    """Dimensions, then tensors."""
    described = describe_checkpoint(checkpoint)
    title = _cell(f"{checkpoint.folder}: a checkpoint in Grok-1's format, {format_bytes(checkpoint.nbytes)}")
    dims = Table("dimension", "size", title=title, title_justify="left")
    for name, size in described["dimensions"].items():
        dims.add_row(name.replace("_", " "), str(size))
    yield dims
    tensors = Table("file", "tensor", "type", "shape", "size", "becomes")
    for tensor in described["tensors"]:
        tensors.add_row(tensor["file"], *_tensor_row(tensor), tensor["becomes"])
    yield tensors


def verify_table(report: VerifyReport) -> Table:
    """A line per tensor."""
    table = Table("tensor", "type", "relative RMS error", "largest error", "verdict", title=_cell(str(report.path)))
    for check in report.tensors:
        table.add_row(
            _cell(check.name),
            check.type,
            _number(check.relative_rms),
            _number(check.max_error),
            _verdict(check, report),
        )
    return table


def _verdict(check: TensorCheck, report: VerifyReport) -> str:
    if check.problem:
        return "[red]differs"
    if check.max_error is None:
        return "hash right" if report.hashed else "no hash"
    return "exact" if check.exact else "as packed"


def _number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.3g}"


def print_tables(tables: Iterable[Table]) -> None:
    """On stdout, as wide as they need to be where that is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    for table in tables:
        console.print(table)


def quantize_summary(report: QuantizeReport) -> Iterator[str]:
    """What became of a checkpoint, in a few lines."""
    for line in report.fallbacks:
        yield f"note: {line}"
    if report.resumed_pieces:
        yield f"continued: {report.resumed_pieces} pieces were packed already"
    size = f"{report.tensors} tensors, {format_bytes(report.bytes)}"
    if report.unchanged:
        yield f"{report.path}: there already, packed from this checkpoint with these options ({size})"
    else:
        parts = f" in {len(report.paths)} parts" if len(report.paths) > 1 else ""
        yield f"{report.path}: {size}{parts}, {report.seconds:.1f} s"


def fetch_summary(report: FetchReport) -> Iterator[str]:
    """What is in the folder now, and what to do with it."""
    yield from (f"note: {note}" for note in report.notes)
    came = (
        f"{format_bytes(report.fetched)} fetched in {report.seconds:.0f} s"
        if report.fetched
        else "all there already, none changed since it was hashed"
    )
    yield f"{report.folder}: {report.files} files, {format_bytes(report.bytes)}, every hash right ({came})"


def entries_table(entries: Iterable[Entry]) -> Table:
    """Models and checkpoints on this machine."""
    table = Table("name", "kind", "type", "size", "source")
    for entry in entries:
        table.add_row(_cell(entry.name), entry.kind, _cell(entry.type), format_bytes(entry.bytes), _cell(entry.source))
    return table

"""What a batch comes to: a file of results, and one of errors, as OpenAI has them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from grok_local.files import JsonLines
from grok_local.runtime.jobs.batch_lines import id_of
from grok_local.runtime.jobs.ledger import manifest_of
from grok_local.runtime.jobs.lines import is_encodable

if TYPE_CHECKING:
    from grok_local.runtime.jobs.batch_lines import Asked
    from grok_local.serve.jobs.batch_record import BatchRecord
    from grok_local.serve.jobs.file_store import FileStore

__all__ = ["forget", "publish", "results_path"]


def results_path(folder: Path, record: BatchRecord) -> Path:
    """Where the results are until the batch has ended."""
    return folder / f"{record.id}.results"


def publish(record: BatchRecord, asked: Sequence[Asked], files: FileStore, *, folder: Path) -> None:
    """Make the two files of what is done, if only once more. Lines without a result, of a batch that was cancelled,
    are errors. Raises OSError, OutputError.
    """
    results = _results(results_path(folder, record))
    answered = [result for result in results if not _is_failed(result)]
    failed = [result for result in results if _is_failed(result)]
    record.completed, record.failed = len(answered), len(failed)
    known = {id_of(result) for result in results}
    rest = [_cancelled(record, one.id) for one in asked if one.id not in known]
    record.output_file_id = _written(record, "output", answered, files)
    record.error_file_id = _written(record, "error", [*failed, *rest], files)


def forget(record: BatchRecord, *, folder: Path) -> None:
    """What led to the two files is not needed any more."""
    path = results_path(folder, record)
    for one in (path, manifest_of(path)):
        one.unlink(missing_ok=True)


def _results(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with JsonLines(path) as lines:
        return [value for value in lines.read() if isinstance(value, dict)]


def _is_failed(result: Mapping[str, Any]) -> bool:
    return bool(result["response"]["status_code"] != 200)


def _cancelled(record: BatchRecord, id: str | int) -> dict[str, Any]:
    error = {"code": "batch_cancelled", "message": "the batch was cancelled before this line was answered"}
    return {"id": _name("batch_req", record, str(id)), "custom_id": id, "response": None, "error": error}


def _written(record: BatchRecord, kind: str, lines: Sequence[Any], files: FileStore) -> str | None:
    if not lines:
        return None
    name = _name("file", record, kind, mark="-")

    def fill(out: IO[bytes]) -> None:
        out.writelines(_encoded(lines))

    return files.write(name, fill, f"{record.id}_{kind}.jsonl", "batch_output").id


def _encoded(lines: Iterable[Any]) -> Iterable[bytes]:
    """Lines in UTF-8; one that repeats half a character is written with escapes, as it came."""
    for line in lines:
        text = json.dumps(line, ensure_ascii=not is_encodable(line), separators=(",", ":"))
        yield text.encode() + b"\n"


def _name(prefix: str, record: BatchRecord, part: str, *, mark: str = "_") -> str:
    digest = hashlib.sha256(f"{record.id}:{part}".encode("utf-8", "surrogatepass")).hexdigest()
    return f"{prefix}{mark}{digest[:24]}"

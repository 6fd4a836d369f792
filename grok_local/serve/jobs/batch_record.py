"""A batch as it is told and kept: OpenAI's Batch object."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from grok_local.files import write_whole
from grok_local.runtime.jobs.batch_lines import Asked
from grok_local.runtime.jobs.lines import is_encodable

__all__ = ["BatchRecord", "problem", "problems_of"]

_MOST_LINES = 50_000
_MOST_PROBLEMS = 100  # that are told of one file
_TIMED = ("in_progress", "finalizing", "completed", "failed", "cancelling", "cancelled")


@dataclass
class BatchRecord:
    """`made_with` is what results depend on beside the lines; `note` says why nothing goes on. `times` has the unix
    time of each status that it came to.
    """

    id: str
    endpoint: str
    input_file_id: str
    metadata: dict[str, str] | None
    completion_window: str
    created_at: int
    status: str = "validating"
    total: int = 0
    completed: int = 0
    failed: int = 0
    errors: list[dict[str, Any]] = field(default_factory=list)
    output_file_id: str | None = None
    error_file_id: str | None = None
    made_with: dict[str, Any] | None = None
    note: str | None = None
    times: dict[str, int] = field(default_factory=dict)

    @property
    def is_open(self) -> bool:
        """Whether anything is to be done for it."""
        return self.status not in ("completed", "failed", "cancelled")

    def turn(self, status: str) -> None:
        """It comes to a status."""
        self.status = status
        self.times[status] = int(time.time())

    def described(self) -> dict[str, Any]:
        """In OpenAI's shape; nothing here expires."""
        told = ("id", "endpoint", "input_file_id", "metadata", "completion_window", "created_at", "status")
        return {
            **{name: getattr(self, name) for name in (*told, "output_file_id", "error_file_id")},
            "object": "batch",
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            **{f"{status}_at": self.times.get(status) for status in _TIMED},
            "expires_at": None,
            "expired_at": None,
            "note": self.note,
        }

    def save(self, folder: Path) -> None:
        """Raises OSError."""
        write_whole(folder / f"{self.id}.json", json.dumps(asdict(self)).encode())

    @classmethod
    def read(cls, path: Path) -> BatchRecord | None:
        """What was kept; None for what is none."""
        try:
            return cls(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None


def problems_of(asked: Sequence[Asked], endpoint: str) -> list[dict[str, Any]]:
    """Why a file is no batch, line by line. What is wrong with a body costs its own line only, and is none of it."""
    if not asked:
        return [problem("empty_file", "no line has a request")]
    if len(asked) > _MOST_LINES:
        return [problem("too_many_lines", f"{len(asked)} lines: at most {_MOST_LINES} make a batch")]
    found = [
        problem("invalid_line", text, line=one.line.number, param=param)
        for one in asked
        for text, param in [_wrong(one, endpoint)]
        if text
    ]
    more = len(found) - _MOST_PROBLEMS
    return [*found[:_MOST_PROBLEMS], *([problem("more_problems", f"{more} more lines are wrong")] if more > 0 else [])]


def problem(code: str, message: str, *, line: int | None = None, param: str | None = None) -> dict[str, Any]:
    """An entry of a batch's errors."""
    return {"code": code, "message": message, "line": line, "param": param}


def _wrong(one: Asked, endpoint: str) -> tuple[str | None, str | None]:
    fields = one.line.fields
    is_text = is_encodable([one.line.id, fields])
    if error := one.line.error or (None if is_text else "it has half a character: a surrogate without the other"):
        return error, None
    if not one.is_openai:
        return "custom_id: a text is wanted", "custom_id"
    if fields.get("method", "POST") != "POST":
        return f"method {fields['method']!r:.40}: POST is wanted", "method"
    if fields.get("url") != endpoint:
        return f"url {fields.get('url')!r:.80}: the batch's endpoint is {endpoint}", "url"
    if not isinstance(fields.get("body"), Mapping):
        return "body: an object is wanted", "body"
    return None, None

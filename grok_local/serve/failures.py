"""Failures as HTTP answers them: OpenAI's object with its four keys, or at its paths Anthropic's; never a traceback."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from starlette.responses import Response

from grok_local.errors import ContextError, GrokLocalError, InUseError, OptionError, RefusedError, WorkerError
from grok_local.runtime.jobs import anthropic
from grok_local.runtime.jobs.openai_results import blamed, error_body

__all__ = ["Json", "answer_to", "described", "refusal_of"]

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
_KINDS: tuple[tuple[type[GrokLocalError], int, str], ...] = (
    (ContextError, 400, "context_length_exceeded"),
    (OptionError, 400, "invalid_value"),
    (InUseError, 409, "in_use"),
    (WorkerError, 503, "worker_lost"),
    (GrokLocalError, 500, "model_failed"),
)


class Json(Response):
    """JSON in UTF-8."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """As bytes."""
        return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def refusal_of(error: Exception, *, body: Any = None, required: Collection[str] = ()) -> RefusedError:
    """What status and code tell a failure; `body` is what was asked, of which a field may be to blame, also one that is
    `required` and not there.
    """
    if isinstance(error, RefusedError):
        return error
    if not isinstance(error, GrokLocalError):
        return RefusedError(500, "an error of grok-local's own: the log has more", code="internal_error")
    status, code = next((status, code) for kind, status, code in _KINDS if isinstance(error, kind))
    param = blamed(error, body, required=required) if status == 400 else None
    return RefusedError(status, str(error), code=code, param=param)


def described(error: RefusedError) -> dict[str, Any]:
    """The body."""
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return error_body(str(error), code=error.code, type=kind, param=error.param)


def answer_to(error: RefusedError, *, path: str = "") -> Json:
    """The whole answer to a request for `path`. Clients that would ask again are told where that cannot help."""
    headers = {"x-should-retry": "false" if error.is_final else "true"}
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    told = anthropic.failure(error.status, str(error)) if path.startswith(anthropic.MESSAGES) else described(error)
    return Json(told, error.status, headers=headers)

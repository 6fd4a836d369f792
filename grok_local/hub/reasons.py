"""One line for what huggingface-hub, the network or the disk raised."""

from __future__ import annotations

import errno

__all__ = ["is_disk_full", "reason", "status_of"]


def reason(error: BaseException) -> str:
    """What to tell the user."""
    status = status_of(error)
    if status in (401, 403):
        return f"the hub refuses access ({status}): set HF_TOKEN to a valid token, or unset it if it has expired"
    if status is not None:
        return f"the server answered {status}"
    if is_disk_full(error):
        return "no space left on the disk: make room, then run the same command again"
    if isinstance(error, OSError) and error.strerror and error.errno:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, KeyError | TypeError | AttributeError):
        return f"the server's answer is not one of the hub's ({error!r})"
    return " ".join(str(error).split())[:300] or type(error).__name__


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind it, if there is one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)

"""Every failure grok-local knows, in one tree.

    GrokLocalError
    |-- OptionError        a value nobody can use (exit code 2, like every usage error)
    |   `-- TemplateError  a conversation that the model's chat template does not take
    |-- CheckpointError    the release on disk: missing, truncated, misshapen, hostile
    |-- TokenizerError     the tokenizer's file: missing, unreadable, of the wrong size
    |-- FetchError         the release on the hub: refused, cut off, not what its hash says, no space for it
    |-- OutputError        the GGUF being written: exists, no space
    |   `-- InUseError     another process is writing it
    |-- GGUFError          a GGUF being read: not one, truncated, nonsense inside
    |-- VerifyError        a GGUF that is not what it should be
    |-- ModelError         llama.cpp cannot load or run the model
    |-- PlacementError     the model does not fit this machine in the way that was asked for
    |-- WorkerError        a worker cannot be used: refused, busy, of another version
    |   `-- WorkerLost     a worker, or the connection to it, died while it was needed
    |-- ContextError       the prompt does not fit the context
    |   `-- NoRoomError    the KV cache is full of other sequences just now
    |-- RefusedError       a request over HTTP that is answered with an error
    `-- LinesFailed        some lines of many failed, and the others are done (exit code 3)

A message says what is wrong, where, and the command or step that helps. Only `cli.main` prints one and exits.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "ContextError",
    "FetchError",
    "GGUFError",
    "GrokLocalError",
    "InUseError",
    "LinesFailed",
    "ModelError",
    "NoRoomError",
    "OptionError",
    "OutputError",
    "PlacementError",
    "RefusedError",
    "TemplateError",
    "TokenizerError",
    "VerifyError",
    "WorkerError",
    "WorkerLost",
]


class GrokLocalError(Exception):
    """A known failure. `problems` has one line for each thing that is wrong; `str()` joins them."""

    exit_code = 1

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class OptionError(GrokLocalError):
    """An option or argument has a value that cannot be used."""

    exit_code = 2


class TemplateError(OptionError):
    """A chat template does not take a conversation: of another one it may."""


class CheckpointError(GrokLocalError):
    """The checkpoint cannot be packed as it is."""


class TokenizerError(GrokLocalError):
    """The tokenizer is missing, unreadable, or not this checkpoint's."""


class FetchError(GrokLocalError):
    """The release cannot be fetched, or not completely."""


class OutputError(GrokLocalError):
    """The output cannot be written, or would overwrite something."""


class InUseError(OutputError):
    """Another process is writing this output."""


class GGUFError(GrokLocalError):
    """A file is not a GGUF that can be read."""


class VerifyError(GrokLocalError):
    """A GGUF differs from what its hashes or its checkpoint say it should be."""


class ModelError(GrokLocalError):
    """llama.cpp cannot load or run the model."""


class PlacementError(GrokLocalError):
    """The model does not fit the machine as asked; the message has the nearest plan that would work."""


class WorkerError(GrokLocalError):
    """A worker on another machine cannot be used."""


class WorkerLost(WorkerError):  # noqa: N818  # lost is what it is
    """A worker, or the connection to it, died in the middle of its work."""


class ContextError(GrokLocalError):
    """A prompt has more tokens than the context has room for."""


class NoRoomError(ContextError):
    """The KV cache has no room for these tokens while others of other sequences are in it."""


class RefusedError(GrokLocalError):
    """A request is answered with HTTP status `status`: `code` is for programs, `param` the field that is wrong.

    `retry_after` is in seconds; where repeating cannot help, `is_final`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after

    @property
    def is_final(self) -> bool:
        """Whether the same request would be answered the same."""
        return self.retry_after is None


class LinesFailed(GrokLocalError):  # noqa: N818  # that is what happened
    """Of many lines some failed; each has its error beside the others' results."""

    exit_code = 3

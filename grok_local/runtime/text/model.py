"""The public face of a loaded model: tokenize, score, generate, chat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grok_local.errors import ContextError
from grok_local.runtime.engine.llama import LlamaEngine
from grok_local.runtime.engine.sampling import Sampling
from grok_local.runtime.text.chat import ChatReply, Conversation, Message
from grok_local.runtime.text.reply import Reply

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from grok_local.machine.facts import Say
    from grok_local.placement.load_options import LoadRequest
    from grok_local.runtime.engine.protocol import Engine, Placement

__all__ = ["Model", "load_model"]


def load_model(request: LoadRequest, *, say: Say | None = None) -> Model:
    """Load a GGUF; `say` is told what takes long. Raises GGUFError, ModelError, PlacementError or WorkerError."""
    if not request.contained:
        return Model(request.path, LlamaEngine(request, say=say))
    from grok_local.runtime.remote.client import RemoteEngine

    return Model(request.path, RemoteEngine(request, say=say))


class Model:
    """A GGUF, loaded. A context manager; not thread-safe."""

    def __init__(self, path: Path, engine: Engine) -> None:
        self.path = path
        self.engine = engine
        self._conversation = Conversation(engine)

    @property
    def context_size(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.engine.context_size

    @property
    def placement(self) -> Placement:
        """Where the weights are: the plan, what each place holds, and what was changed on the way."""
        return self.engine.placement

    @property
    def metadata(self) -> dict[str, Any]:
        """The GGUF's metadata."""
        return self.engine.metadata

    def tokenize(self, text: str) -> list[int]:
        """Ids of `text`, with BOS where the model wants one (no Grok does)."""
        return self.engine.tokenize(text)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of `ids`. Raises OptionError for ids outside the vocabulary."""
        return self.engine.detokenize(ids)

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """float32 [len(ids), vocabulary]: the logits after each position. Raises ContextError, OptionError."""
        return self.engine.logits(ids)

    def generate(
        self, prompt: str, *, max_tokens: int | None = None, stop: str | Sequence[str] = (), **sampling: Any
    ) -> Reply:
        """Continue `prompt`; iterate over the result for the text. `sampling`: the fields of `Sampling`.

        Raises ContextError if the prompt does not fit, OptionError for values out of range, TypeError for unknown
        names.
        """
        ids = self.engine.tokenize(prompt)
        self._check_room(ids)
        options = Sampling(**sampling)
        return Reply(self.engine, ids, sampling=options, max_tokens=max_tokens, stop=_as_list(stop))

    def chat(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        **sampling: Any,
    ) -> ChatReply:
        """Answer the last of `messages` ({"role": "system" | "user" | "assistant", "content": text}).

        A GGUF with a chat template uses it; a base model, as Grok-1 is, gets a transcript to continue. Of a
        conversation that goes on, only the new tokens are evaluated. When the context is full the oldest turns are
        left out, and `dropped_messages` says how many. Raises as `generate` does.
        """
        options = Sampling(**sampling)
        ids, dropped = self._conversation.prompt(messages, reserve=max_tokens)
        stops = [*self._conversation.form.stop, *_as_list(stop)]
        return ChatReply(self._conversation, ids, dropped=dropped, sampling=options, max_tokens=max_tokens, stop=stops)

    def interrupt(self) -> None:
        """End the answer under way; from a signal handler or another thread."""
        self.engine.interrupt()

    def close(self) -> None:
        """Free the model; safe to call twice."""
        self.engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_room(self, ids: Sequence[int]) -> None:
        if not ids:
            raise ContextError("the prompt is empty: there is nothing to continue")
        if len(ids) > self.context_size:
            raise ContextError(
                f"the prompt has {len(ids)} tokens and the context {self.context_size}: shorten it, or give --context"
            )


def _as_list(stop: str | Sequence[str]) -> list[str]:
    return [stop] if isinstance(stop, str) else list(stop)

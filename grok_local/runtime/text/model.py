"""The public face of a loaded model: tokenize, score, generate, chat."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from grok_local.errors import ContextError, OptionError
from grok_local.runtime.engine.llama import LlamaEngine
from grok_local.runtime.engine.sampling import Sampling
from grok_local.runtime.text.chat import ChatReply, Conversation
from grok_local.runtime.text.reply import Reply
from grok_local.runtime.text.scoring import Score, score_choices, score_ids
from grok_local.runtime.text.structure import structure_of
from grok_local.runtime.text.turns import Turns

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Unpack

    from grok_local.machine.facts import Say
    from grok_local.placement.load_options import LoadRequest
    from grok_local.runtime.engine.protocol import Engine, Placement
    from grok_local.runtime.engine.sampling import SamplingOptions
    from grok_local.runtime.text.forms import Message
    from grok_local.runtime.text.structure import StructureOptions

__all__ = ["Model", "load_model"]


def load_model(request: LoadRequest, *, say: Say | None = None) -> Model:
    """Load a GGUF; `say` is told what takes long. Raises GGUFError, ModelError, PlacementError or WorkerError."""
    if not request.contained:
        return _model(request, LlamaEngine(request, say=say))
    from grok_local.runtime.remote.client import RemoteEngine

    return _model(request, RemoteEngine(request, say=say))


def _model(request: LoadRequest, engine: Engine) -> Model:
    return Model(request.path, engine, template=request.template, temperature=request.temperature)


class Model:
    """A GGUF, loaded. A context manager. Any thread may use it: they take turns, an answer each."""

    def __init__(
        self, path: Path, engine: Engine, *, template: str | None = None, temperature: float | None = None
    ) -> None:
        self.path = path
        self.engine = engine
        self._usual: SamplingOptions = {} if temperature is None else {"temperature": temperature}
        self._turns = Turns()
        self._conversation = Conversation(engine, template=template)

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

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of `text`, with BOS where the model wants one (no Grok does) and the text does not have it.

        With `special` the names of control tokens in it, such as <|im_start|>, become those tokens.
        """
        _check_text(text)
        return self.engine.tokenize(text, special=special)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of `ids`. Raises OptionError for ids outside the vocabulary."""
        return self.engine.detokenize(ids)

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """float32 [len(ids), vocabulary]: the logits after each position. Raises ContextError, OptionError."""
        with self._turns.step(ids, keep=False):
            return self.engine.logits(ids)

    @overload
    def score(self, texts: Sequence[str | Sequence[int]]) -> list[Score]: ...
    @overload
    def score(self, texts: Sequence[str | Sequence[int]], *, choices: Sequence[str]) -> list[list[Score]]: ...

    def score(
        self, texts: Sequence[str | Sequence[int]], *, choices: Sequence[str] | None = None
    ) -> list[Score] | list[list[Score]]:
        """How likely texts, or lists of token ids, are: each token's log-probability after all before it.

        With `choices`, for each text a list of how likely each choice is to come next, as a score of the choice's own
        tokens; the text is evaluated once. Raises ContextError, OptionError.
        """
        if isinstance(texts, str) or not isinstance(texts, Iterable):
            raise OptionError("score: a list of texts is wanted")
        options = None if choices is None else _choices(choices)
        listed = [self.tokenize(text) if isinstance(text, str) else self._checked(text) for text in texts]
        with self._turns.step(texts, keep=False):
            if options is None:
                return [score_ids(self.engine, ids) for ids in listed]
            return [score_choices(self.engine, ids, options) for ids in listed]

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = 128,
        stop: str | Sequence[str] = (),
        special: bool = False,
        schema: Any = None,
        regex: str | None = None,
        choice: Sequence[str] | None = None,
        grammar: str | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Reply:
        """Continue `prompt`, a text or token ids; iterate over the result for the text. With `special`, names of
        control tokens in the text become those tokens. `max_tokens` None or -1 is no limit but the context's.

        The text is JSON after `schema` (a dict, its JSON, or a Pydantic model), and `parsed` what it says; or matches
        `regex`; or is one of `choice`; or follows `grammar` (GBNF). At most one of them may be given.

        Raises ContextError if the prompt does not fit, OptionError for values nobody can use or forms that cannot be
        enforced, TypeError for unknown names.
        """
        ids = self.tokenize(prompt, special=special) if isinstance(prompt, str) else self._checked(prompt)
        self._check_room(ids)
        form: StructureOptions = {"schema": schema, "regex": regex, "choice": choice, "grammar": grammar}
        options = _reply_options(max_tokens, stop, {**self._usual, **sampling}, form)
        return Reply(self.engine, ids, self._turns, **options)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        schema: Any = None,
        regex: str | None = None,
        choice: Sequence[str] | None = None,
        grammar: str | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> ChatReply:
        """Answer the last of `messages` ({"role": "system" | "user" | "assistant", "content": text}).

        A GGUF with a chat template uses it; a base model, as Grok-1 is, gets a transcript to continue. Of a
        conversation that goes on, only the new tokens are evaluated. When the context is full the oldest turns are
        left out, and `dropped_messages` says how many. The answer's form, and what is raised, are as in `generate`.
        """
        form: StructureOptions = {"schema": schema, "regex": regex, "choice": choice, "grammar": grammar}
        options = _reply_options(max_tokens, stop, {**self._usual, **sampling}, form)
        laid = self._conversation.lay_out(messages, reserve=options["max_tokens"])
        if options["structure"] is None:  # a form ends the answer itself
            options["stop"] = [*self._conversation.form.stop, *options["stop"]]
        return ChatReply(self._conversation, laid, self._turns, **options)

    def interrupt(self) -> None:
        """End the answer under way; from a signal handler or another thread."""
        self.engine.interrupt()

    def close(self) -> None:
        """Free the model; safe to call twice."""
        with self._turns.step(self, keep=False):
            self.engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _checked(self, ids: Sequence[int]) -> list[int]:
        try:
            whole = [operator.index(token) for token in ids]  # numpy's too
        except TypeError:
            raise OptionError("prompt: a text, or a list of token ids, is wanted") from None
        self.engine.detokenize(whole)
        return whole

    def _check_room(self, ids: Sequence[int]) -> None:
        if not ids:
            raise ContextError("the prompt is empty: there is nothing to continue")
        if len(ids) > self.context_size:
            raise ContextError(
                f"the prompt has {len(ids)} tokens and the context {self.context_size}: shorten it, or take a larger "
                "context"
            )


def _reply_options(
    max_tokens: int | None, stop: str | Sequence[str], sampling: SamplingOptions, form: StructureOptions
) -> dict[str, Any]:
    """What a reply is told. Raises OptionError."""
    stops = [stop] if isinstance(stop, str) else list(stop) if isinstance(stop, Iterable) else [stop]
    if not all(isinstance(text, str) and text for text in stops):
        raise OptionError(f"stop {stop!r:.60}: a text or a list of texts is wanted, none of them empty")
    limit, structure = None if max_tokens == -1 else max_tokens, structure_of(form)
    if structure and stops:
        raise OptionError("stop: an answer in a given form ends where the form does: leave one of the two out")
    return {"sampling": Sampling(**sampling), "max_tokens": limit, "stop": stops, "structure": structure}


def _choices(choices: object) -> list[str]:
    listed = list(choices) if isinstance(choices, Iterable) and not isinstance(choices, str) else []
    if not listed or not all(isinstance(choice, str) for choice in listed):
        raise OptionError(f"choices {choices!r:.60}: a list of texts is wanted")
    return listed


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise OptionError(f"{text!r:.60}: a text is wanted")

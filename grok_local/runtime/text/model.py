"""The public face of a loaded model: tokenize, score, generate, chat."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, overload

from grok_local.errors import OptionError
from grok_local.runtime.scheduling.reopening import Reopenable, engine_class
from grok_local.runtime.text.answering import answering
from grok_local.runtime.text.batch import Prepared, Result, Tasks, Watch, check_room, run_batch, whole_numbers
from grok_local.runtime.text.chat import ChatReply, Conversation
from grok_local.runtime.text.reply import AsyncReply, Reply
from grok_local.runtime.text.scoring import Score, score_choices, score_ids

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Unpack

    from grok_local.machine.facts import Say
    from grok_local.placement.load_options import LoadRequest
    from grok_local.runtime.engine.protocol import Engine, Placement
    from grok_local.runtime.engine.sampling import SamplingOptions
    from grok_local.runtime.text.answering import AnswerOptions
    from grok_local.runtime.text.forms import Message

__all__ = ["Model", "load_model"]

_IDS = "a list of token ids"


def load_model(request: LoadRequest, *, say: Say | None = None) -> Model:
    """Load a GGUF; `say` is told what takes long. Raises GGUFError, ModelError, PlacementError or WorkerError."""
    return Model(request, engine_class(request)(request, say=say), say=say)


class Model:
    """A GGUF, loaded. A context manager. Any thread may use it.

    What several threads generate goes on together as far as the model has places for them; the rest takes turns.
    """

    def __init__(self, request: LoadRequest, engine: Engine, *, say: Say | None = None) -> None:
        self.path = request.path
        self._usual: SamplingOptions = {} if request.temperature is None else {"temperature": request.temperature}
        self._template = request.template
        self._opened = Reopenable(request, engine, say=say)
        self.turns = self._opened.turns
        self.conversation = Conversation(self._opened.vocabulary, template=self._template)

    @property
    def engine(self) -> Engine:
        """The engine that there is now; whoever computes with it has it `alone`."""
        return self._opened.engine

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
        return self._opened.vocabulary.tokenize(text, special=special)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of `ids`. Raises OptionError for ids outside the vocabulary."""
        return self._opened.vocabulary.detokenize(whole_numbers(ids, wanted=_IDS))

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """float32 [len(ids), vocabulary]: the logits after each position. Raises ContextError, OptionError."""
        whole = self._checked(whole_numbers(ids, wanted=_IDS))
        with self.alone() as engine:
            return engine.logits(whole)

    def alone(self) -> AbstractContextManager[Engine]:
        """The engine itself: nobody else computes meanwhile, and its first sequence is nobody's."""
        return self._opened.alone()

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
        listed = [self._scored(text) for text in texts]
        with self.alone() as engine:
            if options is None:
                return [score_ids(engine, ids) for ids in listed]
            return [score_choices(engine, ids, options) for ids in listed]

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = 128,
        stop: str | Sequence[str] = (),
        special: bool = False,
        logprobs: int | None = None,
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

        `logprobs`: each token's log-probability is kept, and those of so many of the likeliest.

        Raises ContextError if the prompt does not fit, OptionError if it is empty, and for values nobody can use or
        forms that cannot be enforced, TypeError for unknown names.
        """
        ids = (
            self.tokenize(prompt, special=special) if isinstance(prompt, str) else self._checked(whole_numbers(prompt))
        )
        check_room(ids, self.context_size)
        given: AnswerOptions = {"max_tokens": max_tokens, "stop": stop, "logprobs": logprobs}
        form: AnswerOptions = {"schema": schema, "regex": regex, "choice": choice, "grammar": grammar}
        how = answering({**given, **form}, {**self._usual, **sampling})
        return Reply(how.request(ids), self.turns, size=self.context_size, structure=how.structure)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
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
        given: AnswerOptions = {"max_tokens": max_tokens, "stop": stop, "logprobs": logprobs}
        form: AnswerOptions = {"schema": schema, "regex": regex, "choice": choice, "grammar": grammar}
        how = answering({**given, **form}, {**self._usual, **sampling})
        laid = self.conversation.lay_out(messages, reserve=how.max_tokens)
        request = how.request(laid.ids, strip=True, stop=self.conversation.form.stop)
        return ChatReply(self.conversation, laid, request, self.turns, structure=how.structure)

    def agenerate(self, prompt: str | Sequence[int], **options: Any) -> AsyncReply:
        """As `generate`, for `async for`."""
        return AsyncReply(self.generate(prompt, **options))

    def achat(self, messages: Sequence[Message], **options: Any) -> AsyncReply:
        """As `chat`, for `async for`."""
        return AsyncReply(self.chat(messages, **options))

    def batch(
        self,
        requests: Iterable[Any],
        *,
        parallel: int | None = None,
        reproducible: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> Generator[Result]:
        """Continue many prompts, `parallel` of them together; results come as they are finished.

        A request is a text, a list of token ids, or a mapping with `prompt` or `messages`, an `id`, and any option of
        `generate`; `options` are for those that do not say otherwise. Random numbers come from `seed` and a request's
        id. With `reproducible`, the bits of a result do not depend on the other requests. One that fails has an `error`
        and costs the others nothing. By default as many go together as the model was loaded for, or if that is one, as
        many as there is memory for.

        Raises OptionError, TypeError for unknown names, and whatever ends the model. Where it has to be opened anew,
        also what loading raises, and the model goes on as it was loaded.
        """
        if isinstance(requests, str | bytes | Mapping) or not isinstance(requests, Iterable):
            raise OptionError(f"batch: a list of prompts is wanted, not {requests!r:.60}")
        tasks = self.tasks(options, seed=seed)
        return self._batch(requests, tasks, parallel=parallel, reproducible=reproducible)

    def _batch(
        self, requests: Iterable[Any], tasks: Tasks, *, parallel: int | None, reproducible: bool
    ) -> Generator[Result]:
        listed = requests if isinstance(requests, Iterator) else list(requests)
        most = max(len(listed), 1) if isinstance(listed, list) else None
        self._opened.reshape(parallel, reproducible=reproducible, most=most)
        yield from self.run(tasks.prepare(index, request) for index, request in enumerate(listed))

    def tasks(self, defaults: Mapping[str, Any], *, seed: int = 0) -> Tasks:
        """What prepares tasks for this model; `defaults` and `seed` are as in `batch`."""
        given = {**self._usual, **defaults}
        return Tasks(self._opened.vocabulary, template=self._template, defaults=given, seed=seed)

    def run(
        self, tasks: Iterable[Prepared | Result], *, size: int | None = None, watch: Watch = lambda _: None
    ) -> Generator[Result]:
        """Likewise, of tasks that were prepared, with as many places as there are. `size` is how many tokens prompt and
        answer may have together; `watch` is shown after every step what each answer under way took so far.
        """
        ahead = 2 * self._opened.request.parallel
        return run_batch(self.turns, tasks, size=size or self.context_size, ahead=ahead, watch=watch)

    def interrupt(self) -> None:
        """End the answers under way; from a signal handler or another thread."""
        self.turns.interrupt()
        self.engine.interrupt()

    def close(self) -> None:
        """Free the model; safe to call twice."""
        self._opened.close()

    def __enter__(self) -> Model:
        self._opened.check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model cannot be pickled or copied: load it in each process; threads may share one")

    def _scored(self, text: str | Sequence[int]) -> list[int]:
        if isinstance(text, str):
            return self.tokenize(text)
        return self._checked(whole_numbers(text, wanted="score: of each a text, or a list of token ids,"))

    def _checked(self, ids: list[int]) -> list[int]:
        self._opened.vocabulary.detokenize(ids)
        return ids


def _choices(choices: object) -> list[str]:
    listed = list(choices) if isinstance(choices, Iterable) and not isinstance(choices, str) else []
    if not listed or not all(isinstance(choice, str) for choice in listed):
        raise OptionError(f"choices {choices!r:.60}: a list of texts is wanted")
    return listed


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise OptionError(f"{text!r:.60}: a text is wanted")

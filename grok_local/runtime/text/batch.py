"""Many prompts at once: each is a task, and its result comes when it is finished."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from grok_local.errors import ContextError, GrokLocalError, ModelError, OptionError
from grok_local.runtime.engine.sampling import Sampling
from grok_local.runtime.scheduling.generation import FinishReason, Generation, Request, Stats
from grok_local.runtime.text.answering import Answering, answering
from grok_local.runtime.text.chat import Conversation
from grok_local.runtime.text.reply import TokenLogprob
from grok_local.units import whole_number

if TYPE_CHECKING:
    from grok_local.runtime.engine.protocol import Lexicon
    from grok_local.runtime.scheduling.turns import Turns

__all__ = [
    "TASK_FIELDS",
    "Prepared",
    "Result",
    "Tasks",
    "Watch",
    "check_room",
    "prompt_logprobs",
    "result_of",
    "run_batch",
    "whole_numbers",
]

_SAMPLING = tuple(Sampling.__dataclass_fields__)
_ANSWERING = ("max_tokens", "stop", "logprobs", "schema", "regex", "choice", "grammar")
_OPTIONS = ("special", "echo", "prompt_logprobs", *_ANSWERING, *_SAMPLING)
TASK_FIELDS = ("id", "prompt", "messages", "prefix", *_OPTIONS)
_SEEDS = 1 << 31
_TEXTS = (str, bytes, bytearray, memoryview)

Watch = Callable[[Collection[Stats]], None]


@dataclass(frozen=True)
class Result:
    """What became of task number `index`: its text, or the `error` it failed of. `tokens` are the answer's ids.

    `parsed` is what a whole answer in the form of a schema says; `stopped_by` the stop string that ended it;
    `prompt` is the prompt's text where it was wanted, and `prompt_logprobs` are of its tokens, the first's meaning
    nothing; `notes` are what is to be known of how messages were laid out.
    """

    index: int
    id: str | int
    text: str = ""
    finish_reason: FinishReason | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    parsed: Any = None
    stats: Stats = field(default_factory=Stats)
    error: GrokLocalError | None = None
    prompt: str = ""
    stopped_by: str | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """A task that can be run: its tokens are known, and fit. `echo` is the prompt's text where it is wanted, and
    `first` are the bytes of its first token; `notes` are what is to be known of how messages were laid out.
    """

    index: int
    id: str | int
    how: Answering
    request: Request
    echo: str = ""
    first: bytes = b""
    notes: tuple[str, ...] = ()


class Tasks:
    """Turns what people write into what can be run.

    A task is a prompt, as text or token ids, or a mapping: `prompt` or `messages`, and any option of `Model.generate`;
    `defaults` are those of tasks that do not say otherwise. The random numbers of a task without a seed come from
    `seed` and its id alone. Raises TypeError for defaults with unknown names.
    """

    def __init__(
        self,
        engine: Lexicon,
        *,
        template: str | None,
        defaults: Mapping[str, Any],
        seed: int = 0,
    ) -> None:
        unknown = [name for name in defaults if name not in _OPTIONS]
        if unknown:
            raise TypeError(f"no option {unknown[0]!r}: known are {', '.join(_OPTIONS)}")
        self._engine, self._seed = engine, seed
        self._conversation = Conversation(engine, template=template)
        self._defaults = dict(defaults)

    def check(self) -> Answering:
        """How tasks are answered that do not say otherwise. Raises OptionError for defaults, or a template, that nobody
        can use, ModelError for a template that cannot be read.
        """
        how = self._how("", {})
        how.request([], stop=self._conversation.form.stop)
        return how

    def prepare(self, index: int, task: Any) -> Prepared | Result:
        """What can be run, or the result that says why it cannot."""
        id_: str | int = index
        try:
            fields = dict(task) if isinstance(task, Mapping) else {"prompt": task}
            id_ = _id(fields.pop("id", index))
            return self._prepared(index, id_, fields)
        except (OptionError, ContextError) as error:
            return Result(index, id_, error=error)

    def _prepared(self, index: int, id_: str | int, fields: dict[str, Any]) -> Prepared:
        _check_names(fields)
        fields = {name: value for name, value in fields.items() if value is not None}
        fields = self._defaults | fields
        how = self._how(id_, fields)
        if "messages" in fields:
            request, echo = self._of_messages(fields, how), ""
        else:
            ids = self._ids(fields.get("prompt"), special=bool(fields.get("special")))
            if fields.get("prefix"):
                raise OptionError("prefix: of an answer to messages alone, and this is a prompt")
            request, echo = how.request(ids), self._echo(fields, ids)
        check_room(request.prompt, self._engine.context_size)
        request = replace(request, prompt_likely=fields.get("prompt_logprobs"))
        return Prepared(index, id_, how, request, echo, self._first(request, echo), self._notes(fields))

    def _notes(self, fields: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(self._conversation.form.notes_on(fields["messages"])) if "messages" in fields else ()

    def _first(self, request: Request, echo: str) -> bytes:
        if request.prompt_likely is None:
            return b""
        piece = self._engine.piece(request.prompt[0])
        return piece if echo.startswith(" ") else piece.removeprefix(b" ")  # SPM puts one before a text

    def _echo(self, fields: Mapping[str, Any], ids: Sequence[int]) -> str:
        if not fields.get("echo"):
            return ""
        prompt = fields["prompt"]
        return prompt if isinstance(prompt, str) else self._engine.detokenize(ids)

    def _how(self, id_: str | int, fields: Mapping[str, Any]) -> Answering:
        given = {**self._defaults, **fields}
        sampling = {name: given[name] for name in _SAMPLING if name in given}
        if sampling.get("seed") in (None, -1):
            sampling["seed"] = _derived(self._seed, id_)
        return answering({name: given[name] for name in _ANSWERING if name in given}, sampling)  # type: ignore[arg-type]

    def _of_messages(self, fields: Mapping[str, Any], how: Answering) -> Request:
        if "prompt" in fields:
            raise OptionError("prompt and messages: give one of the two")
        if alone := [name for name in ("special", "echo") if fields.get(name)]:
            raise OptionError(f"{alone[0]}: of a prompt alone, and these are messages")
        prefix = _prefix(fields)
        laid = self._conversation.lay_out(fields["messages"], reserve=1)
        if laid.dropped:
            raise ContextError(f"the conversation does not fit the context of {self._engine.context_size} tokens")
        ids = self._conversation.begun(laid, prefix) if prefix else laid.ids
        return how.request(ids, strip=not prefix, stop=self._conversation.form.stop)

    def _ids(self, prompt: Any, *, special: bool) -> list[int]:
        if isinstance(prompt, str):
            return self._engine.tokenize(prompt, special=special)
        ids = whole_numbers(prompt)
        self._engine.detokenize(ids)
        return ids


def _prefix(fields: Mapping[str, Any]) -> str:
    """What an answer to messages begins with. Raises OptionError."""
    found = fields.get("prefix") or ""
    if not isinstance(found, str) or found != found.rstrip():
        raise OptionError(f"prefix {found!r:.60}: a text is wanted that does not end in white space")
    return found


def whole_numbers(ids: Any, *, wanted: str = "prompt: a text, or a list of token ids,") -> list[int]:
    """Token ids as a list, numpy's too. Raises OptionError, which says what is `wanted`: bytes are none, nor are
    booleans.
    """
    are_listed = isinstance(ids, Iterable) and not isinstance(ids, _TEXTS)
    listed: list[Any] = list(ids) if are_listed else [None]
    if any(isinstance(token, bool) or not hasattr(token, "__index__") for token in listed):
        raise OptionError(f"{wanted} is wanted")
    return [operator.index(token) for token in listed]


def check_room(ids: Sequence[int], size: int) -> None:
    """Raises OptionError for a prompt that is empty, ContextError for one that does not fit `size` tokens."""
    if not ids:
        raise OptionError("prompt: it is empty, and there is nothing to continue")
    if len(ids) > size:
        raise ContextError(
            f"the prompt has {len(ids)} tokens and the context {size}: shorten it, or take a larger context"
        )


def run_batch(
    turns: Turns, tasks: Iterable[Prepared | Result], *, size: int, ahead: int, watch: Watch
) -> Generator[Result]:
    """Results as they come; at most `ahead` tasks are taken before the first of them is finished. `watch` sees what
    those under way took so far.

    One that fails costs the others nothing; an error of the model ends all, and is raised.
    """
    coming, flying = iter(tasks), dict[Generation, Prepared]()
    try:
        while True:
            yield from _launched(turns, coming, flying, size=size, ahead=ahead)
            if not flying:
                return
            turns.until(partial(_some_ended, flying, watch), reading=())
            for one in [one for one in flying if one.has_ended]:
                yield result_of(flying.pop(one), one)
    finally:
        for one in flying:
            one.is_cancelled = True


def _some_ended(flying: Collection[Generation], watch: Watch) -> bool:
    watch([one.stats for one in flying])
    return any(one.has_ended for one in flying)


def _launched(
    turns: Turns, coming: Iterator[Prepared | Result], flying: dict[Generation, Prepared], *, size: int, ahead: int
) -> Iterator[Result]:
    while len(flying) < ahead and (task := next(coming, None)) is not None:
        if isinstance(task, Result):
            yield task
        else:
            generation = Generation(task.request, size)
            flying[generation] = task
            turns.submit(generation, eager=True)


def result_of(task: Prepared, done: Generation) -> Result:
    """What became of a task whose generation has ended. Raises an error of the model's."""
    done.take()
    error, structure = done.error, task.how.structure
    if error and not isinstance(error, OptionError | ContextError):
        raise error
    whole = structure is not None and done.finish_reason == "stop"
    try:
        parsed = structure.parsed(done.text) if structure and whole else None
    except ModelError as refused:  # by a class with checks that its schema does not tell
        return Result(task.index, task.id, error=OptionError(str(refused)))
    return Result(
        task.index,
        task.id,
        text=done.text,
        finish_reason=done.finish_reason,
        tokens=done.tokens,
        logprobs=None if task.request.likely is None else [TokenLogprob.of(token) for token in done.scored],
        parsed=parsed,
        stats=done.stats,
        error=error,
        prompt=task.echo,
        stopped_by=done.stopped_by,
        prompt_logprobs=prompt_logprobs(task, done),
        notes=task.notes,
    )


def prompt_logprobs(task: Prepared, done: Generation) -> list[TokenLogprob] | None:
    """Of the prompt's tokens, the first's meaning nothing; None where they were not asked for."""
    if task.request.prompt_likely is None:
        return None
    first = TokenLogprob(task.request.prompt[0], task.first, 0.0, ())
    return [first, *(TokenLogprob.of(token) for token in done.read)]


def _derived(seed: int, id_: str | int) -> int:
    """A task's own seed: of the run's and its id, never of its place among the others."""
    named = f"{seed}:{id_}".encode("utf-8", "surrogatepass")  # an id in JSON may have a half of a character
    return int.from_bytes(hashlib.sha256(named).digest()[:8], "big") % _SEEDS


def _id(value: Any) -> str | int:
    try:
        return value if isinstance(value, str) else whole_number("id", value)
    except OptionError:
        raise OptionError("id: a text or a whole number is wanted") from None


def _check_names(fields: Mapping[str, Any]) -> None:
    unknown = [name for name in fields if name not in TASK_FIELDS]
    if unknown:
        raise OptionError(f"unknown field {unknown[0]!r}: known are {', '.join(TASK_FIELDS)}")

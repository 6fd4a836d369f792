"""Lays a conversation out for a model, and keeps what the KV cache holds of it.

Grok-1 is a base model: it continues text, so a conversation is a transcript for it to go on with, and an answer ends
where the human would speak again. A GGUF with a chat template gets its template.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

from grok_local.errors import ContextError, ModelError, OptionError
from grok_local.runtime.text.reply import Reply

if TYPE_CHECKING:
    from grok_local.runtime.engine.protocol import Engine

__all__ = ["DEFAULT_SYSTEM", "ChatReply", "Conversation", "Message", "Template", "Transcript"]

Message: TypeAlias = Mapping[str, str]

DEFAULT_SYSTEM = (
    "A conversation between a human and Grok, an assistant who answers truthfully, briefly and in plain words."
)
_MARK = "\ue000answer\ue000"  # private use: no message has it
_ROLES = ("system", "user", "assistant")


class ChatForm(Protocol):
    """How messages become one text that ends where the assistant's answer begins."""

    stop: tuple[str, ...]
    special: bool  # whether the text names control tokens

    def render(self, messages: Sequence[Message]) -> str: ...


class Transcript:
    """For base models: the speakers' names before what they say."""

    # With the empty line before a name first: it belongs to the answer as little as the name.
    stop: tuple[str, ...] = ("\n\nHuman:", "\n\nAssistant:", "\nHuman:", "\nAssistant:")
    special = False
    _names: ClassVar = {"user": "Human", "assistant": "Assistant"}

    def render(self, messages: Sequence[Message]) -> str:
        """The transcript, up to the colon after the assistant's name."""
        given = [m["content"] for m in messages if m["role"] == "system"]
        turns = [f"{self._names[m['role']]}: {m['content'].strip()}" for m in messages if m["role"] != "system"]
        return "\n\n".join([*(given or [DEFAULT_SYSTEM]), *turns, "Assistant:"])


class Template:
    """For models with a chat template (Jinja, run in a sandbox)."""

    stop: tuple[str, ...] = ()
    special = True

    def __init__(self, source: str, *, bos: str, eos: str) -> None:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        self._tokens = {"bos_token": bos, "eos_token": eos}
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ModelError(f"the model's chat template cannot be read: {error}") from None

    def render(self, messages: Sequence[Message]) -> str:
        """The template's text for `messages`. Raises ModelError where the template refuses them."""
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=True, **self._tokens)
        except Exception as error:  # a template is a program, and fails as it likes
            raise ModelError(f"the model's chat template does not take this conversation: {error}") from None


def _refuse(message: str) -> None:
    raise ValueError(message)


class Conversation:
    """Turns messages into token ids so that what was evaluated before stays a prefix.

    An answer's own tokens are kept: its text, tokenized again, might come out otherwise.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.form = _form_for(engine)
        self._messages: list[Message] = []  # of the last prompt ...
        self._reply = ""  # ... what was answered ...
        self._ids: list[int] = []  # ... the ids of both, as far as whole tokens go ...
        self._rest = ""  # ... and the end of the answer that shares a token with what was not shown
        self._dropped = 0

    def prompt(self, messages: Sequence[Message], *, reserve: int | None) -> tuple[list[int], int]:
        """Ids for `messages`, and how many of the oldest were left out to keep `reserve` tokens free for the answer.

        Raises ContextError if the last message alone is too long.
        """
        _check(messages)
        size = self.engine.context_size
        limit = size - min(reserve or size // 4, size // 2)
        self._dropped = min(self._dropped, len(_conversation(messages)) - 1)
        ids = self._encode(messages)
        if len(ids) > limit:
            # Down to half at once: each time something is left out, everything after it is evaluated anew.
            ids = self._make_room(messages, limit // 2)
        if len(ids) > limit:
            raise ContextError(
                f"the message has {len(ids)} tokens and the context {size}: shorten it, or give --context"
            )
        self._messages, self._reply, self._ids, self._rest = self._kept(messages), "", ids, ""
        return ids, self._dropped

    def remember(self, tokens: Sequence[int], shown: str) -> None:
        """Add the answer to what is known: `tokens` as generated, of which the text `shown` was given out."""
        raw = b"".join(self.engine.piece(token) for token in tokens).decode("utf-8", "replace")
        end = len(raw) - len(raw.lstrip()) + len(shown.rstrip())
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        length = count = whole = 0
        for index, token in enumerate(tokens):
            length += len(decoder.decode(self.engine.piece(token)))
            if length <= end and not decoder.getstate()[0]:
                count, whole = index + 1, length
        self._reply, self._rest = shown.strip(), raw[whole:end]
        self._ids = [*self._ids, *tokens[:count]]

    def _make_room(self, messages: Sequence[Message], limit: int) -> list[int]:
        # What is kept begins with a question.
        starts = [i for i, m in enumerate(_conversation(messages)) if m["role"] == "user" and i >= self._dropped]
        ids: list[int] = []
        for start in starts:
            self._dropped = start
            ids = self._encode(messages)
            if len(ids) <= limit:
                break
        return ids

    def _kept(self, messages: Sequence[Message]) -> list[Message]:
        system = [dict(m) for m in messages if m["role"] == "system"]
        return [*system, *map(dict, _conversation(messages)[self._dropped :])]

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        kept = self._kept(messages)
        return self._continued(kept) or self._tokenize(self.form.render(kept))

    def _continued(self, messages: list[Message]) -> list[int] | None:
        """Ids of `messages` if they go on from the last answer: its ids, and those of what follows it in the form."""
        at = len(self._messages)
        answer = messages[at] if self._messages and messages[:at] == self._messages and len(messages) > at else None
        if answer is None or answer["role"] != "assistant" or answer["content"].strip() != self._reply:
            return None
        marked = [*messages[:at], {**answer, "content": _MARK}, *messages[at + 1 :]]
        _, found, following = self.form.render(marked).partition(_MARK)
        if not found:
            return None
        return self._ids + self.engine.continue_ids(self._rest + following, special=self.form.special)

    def _tokenize(self, text: str) -> list[int]:
        ids = self.engine.tokenize(text, special=self.form.special)
        # Many templates write BOS themselves.
        return ids[1:] if len(ids) > 1 and ids[0] == ids[1] == self.engine.bos else ids


class ChatReply(Reply):
    """A reply in a conversation: without white space at its start; remembered, so that the next turn costs only
    its own tokens.
    """

    def __init__(self, conversation: Conversation, ids: Sequence[int], *, dropped: int, **options: Any) -> None:
        super().__init__(conversation.engine, ids, strip=True, **options)
        self.dropped_messages = dropped  # of the conversation's oldest, to make room
        self._conversation = conversation

    def _ended(self) -> None:
        with suppress(ModelError):  # of a model that has died nothing needs to be remembered
            self._conversation.remember(self.tokens, self.text)


def _form_for(engine: Engine) -> ChatForm:
    source = engine.metadata.get("tokenizer.chat_template")
    if not isinstance(source, str):
        return Transcript()
    return Template(source, bos=engine.special_text("bos"), eos=engine.special_text("eos"))


def _check(messages: Sequence[Message]) -> None:
    for message in messages:
        if message.get("role") not in _ROLES or not isinstance(message.get("content"), str):
            raise OptionError(f"a message needs a role ({', '.join(_ROLES)}) and a content, not {dict(message)!r:.80}")
    if not messages or messages[-1]["role"] != "user":
        raise OptionError("the last message must be the user's")


def _conversation(messages: Sequence[Message]) -> list[Message]:
    """All that may be left out to make room: everything but the system's messages."""
    return [m for m in messages if m["role"] != "system"]

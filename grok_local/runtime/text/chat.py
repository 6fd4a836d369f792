"""Turns a conversation into token ids, and keeps what the KV cache holds of it.

Grok-1 is a base model: it continues text, so a conversation is a transcript for it to go on with, and an answer ends
where the human would speak again. A GGUF with a chat template gets its template. Both are in `forms`.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from grok_local.errors import ContextError, ModelError, OptionError
from grok_local.runtime.text.forms import ChatForm, Message, Segment, form_for
from grok_local.runtime.text.reply import Reply

if TYPE_CHECKING:
    from grok_local.runtime.engine.protocol import Lexicon
    from grok_local.runtime.scheduling.generation import Request
    from grok_local.runtime.scheduling.turns import Turns
    from grok_local.runtime.text.structure import Structure

__all__ = ["ChatReply", "Conversation", "Laid"]

_MARK = "\ue000answer\ue000"  # private use: no message has it
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Laid:
    """A conversation laid out for its next answer. Of `said`, all its messages, the `dropped` oldest were left out to
    make room; `text` is what the ids of `messages`, the others, stand for.
    """

    said: tuple[Message, ...]
    dropped: int
    messages: tuple[Message, ...]
    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class _Answered:
    """The last answer: what it answered, its text, and the ids of both as far as whole tokens go. `rest` is the end of
    the answer that shares a token with what was not shown.
    """

    laid: Laid
    reply: str
    ids: tuple[int, ...]
    rest: str


class Conversation:
    """Turns messages into token ids so that what was evaluated before stays a prefix.

    An answer's own tokens are kept: its text, tokenized again, might come out otherwise.
    """

    def __init__(self, engine: Lexicon, *, template: str | None = None) -> None:
        self.engine = engine
        self._template = template
        self._last: _Answered | None = None

    @cached_property
    def form(self) -> ChatForm:
        """How the model wants its conversations. Nobody looks at a template before there is one."""
        return form_for(self.engine, self._template)

    def lay_out(self, messages: Sequence[Message], *, reserve: int | None) -> Laid:
        """For an answer to the last of `messages`, with `reserve` tokens kept free for it.

        Raises ContextError if the last message alone is too long, OptionError for messages that make no sense, or that
        the template refuses, ModelError for a template that cannot be read.
        """
        _check(messages)
        size = self.engine.context_size
        limit = size - min(reserve or size // 4, size // 2)
        laid = self._without(messages, self._dropped_before(messages))
        if len(laid.ids) > limit:
            # Down to half at once: each time something is left out, everything after it is evaluated anew.
            laid = self._with_room(messages, limit // 2, laid)
        if len(laid.ids) > limit:
            raise ContextError(
                f"the message has {len(laid.ids)} tokens and the context {size}: shorten it, or take a larger context"
            )
        return laid

    def begun(self, laid: Laid, answer: str) -> list[int]:
        """Ids of a conversation and of what its next answer begins with."""
        return [*laid.ids, *self.engine.continue_ids(self.form.gap + answer)]

    def remember(self, laid: Laid, tokens: Sequence[int], shown: str) -> None:
        """Add the answer to what is known: `tokens` as generated, of which the text `shown` was given out."""
        raw = b"".join(self.engine.piece(token) for token in tokens).decode("utf-8", "replace")
        end = len(raw) - len(raw.lstrip()) + len(shown.rstrip())
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        length = count = whole = 0
        for index, token in enumerate(tokens):
            length += len(decoder.decode(self.engine.piece(token)))
            if length <= end and not decoder.getstate()[0]:
                count, whole = index + 1, length
        self._last = _Answered(laid, shown.strip(), (*laid.ids, *tokens[:count]), raw[whole:end])

    def remembered(self) -> dict[str, Any] | None:
        """The last answer, for JSON; None where there was none."""
        return None if self._last is None else asdict(self._last)

    def recall(self, answered: Any) -> None:
        """Go on after an answer that was remembered as JSON; what is none is forgotten."""
        try:
            laid = answered["laid"]
            messages = {name: tuple(laid[name]) for name in ("said", "messages", "ids")}
            found = Laid(**{**laid, **messages})
            self._last = _Answered(found, answered["reply"], tuple(answered["ids"]), answered["rest"])
        except (TypeError, KeyError):
            self._last = None

    def _dropped_before(self, messages: Sequence[Message]) -> int:
        """How many are left out already, if this is the conversation that was answered last."""
        last = self._last
        goes_on = last is not None and tuple(messages[: len(last.laid.said)]) == last.laid.said
        return last.laid.dropped if last and goes_on else 0

    def _with_room(self, messages: Sequence[Message], limit: int, laid: Laid) -> Laid:
        # What is kept begins with a question.
        starts = [i for i, m in enumerate(_conversation(messages)) if m["role"] == "user" and i >= laid.dropped]
        for start in starts:
            laid = self._without(messages, start)
            if len(laid.ids) <= limit:
                break
        return laid

    def _without(self, messages: Sequence[Message], dropped: int) -> Laid:
        kept = [m for m in messages if m["role"] == "system"] + _conversation(messages)[dropped:]
        segments = self.form.render(kept)
        text = _text(segments)
        ids = self._continued(kept, text) or self._tokenize(segments)
        return Laid(tuple(map(dict, messages)), dropped, tuple(map(dict, kept)), text, tuple(ids))

    def _continued(self, messages: list[Message], text: str) -> list[int] | None:
        """Ids of `messages` if they go on from the last answer: its ids, and those of what follows it in the form.

        None too where the form shows the prompt or the answer otherwise by now: a template may leave out an answer's
        reasoning.
        """
        last = self._last
        if last is None or not _goes_on(messages, last):
            return None
        at = len(last.laid.messages)
        answer = messages[at]["content"]
        marked = self.form.render([*messages[:at], {**messages[at], "content": _MARK}, *messages[at + 1 :]])
        before, found, after = _text(marked).partition(_MARK)
        as_answered = before.rstrip() == last.laid.text.rstrip()
        if not (found and as_answered and text in (before + answer + after, before + last.reply + after)):
            return None
        first, *others = _after(marked, _MARK)
        ids = self.engine.continue_ids(last.rest + first.text, special=first.special)
        return [*last.ids, *ids, *self._plain(others)]

    def _tokenize(self, segments: Sequence[Segment]) -> list[int]:
        first, *others = segments or [Segment("", False)]
        return self.engine.tokenize(first.text, special=first.special) + self._plain(others)

    def _plain(self, segments: Sequence[Segment]) -> list[int]:
        ids = [self.engine.tokenize(text, add_bos=False, special=special) for text, special in segments]
        return [token for part in ids for token in part]


class ChatReply(Reply):
    """A reply in a conversation: without white space at its start; remembered, so that the next turn costs only
    its own tokens.
    """

    def __init__(
        self, conversation: Conversation, laid: Laid, request: Request, turns: Turns, *, structure: Structure | None
    ) -> None:
        super().__init__(request, turns, size=conversation.engine.context_size, structure=structure)
        self.dropped_messages = laid.dropped  # of the conversation's oldest, to make room
        self.notes = tuple(conversation.form.notes)  # what is to be known of how it was laid out
        self._conversation, self._laid = conversation, laid

    def _ended(self) -> None:
        with suppress(ModelError):  # of a model that has died nothing needs to be remembered
            self._conversation.remember(self._laid, self.tokens, self.text)


def _goes_on(messages: Sequence[Message], last: _Answered) -> bool:
    at = len(last.laid.messages)
    if len(messages) <= at or tuple(messages[:at]) != last.laid.messages:
        return False
    return messages[at]["role"] == "assistant" and messages[at]["content"].strip() == last.reply


def _check(messages: Sequence[Message]) -> None:
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        raise OptionError("messages: a list is wanted, such as [{'role': 'user', 'content': 'What is an expert?'}]")
    for message in messages:
        if message.get("role") not in _ROLES or not isinstance(message.get("content"), str):
            raise OptionError(f"a message needs a role ({', '.join(_ROLES)}) and a content, not {dict(message)!r:.80}")
    if not messages or messages[-1]["role"] != "user":
        raise OptionError("the last message must be the user's")


def _conversation(messages: Sequence[Message]) -> list[Message]:
    """All that may be left out to make room: everything but the system's messages."""
    return [m for m in messages if m["role"] != "system"]


def _text(segments: Sequence[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def _after(segments: Sequence[Segment], mark: str) -> list[Segment]:
    """What follows `mark`, which is in one of them."""
    at = next(i for i, segment in enumerate(segments) if mark in segment.text)
    rest = segments[at]._replace(text=segments[at].text.partition(mark)[2])
    return [rest, *segments[at + 1 :]]

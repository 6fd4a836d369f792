"""How a conversation becomes the text a model continues: a transcript for base models, or a chat template.

A form gives segments, each with whether it may name control tokens: what a user typed must never become one. A template
is run with what Transformers gives to templates (its docs, "Chat templates"), in a sandbox.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeAlias

from grok_local.errors import ModelError, OptionError, TemplateError

if TYPE_CHECKING:
    from grok_local.runtime.engine.protocol import Lexicon

__all__ = ["DEFAULT_SYSTEM", "ChatForm", "Message", "Segment", "Template", "Transcript", "form_for", "template_text"]

Message: TypeAlias = Mapping[str, str]

DEFAULT_SYSTEM = (
    "A conversation between a human and Grok, an assistant who answers truthfully, briefly and in plain words."
)
_NO_TEMPLATE = "none"  # what `template` may say beside a file's name
_KEY = "tokenizer.chat_template"
_SPECIAL = ("bos", "eos", "unknown", "padding", "seperator", "cls", "mask")  # as GGUF's keys spell them
_TEMPLATE_NAMES = {"unknown": "unk", "padding": "pad", "seperator": "sep"}  # what Transformers calls them
_FOLDED = "the chat template has no system role: that text goes before the first question"
_LEFT_OUT = "the chat template leaves out what is asked (--template none is without it)"
_LARGEST = 100_000  # characters or items that a product in a template may have, as many as a range in Jinja's sandbox
_PRIVATE = range(0xE000, 0xF900)  # Unicode's private use: characters that mean nothing


class Segment(NamedTuple):
    """A piece of the laid out text; `special`: the names of control tokens in it are control tokens."""

    text: str
    special: bool


class ChatForm(Protocol):
    """How messages become text that ends where the assistant's answer begins; `gap` is what stands before the answer
    then. `notes` are what the user should know, of all conversations so far; `notes_on` has those of one.
    """

    stop: tuple[str, ...]
    gap: str
    notes: list[str]

    def render(self, messages: Sequence[Message]) -> list[Segment]: ...
    def notes_on(self, messages: Sequence[Message]) -> list[str]: ...


class Transcript:
    """For base models: the speakers' names before what they say."""

    # With the empty line before a name first: it belongs to the answer as little as the name.
    stop: tuple[str, ...] = ("\n\nHuman:", "\n\nAssistant:", "\nHuman:", "\nAssistant:")
    gap: str = " "
    _names: ClassVar = {"user": "Human", "assistant": "Assistant"}

    def __init__(self, *notes: str) -> None:
        self.notes = list(notes)

    def render(self, messages: Sequence[Message]) -> list[Segment]:
        """The transcript, up to the colon after the assistant's name."""
        given = [m["content"] for m in messages if m["role"] == "system"]
        turns = [f"{self._names[m['role']]}: {m['content'].strip()}" for m in messages if m["role"] != "system"]
        return [Segment("\n\n".join([*(given or [DEFAULT_SYSTEM]), *turns, "Assistant:"]), False)]

    def notes_on(self, messages: Sequence[Message]) -> list[str]:
        """Why it is a transcript, where that is not what the model has."""
        return self.notes


class Template:
    """For models with a chat template (Jinja). `tokens` are names such as bos_token, with their texts; `control` gives
    the names of all control tokens, when they are first needed. The constructor raises ModelError.
    """

    stop: tuple[str, ...] = ()
    gap: str = ""

    def __init__(
        self, source: str, *, tokens: Mapping[str, str] | None = None, control: Callable[[], Sequence[str]] = tuple
    ) -> None:
        self.notes: list[str] = []
        self._tokens, self._control = tokens or {}, control
        self._names: re.Pattern[str] | None = None
        self._began = time.localtime()
        self._template = _compiled(source, self.strftime_now)

    def strftime_now(self, layout: str) -> str:
        """What templates have the date from."""
        return time.strftime(layout, self._began)

    def render(self, messages: Sequence[Message]) -> list[Segment]:
        """The template's text for `messages`. Raises TemplateError where the template refuses them.

        The date is that of the conversation's first message. For a template without a system role, that text goes
        before the first question.
        """
        if sum(message["role"] != "system" for message in messages) == 1:
            self._began = time.localtime()
        taken, text = self._accepted(messages)
        mark = next((chr(code) for code in _PRIVATE if all(chr(code) not in m["content"] for m in taken)), "")
        if not mark:
            raise TemplateError("messages: every character of private use is in them: none is left to mark names")
        for roles in (("system", "user", "assistant"), ("system", "user")):
            marked = [self._marked(message, mark) if message["role"] in roles else message for message in taken]
            if marked == taken:
                return [Segment(text, True)]
            rendered = self._text(marked)
            # A template may look at the names in an answer, to take its reasoning out.
            if rendered.replace(mark, "") == text:
                break
        return list(self._segments(rendered, mark))

    def notes_on(self, messages: Sequence[Message]) -> list[str]:
        """Whether the system's text was moved, or the question left out. Raises TemplateError where the template
        refuses them.
        """
        taken, text = self._accepted(messages)
        moved, left_out = taken != list(messages), self._is_left_out(taken, text)
        return [note for note, is_true in ((_FOLDED, moved), (_LEFT_OUT, left_out)) if is_true]

    def _accepted(self, messages: Sequence[Message]) -> tuple[list[Message], str]:
        folded = _folded(messages)
        try:
            text = self._text(messages)
            # Some templates refuse a system message, and some leave it out without a word.
            if folded is None or all(m["content"].strip() in text for m in messages if m["role"] == "system"):
                return list(messages), text
        except TemplateError:
            if folded is None:
                raise
        text = self._text(folded)
        if _FOLDED not in self.notes:
            self.notes.append(_FOLDED)
        return folded, text

    def _text(self, messages: Sequence[Message]) -> str:
        """The template's text. Some templates take contents as lists of parts alone, and others leave out what they do
        not understand without a word. Raises TemplateError.
        """
        try:
            plain, error = self._rendered(messages), None
        except TemplateError as refusal:
            plain, error = "", refusal
        if error is None and not self._is_left_out(messages, plain):
            return plain
        parted = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        with suppress(TemplateError):
            text = self._rendered(parted)
            if _question(messages) in text and "[{'type'" not in text:
                return text
        if error:
            raise error
        if _LEFT_OUT not in self.notes:
            self.notes.append(_LEFT_OUT)
        return plain

    def _is_left_out(self, messages: Sequence[Message], text: str) -> bool:
        """Whether another question would have made the same text. One may be changed, as by a filter."""
        asked = _question(messages)
        if asked in text:
            return False
        last = max(place for place, message in enumerate(messages) if message["role"] == "user")
        other = {**messages[last], "content": f"{asked[::-1]} or else"}
        with suppress(TemplateError):
            return self._rendered([*messages[:last], other, *messages[last + 1 :]]) == text
        return False

    def _rendered(self, messages: Sequence[Mapping[str, Any]]) -> str:
        given = {"messages": list(messages), "add_generation_prompt": True, "tools": None, "documents": None}
        try:
            return str(self._template.render(**given, **self._tokens))
        except Exception as error:  # a template is a program, and fails as it likes
            raise TemplateError(f"the chat template does not take this conversation: {error}") from None

    def _marked(self, message: Message, mark: str) -> Message:
        """The message with `mark` inside every control token's name."""
        content = self._pattern().sub(lambda name: name[0][:1] + mark + name[0][1:], message["content"])
        return message if content == message["content"] else {**message, "content": content}

    def _segments(self, text: str, mark: str) -> Iterator[Segment]:
        """The text cut into the template's own control tokens, with what lies between them, and what was forged."""
        ready = at = 0
        for run in [*self._pattern().finditer(text), None]:
            end = run.start() if run else len(text)
            if mark in text[at:end]:
                if at > ready:
                    yield Segment(text[ready:at], True)
                yield Segment(text[at:end].replace(mark, ""), False)
                ready = end
            at = run.end() if run else end
        if at > ready:
            yield Segment(text[ready:at], True)

    def _pattern(self) -> re.Pattern[str]:
        if self._names is None:
            names = sorted(filter(None, self._control()), key=len, reverse=True)
            self._names = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        return self._names


def form_for(engine: Lexicon, template: str | None) -> ChatForm:
    """What `template` says: "none", a file, one of the model's own by name; by default what the model has.

    A template of the model's own that cannot be read costs a note. Raises OptionError, ModelError for a file's.
    """
    source = template_text(engine.metadata, template)
    if template not in (None, _NO_TEMPLATE):
        return _template(source, engine)
    if not source.strip():
        return Transcript()
    try:
        return _template(source, engine)
    except ModelError as error:
        return Transcript(f"{error}; the conversation is laid out as a transcript instead")


def template_text(metadata: Mapping[str, Any], template: str | None) -> str:
    """The template that `template` means to a model, empty for the transcript. Raises OptionError."""
    own = _own_templates(metadata)
    if template == _NO_TEMPLATE:
        return ""
    if template is None:
        return own.get("default") or next(iter(own.values()), "")
    return own.get(template) or _read_template(template, own)


def _own_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """By name; the one that has none is the "default"."""
    listed = metadata.get(f"{_KEY}s")
    names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    named = {name: metadata.get(f"{_KEY}.{name}") for name in names}
    known = {"default": metadata.get(_KEY, named.get("default")), **{n: t for n, t in named.items() if n != "default"}}
    return {name: text for name, text in known.items() if isinstance(text, str)}


def _read_template(name: str, own: Mapping[str, str]) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        known = ", ".join([_NO_TEMPLATE, *own, "or a file with a Jinja template"])
        raise OptionError(f"template {name}: cannot be read ({reason}); give {known}") from None


def _template(source: str, engine: Lexicon) -> Template:
    tokens = {f"{_TEMPLATE_NAMES.get(name, name)}_token": engine.special_text(name) for name in _SPECIAL}
    return Template(source, tokens=tokens, control=engine.control_names)


def _question(messages: Sequence[Message]) -> str:
    return next((m["content"].strip() for m in reversed(messages) if m["role"] == "user"), "")


def _folded(messages: Sequence[Message]) -> list[Message] | None:
    """The same with the system's texts before the first question; None where there is nothing to fold."""
    system = [m["content"] for m in messages if m["role"] == "system"]
    rest = [m for m in messages if m["role"] != "system"]
    if not (system and rest and rest[0]["role"] == "user"):
        return None
    return [{**rest[0], "content": "\n\n".join([*system, rest[0]["content"]])}, *rest[1:]]


# -- what Transformers gives to templates ------------------------------------------------------------------------------


def _compiled(source: str, strftime_now: Callable[[str], str]) -> Any:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(Extension):
        """Blocks that mark what a model is trained on; of no meaning here. What one sets ends with it."""

        def __init__(self, environment: Any) -> None:
            super().__init__(environment)
            self.tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

        def _inside(self, caller: Callable[[], str]) -> str:
            return caller()

    class Sandbox(ImmutableSandboxedEnvironment):
        """Nor does a template get all memory by multiplying, or raising to a power."""

        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [len(value) if hasattr(value, "__len__") else abs(value) for value in (left, right)]
            if operator == "**" or any(hasattr(value, "__len__") for value in (left, right)):
                _require_small(*sizes)
            return super().call_binop(context, operator, left, right)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = strftime_now
    try:
        return environment.from_string(source)
    except (TemplateError, RecursionError, ValueError) as error:
        raise ModelError(f"the chat template cannot be read: {error}") from None


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes what HTML would take for markup."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _require_small(first: float, second: float) -> None:
    if first * second > _LARGEST:
        raise ValueError(f"{first} times {second} is more than a template may make")


def _refuse(message: str) -> None:
    raise ValueError(message)

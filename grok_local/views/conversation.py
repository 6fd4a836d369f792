"""The conversation on the screen: reads lines, streams answers, obeys /commands."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grok_local.errors import ContextError, GrokLocalError, ModelError, OutputError, TemplateError, WorkerLost
from grok_local.library import names
from grok_local.units import printable
from grok_local.views.speeds import experts_line, stats_line
from grok_local.views.terminal import dimmed, edited_lines, wrapped, wrapped_words

if TYPE_CHECKING:
    from grok_local.runtime.text.chat import ChatReply
    from grok_local.runtime.text.model import Model
    from grok_local.runtime.text.reply import Reply
    from grok_local.runtime.text.session import Session

__all__ = ["Repl", "interruptible"]

_HELP = """/help           this list
/reset          forget the conversation
/undo           take back the last question and its answer
/system [TEXT]  show or set what the model is told first
/stats          tokens and time so far
/save FILE      write the conversation to FILE
/exit           leave (or Ctrl-D)
Ctrl-C ends an answer; Alt-Enter starts a new line."""


class Repl:
    """One conversation with `model`. Answers go to stdout, everything about them to stderr.

    Without a terminal every one of `lines` is a question, and only what is a command for certain is one. `quiet` leaves
    out all but answers and errors. A `session` is gone on with, and kept.
    """

    def __init__(
        self,
        model: Model,
        *,
        name: str,
        system: str | None,
        options: dict[str, Any],
        lines: Iterable[str],
        quiet: bool = False,
        session: Session | None = None,
    ) -> None:
        self.model = model
        self.system = system if system is not None or session is None else session.system
        self.turns: list[dict[str, str]] = session.messages if session else []
        self._session = session
        self._name, self._options, self._quiet = name, options, quiet
        self._replies: list[Reply] = []
        self._told_dropped = 0
        self._told: set[str] = set()
        self._asked = self._failed = 0
        self._interactive = sys.stdin.isatty() and sys.stderr.isatty()
        self._source = edited_lines(self._greeting(), list(self._commands())) if self._interactive else iter(lines)

    def run(self) -> None:
        """Until /exit or the end of the input. Raises GrokLocalError if questions of a script were not answered."""
        with self._keeping():
            for number, line in enumerate(self._source, 1):
                text = line.strip()
                if text in ("/exit", "/quit"):
                    break
                if self._is_command(text):
                    self._command(text)
                elif text:
                    with interruptible(self.model):
                        self._answer(text, number)
        if self._failed and not self._interactive:
            raise GrokLocalError(f"{self._failed} of {self._asked} questions were not answered")

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """The session, if there is one, has in the end what was said and what the model has read of it."""
        try:
            yield
        except BaseException:
            try:
                self._keep_all()
            except OutputError as error:
                _say(f"error: {error}")
            except GrokLocalError:  # of a model that has died: what it died of is told
                pass
            raise
        self._keep_all()

    def _keep_all(self) -> None:
        self._keep()
        if self._session and self.turns:
            self._session.keep_state()

    def _keep(self) -> None:
        if self._session:
            self._session.keep(self.turns, self.system)

    def _is_command(self, text: str) -> bool:
        """At a terminal a mistyped command is no question; in a script a path may begin with a slash too."""
        return text.startswith("/") and (self._interactive or text.partition(" ")[0] in self._commands())

    def _greeting(self) -> str:
        if self._quiet:
            return ""
        title = f"{names.shown_name(self.model.path)} ({self.model.metadata.get('general.name', 'no name')})"
        greeting = names.manner_of(self._name).greeting or title
        count = sum(math.prod(tensor.shape) for header in self.model.engine.headers for tensor in header.tensors)
        shown = printable(greeting.replace("{parameters}", f"{count / 1e6:.0f} million"))
        return f"{shown}; {self.model.context_size} tokens of context. /help lists the commands."

    def _answer(self, text: str, number: int) -> None:
        self._asked += 1
        question = {"role": "user", "content": text}
        system = [{"role": "system", "content": self.system}] if self.system else []
        try:
            reply = self.model.chat([*system, *self.turns, question], **self._options)
        except (ContextError, ModelError, TemplateError) as error:  # of this question: the conversation goes on
            self._failed += 1
            _say(f"error: {'' if self._interactive else f'line {number}: '}{error}")
            return
        self._tell(reply)
        with wrapped_words() as write:
            for piece in reply:
                write(piece)
        print(flush=True)
        self.turns += [question, {"role": "assistant", "content": reply.text}]
        self._replies.append(reply)
        self._keep()
        self._note(stats_line(reply))
        if reply.finish_reason == "interrupted" and not self._interactive:
            raise KeyboardInterrupt

    def _tell(self, reply: ChatReply) -> None:
        for note in set(reply.notes) - self._told:
            self._note(f"({note})")
        self._told |= set(reply.notes)
        if reply.dropped_messages > self._told_dropped:
            self._note(f"(the context is full: the oldest {reply.dropped_messages} messages are left out from here on)")
        self._told_dropped = reply.dropped_messages

    def _command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        command = self._commands().get(name)
        if command is None:
            _say(f"no command {name}; /help lists them")
            return
        command(argument.strip())

    def _commands(self) -> dict[str, Callable[[str], None]]:
        return {
            "/help": lambda _: _say(_HELP),
            "/reset": self._reset,
            "/undo": self._undo,
            "/system": self._set_system,
            "/stats": self._show_stats,
            "/save": self._save,
            "/exit": lambda _: None,
            "/quit": lambda _: None,
        }

    def _reset(self, _: str) -> None:
        self.turns.clear()
        self._told_dropped = 0
        self._keep()
        _say("(forgotten)")

    def _undo(self, _: str) -> None:
        if not self.turns:
            _say("(nothing to take back)")
            return
        question = self.turns[-2]["content"]
        del self.turns[-2:]
        self._keep()
        _say(f"(taken back: {question})")

    def _set_system(self, text: str) -> None:
        if text:
            self.system = text
        _say(f"(system: {self.system or 'the default'})")

    def _show_stats(self, _: str) -> None:
        stats = [reply.stats for reply in self._replies]
        evaluated, generated = sum(s.evaluated_tokens for s in stats), sum(s.generated_tokens for s in stats)
        seconds = sum(s.generation_seconds for s in stats)
        speed = f", {generated / seconds:.2f} tok/s" if seconds else ""
        used = len(self.model.engine.cached[0])
        _say(f"({len(stats)} answers: {evaluated} prompt tokens evaluated, {generated} generated{speed}; ")
        _say(f" {used} of {self.model.context_size} tokens of context in use)")
        self._show_experts()

    def _show_experts(self) -> None:
        stats = [reply.stats for reply in self._replies]
        for what, parts, tokens in (
            ("prompts", [s.prompt_experts for s in stats], sum(s.evaluated_tokens for s in stats)),
            ("generating", [s.generation_experts for s in stats], sum(s.generated_tokens for s in stats)),
        ):
            found = [part for part in parts if part]
            if found and tokens:
                _say(f"({what}: {experts_line(sum(found[1:], found[0]), tokens)})")

    def _save(self, name: str) -> None:
        if not name:
            _say("/save needs a file's name")
            return
        speakers = {"user": "Human", "assistant": "Assistant"}
        text = "\n\n".join(f"{speakers[turn['role']]}: {turn['content']}" for turn in self.turns)
        try:
            path = Path(name).expanduser()
            if path.exists() and not self._may_replace(path):
                _say("(not saved)")
                return
            path.write_text(text + "\n", encoding="utf-8", errors="replace")
        except (OSError, RuntimeError, ValueError) as error:  # no such user, a name no file can have
            _say(f"error: {name}: cannot be written ({error})")
            return
        _say(f"(saved to {name})")

    def _may_replace(self, path: Path) -> bool:
        _say(f"{path} exists: replace it? (y or n)")
        return self._interactive and next(self._source, "").strip().lower() in ("y", "yes")

    def _note(self, text: str) -> None:
        if not self._quiet:
            print(dimmed(wrapped(text, sys.stderr)), file=sys.stderr, flush=True)


@contextmanager
def interruptible(model: Model) -> Iterator[None]:
    """Ctrl-C ends the answer under way instead of the program."""
    before = signal.signal(signal.SIGINT, lambda *_: model.interrupt())
    try:
        yield
    except WorkerLost as error:
        if not model.engine.interrupted:
            raise
        _say(f"error: {error}")  # it never answered, and the user gave it up
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)


def _say(text: str) -> None:
    print(wrapped(text, sys.stderr) if "\n" not in text else text, file=sys.stderr, flush=True)

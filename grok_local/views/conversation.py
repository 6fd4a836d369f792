"""The conversation on the screen: reads lines, streams answers, obeys /commands."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grok_local import folders
from grok_local.errors import ContextError, WorkerLost
from grok_local.library import names
from grok_local.units import format_bytes

if TYPE_CHECKING:
    from grok_local.runtime.experts.waiting import ExpertStats
    from grok_local.runtime.text.model import Model
    from grok_local.runtime.text.reply import Reply, Stats

__all__ = ["Repl", "interruptible", "stats_line"]

_HELP = """/help           this list
/reset          forget the conversation
/undo           take back the last question and its answer
/system [TEXT]  show or set what the model is told first
/stats          tokens and time so far
/save FILE      write the conversation to FILE
/exit           leave (or Ctrl-D)
Ctrl-C ends an answer; Alt-Enter starts a new line."""


class Repl:
    """One conversation with `model`. Answers go to stdout, everything about them to stderr."""

    def __init__(self, model: Model, *, name: str, system: str | None, options: dict[str, Any]) -> None:
        self.model = model
        self._name = name
        self.system = system
        self.turns: list[dict[str, str]] = []
        self._options = options
        self._replies: list[Reply] = []
        self._told_dropped = 0
        self._interactive = sys.stdin.isatty() and sys.stderr.isatty()

    def run(self) -> None:
        """Until /exit or the end of the input."""
        for line in _edited_lines(self._greeting()) if self._interactive else sys.stdin:
            text = line.strip()
            if text in ("/exit", "/quit"):
                return
            if text.startswith("/"):
                self._command(text)
            elif text:
                with interruptible(self.model):
                    self._answer(text)

    def _greeting(self) -> str:
        name = names.manner_of(self._name).greeting or self.model.metadata.get("general.name", self.model.path.name)
        return f"{name}, {self.model.context_size} tokens of context. /help lists the commands."

    def _answer(self, text: str) -> None:
        question = {"role": "user", "content": text}
        system = [{"role": "system", "content": self.system}] if self.system else []
        try:
            reply = self.model.chat([*system, *self.turns, question], **self._options)
        except ContextError as error:
            if not self._interactive:
                raise
            _say(f"error: {error}")
            return
        if reply.dropped_messages > self._told_dropped:
            _say(f"(the context is full: the oldest {reply.dropped_messages} messages are left out from here on)")
        self._told_dropped = reply.dropped_messages
        for piece in reply:
            print(piece, end="", flush=True)
        print(flush=True)
        self.turns += [question, {"role": "assistant", "content": reply.text}]
        self._replies.append(reply)
        _say(stats_line(reply))
        if reply.finish_reason == "interrupted" and not self._interactive:
            raise KeyboardInterrupt

    def _command(self, line: str) -> None:
        name, _, argument = line[1:].partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: _say(_HELP),
            "reset": self._reset,
            "undo": self._undo,
            "system": self._set_system,
            "stats": self._show_stats,
            "save": self._save,
        }
        if name not in commands:
            _say(f"no command /{name}; /help lists them")
            return
        commands[name](argument.strip())

    def _reset(self, _: str) -> None:
        self.turns.clear()
        self._told_dropped = 0
        _say("(forgotten)")

    def _undo(self, _: str) -> None:
        if not self.turns:
            _say("(nothing to take back)")
            return
        question = self.turns[-2]["content"]
        del self.turns[-2:]
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
        used = len(self.model.engine.cached)
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
        names = {"user": "Human", "assistant": "Assistant"}
        text = "\n\n".join(f"{names[turn['role']]}: {turn['content']}" for turn in self.turns)
        try:
            Path(name).expanduser().write_text(text + "\n", encoding="utf-8", errors="replace")
        except (OSError, RuntimeError, ValueError) as error:  # no such user, a name no file can have
            _say(f"error: {name}: cannot be written ({error})")
            return
        _say(f"(saved to {name})")


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


def experts_line(experts: ExpertStats, tokens: int) -> str:
    """What streaming took, in words."""
    return (
        f"{format_bytes(experts.bytes_read)} of experts read, {format_bytes(round(experts.bytes_read / tokens))} a "
        f"token; {experts.hit_rate:.0%} were in memory; {experts.wait_seconds:.1f} s waiting for the disk, "
        f"{experts.compute_seconds:.1f} s computing"
    )


def stats_line(reply: Reply) -> str:
    """Tokens and speed of one answer."""
    stats = reply.stats
    reason = {
        "stop": "",
        "length": ", cut at --max-tokens",
        "context": ", context full",
        "interrupted": ", interrupted",
    }
    return (
        f"[{stats.generated_tokens} tokens, {stats.generation_speed:.2f} tok/s; prompt {stats.evaluated_tokens} new"
        f" + {stats.cached_tokens} cached, {stats.prompt_seconds:.2f} s{_streamed(stats)}"
        f"{reason[reply.finish_reason or 'interrupted']}]"
    )


def _streamed(stats: Stats) -> str:
    experts, tokens = stats.generation_experts, stats.generated_tokens
    if not (experts and tokens):
        return ""
    return f"; {format_bytes(round(experts.bytes_read / tokens))} read a token, {experts.hit_rate:.0%} hits"


def _edited_lines(greeting: str) -> Iterator[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.output import create_output

    _say(greeting)
    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    history = folders.home() / "history"
    try:
        history.parent.mkdir(parents=True, exist_ok=True)
        store: Any = FileHistory(str(history))
        history.touch()
    except OSError:
        store = InMemoryHistory()
    session: PromptSession[str] = PromptSession(
        "> ", history=store, key_bindings=keys, output=create_output(sys.stderr)
    )
    while True:
        try:
            yield session.prompt()
        except KeyboardInterrupt:
            _say("(Ctrl-D or /exit to leave)")
        except EOFError:
            return


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

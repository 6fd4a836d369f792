"""What an answer may be asked to be like: its length and end, its form, and how its tokens are chosen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from grok_local.errors import OptionError
from grok_local.runtime.engine.sampling import Sampling
from grok_local.runtime.scheduling.generation import Request
from grok_local.runtime.text.structure import Structure, structure_of
from grok_local.units import whole_number

if TYPE_CHECKING:
    from grok_local.runtime.engine.sampling import SamplingOptions

__all__ = ["AnswerOptions", "Answering", "answering"]


class AnswerOptions(TypedDict, total=False):
    """Keyword arguments of `Model.generate` and `Model.chat` beside those of sampling; each may be left out."""

    max_tokens: int | None
    stop: str | Sequence[str]
    logprobs: int | None
    schema: Any
    regex: str | None
    choice: Sequence[str] | None
    grammar: str | None


@dataclass(frozen=True)
class Answering:
    """How prompts are to be continued."""

    sampling: Sampling
    max_tokens: int | None
    stop: tuple[str, ...]
    structure: Structure | None
    likely: int | None

    def request(self, prompt: Sequence[int], *, strip: bool = False, stop: Sequence[str] = ()) -> Request:
        """To continue a prompt; `stop` are further texts to end at, which a form does without. Raises OptionError."""
        return Request(
            tuple(prompt),
            self.sampling,
            self.max_tokens,
            stop=self.stop if self.structure else (*stop, *self.stop),
            grammar=self.structure.grammar if self.structure else None,
            strip=strip and self.structure is None,
            likely=self.likely,
        )


def answering(given: AnswerOptions, sampling: SamplingOptions) -> Answering:
    """As the keyword arguments of `Model.generate` say. Raises OptionError, TypeError for unknown names."""
    stop = given.get("stop", ())
    stops = [stop] if isinstance(stop, str) else list(stop) if isinstance(stop, Iterable) else [stop]
    if not all(isinstance(text, str) and text for text in stops):
        raise OptionError(f"stop {stop!r:.60}: a text or a list of texts is wanted, none of them empty")
    limit = given.get("max_tokens")
    limit = None if limit is None else whole_number("max_tokens", limit)
    form: Any = {name: given.get(name) for name in ("schema", "regex", "choice", "grammar")}
    structure = structure_of(form)
    if structure and stops:
        raise OptionError("stop: an answer in a given form ends where the form does: leave one of the two out")
    return Answering(
        Sampling(**sampling), None if limit == -1 else limit, tuple(stops), structure, given.get("logprobs")
    )

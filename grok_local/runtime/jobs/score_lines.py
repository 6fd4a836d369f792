"""Lines to score, and what is said of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from grok_local.errors import ContextError, OptionError
from grok_local.runtime.jobs.lines import Line, error_of, text_of, texts_of

if TYPE_CHECKING:
    from grok_local.runtime.text.model import Model
    from grok_local.runtime.text.scoring import Score

__all__ = ["FIELDS", "scored"]

FIELDS = ("id", "text", "tokens", "prompt", "continuation", "choices")


def scored(model: Model, line: Line) -> dict[str, Any]:
    """A line's result, {"id", ...}: a text's or continuation's tokens and log-probabilities, and their sum; of choices
    each one's, and which is likeliest, by sum (`best`) and by sum over characters (`best_by_length`). Or its error.

    Raises what is no line's fault: that the model, a worker or a record of routing failed.
    """
    try:
        if line.error:
            raise OptionError(line.error)
        return {"id": line.id, **_result(model, line)}
    except (OptionError, ContextError) as error:
        return error_of(line, error)


def _result(model: Model, line: Line) -> Mapping[str, Any]:
    given = {name for name, value in line.fields.items() if value is not None}
    if given == {"text"}:
        return _whole(model.score([text_of(line, "text")])[0])
    if given == {"tokens"}:
        return _whole(model.score([_ids(line)])[0])
    if given == {"prompt", "continuation"}:
        return _described(model.score([_words(line, "prompt")], choices=[_words(line, "continuation")])[0][0])
    if given == {"prompt", "choices"}:
        choices = texts_of(line, "choices")
        return _compared(choices, model.score([_words(line, "prompt")], choices=choices)[0])
    raise OptionError('wanted: "text", "tokens", "prompt" and "continuation", or "prompt" and "choices"')


def _words(line: Line, name: str) -> str:
    """A text that has something to be scored after, or to score. Raises OptionError."""
    text = text_of(line, name)
    if not text:
        raise OptionError(f"{name}: it is empty")
    return text


def _ids(line: Line) -> list[int]:
    ids = line.fields["tokens"]
    if not (isinstance(ids, list) and all(type(token) is int for token in ids)):
        raise OptionError("tokens: a list of token ids is wanted")
    return ids


def _whole(score: Score) -> dict[str, Any]:
    if len(score.tokens) < 2:
        raise OptionError("nothing to score: a text's first token has no probability, and there is no second")
    return _described(score)


def _described(score: Score) -> dict[str, Any]:
    return {"tokens": score.tokens, "logprobs": score.logprobs, "sum": score.total}


def _compared(choices: list[str], scores: list[Score]) -> dict[str, Any]:
    totals = [score.total for score in scores]
    shares = [total / len(choice) for total, choice in zip(totals, choices, strict=True)]
    results = [{"text": choice, **_described(score)} for choice, score in zip(choices, scores, strict=True)]
    return {"choices": results, "best": _highest(totals), "best_by_length": _highest(shares)}


def _highest(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)

"""How results are told in OpenAI's shapes: whole, and piece by piece.

Sources: OpenAI's openapi document: CreateCompletionResponse, CreateChatCompletionResponse and its stream's, Batch's
BatchRequestOutput; `prompt_logprobs` and `stop_reason` are as vLLM has them.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grok_local.runtime.jobs.openai import CHAT, Inquiry

if TYPE_CHECKING:
    from grok_local.runtime.scheduling.generation import FinishReason, Stats
    from grok_local.runtime.text.batch import Result
    from grok_local.runtime.text.reply import TokenLogprob

__all__ = ["Head", "StreamedPiece", "blamed", "body_of", "chunk_of", "error_body", "usage_chunk"]

_FIELD = re.compile(r"'?(\w+)'?[ :\[]")
_LOWEST = -9999.0  # what OpenAI writes for no chance at all, which JSON has no number for


@dataclass(frozen=True)
class Head:
    """What every part of an answer begins with; `created` is in unix seconds."""

    id: str
    created: int
    model: str
    fingerprint: str


@dataclass(frozen=True)
class StreamedPiece:
    """A piece of choice number `index` of a stream: its text, and its tokens where they have log-probabilities.

    `offset` counts the characters of the choice before it. Of a choice's first piece `prompt` are the prompt's tokens
    where those have log-probabilities.
    """

    index: int
    text: str
    tokens: Sequence[TokenLogprob] | None = None
    offset: int = 0
    is_first: bool = False
    finish_reason: FinishReason | None = None
    stopped_by: str | None = None
    prompt: Sequence[TokenLogprob] | None = None
    is_last: bool = False


def body_of(inquiry: Inquiry, results: Sequence[Result], head: Head) -> dict[str, Any]:
    """A response's body, of the results of an inquiry's tasks, in their order."""
    told = [result for prompt in _by_prompt(inquiry, results) for result in _best(prompt, inquiry.choices)]
    tell = _chat_choice if inquiry.url == CHAT else _text_choice
    stats = [result.stats for result in results]
    usage = usage_of(stats, tries=inquiry.tries, is_prompt_only=inquiry.is_prompt_only)
    body = {**_head(inquiry, head), "choices": [tell(inquiry, i, r) for i, r in enumerate(told)], "usage": usage}
    if inquiry.url == CHAT and "prompt_logprobs" in inquiry.body:
        body["prompt_logprobs"] = _by_place(inquiry, told[0].prompt_logprobs)
    return body | ({"warnings": list(inquiry.warnings)} if inquiry.warnings else {})


def chunk_of(inquiry: Inquiry, piece: StreamedPiece, head: Head) -> dict[str, Any]:
    """A chunk of a stream."""
    tell = _chat_delta if inquiry.url == CHAT else _text_delta
    reason = _reason(piece.finish_reason) if piece.is_last else None
    choice = {"index": piece.index, **tell(inquiry, piece), "finish_reason": reason}
    if piece.is_last:
        choice |= _ending(piece.finish_reason, piece.stopped_by)
    chunk = {**_head(inquiry, head, "chat.completion.chunk"), "choices": [choice]}
    if piece.is_first and piece.index == 0 and inquiry.warnings:
        chunk["warnings"] = list(inquiry.warnings)
    return chunk | ({"usage": None} if inquiry.has_usage else {})


def usage_chunk(inquiry: Inquiry, stats: Sequence[Stats], head: Head) -> dict[str, Any]:
    """The last chunk of a stream that is to say what it took."""
    usage = usage_of(stats, tries=inquiry.tries, is_prompt_only=inquiry.is_prompt_only)
    return {**_head(inquiry, head, "chat.completion.chunk"), "choices": [], "usage": usage}


def usage_of(stats: Sequence[Stats], *, tries: int, is_prompt_only: bool = False) -> dict[str, Any]:
    """What was read and written; a prompt counts once, however often it was answered."""
    prompt = sum(one.prompt_tokens for one in stats[::tries])
    cached = sum(one.cached_tokens for one in stats[::tries])
    answers = 0 if is_prompt_only else sum(one.generated_tokens for one in stats)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answers,
        "total_tokens": prompt + answers,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def error_body(
    message: str, *, code: str | None = None, type: str = "invalid_request_error", param: str | None = None
) -> dict[str, Any]:
    """What a request that failed is answered."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def blamed(error: Exception, body: Any, *, required: Collection[str] = ()) -> str | None:
    """The field of a body that a message is about, which it begins with: one that is there, or that has to be."""
    found = _FIELD.match(str(error))
    return found[1] if found and isinstance(body, Mapping) and found[1] in {*body, *required} else None


def _head(inquiry: Inquiry, head: Head, kind: str = "chat.completion") -> dict[str, Any]:
    return {
        "id": head.id,
        "object": kind if inquiry.url == CHAT else "text_completion",
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.fingerprint,
    }


def _by_prompt(inquiry: Inquiry, results: Sequence[Result]) -> list[Sequence[Result]]:
    return [results[start : start + inquiry.tries] for start in range(0, len(results), inquiry.tries)]


def _best(results: Sequence[Result], count: int) -> Sequence[Result]:
    """Those with the highest log-probability a token, as OpenAI chooses them."""
    if len(results) == count:
        return results
    return sorted(results, key=_mean, reverse=True)[:count]


def _mean(result: Result) -> float:
    values = [token.logprob for token in result.logprobs or ()]
    return sum(values) / len(values) if values else _LOWEST


def _reason(reason: FinishReason | None) -> str | None:
    """OpenAI's word: an answer that was cut off by whatever limit has `length`."""
    return "length" if reason in ("context", "interrupted") else reason


def _ending(reason: FinishReason | None, stopped_by: str | None) -> dict[str, Any]:
    """Why it ended in finer words than OpenAI's."""
    return {"stop_reason": stopped_by, "ended_by": "deadline" if reason == "interrupted" else reason}


# -- choices -----------------------------------------------------------------------------------------------------------


def _chat_choice(inquiry: Inquiry, index: int, result: Result) -> dict[str, Any]:
    tokens = _tokens(inquiry, result.logprobs)
    message = {"role": "assistant", "content": "" if inquiry.is_prompt_only else result.text, "refusal": None}
    return {
        "index": index,
        "message": message,
        "logprobs": None if tokens is None else _chat_logprobs(tokens),
        "finish_reason": _finish(inquiry, result),
        **_ending(result.finish_reason, result.stopped_by),
    }


def _text_choice(inquiry: Inquiry, index: int, result: Result) -> dict[str, Any]:
    tokens, prompt = _tokens(inquiry, result.logprobs), result.prompt_logprobs if inquiry.body.get("echo") else None
    text = result.prompt + ("" if inquiry.is_prompt_only else result.text)
    choice = {
        "index": index,
        "text": text,
        "logprobs": None
        if tokens is None
        else _legacy(inquiry, [*(prompt or ()), *tokens], 0, begins=prompt is not None),
        "finish_reason": _finish(inquiry, result),
        **_ending(result.finish_reason, result.stopped_by),
    }
    if "prompt_logprobs" in inquiry.body:
        choice["prompt_logprobs"] = _by_place(inquiry, result.prompt_logprobs)
    return choice


def _finish(inquiry: Inquiry, result: Result) -> str | None:
    return "length" if inquiry.is_prompt_only else _reason(result.finish_reason)


def _tokens(inquiry: Inquiry, tokens: Sequence[TokenLogprob] | None) -> Sequence[TokenLogprob] | None:
    """Those that are told: of an inquiry that wants none of the answer, and of one that wants no log-probabilities,
    there are some all the same.
    """
    if inquiry.likely is None or tokens is None:
        return None
    return [] if inquiry.is_prompt_only else tokens


def _chat_delta(inquiry: Inquiry, piece: StreamedPiece) -> dict[str, Any]:
    delta: dict[str, Any] = {"role": "assistant"} if piece.is_first else {}
    if piece.text or piece.is_first:
        delta["content"] = piece.text
    tokens = _tokens(inquiry, piece.tokens)
    return {"delta": delta, "logprobs": _chat_logprobs(tokens) if tokens else None}


def _text_delta(inquiry: Inquiry, piece: StreamedPiece) -> dict[str, Any]:
    tokens = _tokens(inquiry, piece.tokens)
    all_of_it = [*(piece.prompt or ()), *(tokens or ())]
    begins = piece.prompt is not None
    likely = _legacy(inquiry, all_of_it, piece.offset, begins=begins) if tokens is not None and all_of_it else None
    return {"text": piece.text, "logprobs": likely}


# -- log-probabilities -------------------------------------------------------------------------------------------------


def _chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {"content": [_token(token) for token in tokens], "refusal": None}


def _token(token: TokenLogprob) -> dict[str, Any]:
    top = [_likely(id_, piece, value) for id_, piece, value in token.top]
    return {**_likely(token.token, token.piece, token.logprob), "top_logprobs": top}


def _likely(id_: int, piece: bytes, value: float) -> dict[str, Any]:
    return {"token": _shown(id_, piece), "logprob": max(value, _LOWEST), "bytes": list(piece)}


def _legacy(inquiry: Inquiry, tokens: Sequence[TokenLogprob], offset: int, *, begins: bool) -> dict[str, Any]:
    """The older shape. `begins`: the first is the prompt's first token, of which nothing can be told."""
    count = inquiry.likely or 0
    values: list[float | None] = [max(token.logprob, _LOWEST) for token in tokens]
    tops: list[dict[str, float] | None] = [_rivals(token, count) for token in tokens]
    if begins:
        values[0] = tops[0] = None
    return {
        "tokens": [_shown(token.token, token.piece) for token in tokens],
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": _offsets(tokens, offset),
    }


def _rivals(token: TokenLogprob, count: int) -> dict[str, float]:
    """The likeliest by their texts, and always the chosen token. Where two have one text, the second has its id."""
    found: dict[str, float] = {}
    for id_, piece, value in ((token.token, token.piece, token.logprob), *token.top[:count]):
        text = _shown(id_, piece)
        if text in found and id_ != token.token:
            text = _numbered(id_)
        found[text] = max(value, _LOWEST)
    return found


def _offsets(tokens: Sequence[TokenLogprob], start: int) -> list[int]:
    """Where in the text each token begins: of one that ends a character, where the character does."""
    decoder, found = codecs.getincrementaldecoder("utf-8")(errors="replace"), []
    for token in tokens:
        found.append(start)
        start += len(decoder.decode(token.piece))
    return found


def _by_place(inquiry: Inquiry, tokens: Sequence[TokenLogprob] | None) -> list[dict[str, Any] | None]:
    """As vLLM tells the prompt's: nothing of the first token, and of the others the likeliest by id."""
    count = int(inquiry.body["prompt_logprobs"])
    return [_ranked(token, count) if place else None for place, token in enumerate(tokens or ())]


def _ranked(token: TokenLogprob, count: int) -> dict[str, Any]:
    ranked: list[tuple[int, int, bytes, float]] = [(token.rank, token.token, token.piece, token.logprob)]
    ranked += [(rank, *likely) for rank, likely in enumerate(token.top[:count], 1) if likely[0] != token.token]
    return {
        str(id_): {"logprob": max(value, _LOWEST), "rank": rank, "decoded_token": _shown(id_, piece)}
        for rank, id_, piece, value in ranked
    }


def _shown(id_: int, piece: bytes) -> str:
    """A token's text; where its bytes are only a part of a character, their names, so that no two are alike; and the
    number of one without text.
    """
    if not piece:
        return _numbered(id_)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _numbered(id_: int) -> str:
    return f"token_id:{id_}"

"""A model for EleutherAI's lm-evaluation-harness (lm_eval), which must be installed beside this package.

lm_eval finds it by the entry point `lm_eval.models`, from the first version on that looks at it. For versions before,
`python -m grok_local.adapters.harness` takes lm_eval's arguments and knows this model.

The harness cuts contexts from continuations by tokens, as for its Hugging Face models: scores can be compared.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from grok_local.errors import GrokLocalError, OptionError
from grok_local.library.built_in import BUILT_IN
from grok_local.library.names import load, shown_name
from grok_local.runtime.engine.sampling import log_probabilities

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from typing_extensions import Unpack

    from grok_local.placement.load_options import LoadOptions

__all__ = ["GrokLocalLM", "main"]

_BLOCK = 64  # tokens whose logits are held at once: of 131072 float32 each
_SAMPLING = {"top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "repetition_penalty": "repeat_penalty"}
_OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}  # the harness means the whole distribution where it says nothing


class _Scored(NamedTuple):
    """A request to score: all tokens but the last, of which the continuation's are from `start` on, and the last."""

    ids: list[int]
    start: int
    last: int


@register_model("grok-local")
class GrokLocalLM(TemplateLM):
    """A GGUF, scored and sampled for the harness's tasks.

    `path` is what `-m` takes, and `loading` are the options of `grok_local.load`. `prefix_token_id` is what comes
    before a text that has nothing before it: by default BOS, or EOS where there is none. Batches and devices, about
    which the harness always says something, are planned by `load`. The constructor raises as that does.
    """

    def __init__(
        self,
        path: str = BUILT_IN,
        *,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        **loading: Unpack[LoadOptions],
    ) -> None:
        super().__init__()
        self._model = load(str(path), **loading)
        self._max_gen_toks, self._prefix = max_gen_toks, prefix_token_id

    # -- what the harness asks of a model's vocabulary -----------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text, or -1."""
        return int(self._model.metadata.get("tokenizer.ggml.eos_token_id", -1))

    @property
    def prefix_token_id(self) -> int:
        """What comes before a text that has nothing before it. Raises OptionError where the model has no such token."""
        known = [token for token in (self._model.engine.bos, self.eot_token_id) if token >= 0]
        if self._prefix is None and not known:
            raise OptionError("the model has neither BOS nor EOS: give --model_args prefix_token_id=")
        return known[0] if self._prefix is None else self._prefix

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at once."""
        return self._model.context_size

    @property
    def tokenizer_name(self) -> str:
        """Raises OptionError: the harness asks for it where conversations are to be laid out, which is not done."""
        raise OptionError("--apply_chat_template: not supported: texts are scored as the task has them")

    def get_model_info(self) -> dict[str, Any]:
        """What the file of results says of the model."""
        return {"model_file": self._model.path.name, "model_name": shown_name(self._model.path)}

    def close(self) -> None:
        """Free the model."""
        self._model.close()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, after BOS where the model wants one, unless `add_special_tokens` is False."""
        return self._model.engine.tokenize(string, add_bos=add_special_tokens is not False)

    # -- scoring -------------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """The logarithm of each continuation's probability, and whether each of its tokens is the likeliest.

        What requests begin with in common, a context or a task's examples, is evaluated once. Raises OptionError for
        a continuation without tokens before anything is computed.
        """
        scored = [self._scored(*request) for request in requests]
        found = [(0.0, False)] * len(requests)
        order = sorted(range(len(requests)), key=scored.__getitem__)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Scoring") as progress:
            for (ids, start), group in groupby(order, key=lambda number: scored[number][:2]):
                numbers = list(group)
                results = self._scores(ids, start, [scored[number].last for number in numbers])
                for number, result in zip(numbers, results, strict=True):
                    found[number] = result
                    self._remember("loglikelihood", requests[number][0], result)
                progress.update(len(numbers))
        return found

    def _scored(self, text: Any, context: list[int], continuation: list[int]) -> _Scored:
        """What is too long loses its beginning."""
        if not 0 < len(continuation) <= self.max_length:
            raise OptionError(
                f"{text!r:.200}: the continuation has {len(continuation)} tokens: a context of {self.max_length} has "
                "room for 1 to as many"
            )
        *ids, last = (context + continuation)[-(self.max_length + 1) :]
        return _Scored(ids, len(ids) - len(continuation) + 1, last)

    def _scores(self, ids: list[int], start: int, lasts: Sequence[int]) -> list[tuple[float, bool]]:
        """Score `ids` from `start` on, each with every one of `lasts` behind them."""
        values: list[float] = []
        greedy, rows = True, np.empty((0, 0), np.float32)
        for at in range(start - 1, len(ids), _BLOCK):
            with self._model.alone() as engine:
                rows = engine.tail_logits(ids[: at + _BLOCK], at)
            if following := ids[at + 1 : at + 1 + len(rows)]:
                known = rows[: len(following)]
                values += log_probabilities(known, following)
                greedy = greedy and known.argmax(1).tolist() == following
        top = int(rows[-1].argmax())
        ends = [log_probabilities(rows[-1:], [last])[0] for last in lasts]
        return [(math.fsum([*values, end]), greedy and last == top) for last, end in zip(lasts, ends, strict=True)]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The logarithm of each text's probability: all its tokens, in windows of the context's size."""
        found = []
        for request in tqdm(requests, disable=disable_tqdm, desc="Scoring"):
            windows = list(self._windows(*request.args))
            found.append(math.fsum(value for value, _ in self._loglikelihood_tokens(windows, disable_tqdm=True)))
            self._remember("loglikelihood_rolling", request.args, found[-1])
        return found

    def _windows(self, text: str) -> Iterator[tuple[None, list[int], list[int]]]:
        """What the harness cuts a text into: each token once, after as many as one window has before it."""
        rolling = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
        yield from ((None, *make_disjoint_window(window)) for window in rolling)

    # -- generating ----------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to a stop string, several together. Raises OptionError for options that cannot be
        honoured, before anything is computed.
        """
        times: Counter[str] = Counter()
        tasks = []
        for context, options in (request.args for request in requests):
            tasks.append(self._task(context, options, repeat=times[context]))
            times[context] += 1
        order = sorted(range(len(tasks)), key=lambda number: tasks[number]["prompt"])
        texts = [""] * len(tasks)
        results = self._model.batch([tasks[number] for number in order])
        for result in tqdm(results, total=len(tasks), disable=disable_tqdm, desc="Generating"):
            if result.error:
                raise result.error
            number = order[result.index]
            texts[number] = result.text
            self._remember("generate_until", requests[number].args, result.text)
        return texts

    def _task(self, context: str, given: dict[str, Any], *, repeat: int) -> dict[str, Any]:
        """A request as `Model.batch` takes it."""
        options = normalize_gen_kwargs(given, self._max_gen_toks)
        limit, stop = options.pop("max_gen_toks"), options.pop("until")
        room = self.max_length - limit
        if room < 1:
            raise OptionError(f"max_gen_toks {limit}: the context has {self.max_length} tokens: give a larger context=")
        ids = self.tok_encode(context)[-room:] or [self.prefix_token_id]
        ending = {"max_tokens": limit, "stop": [text for text in stop if text]}
        return {"prompt": ids, **ending, **_sampling(options, repeat)}

    def _remember(self, kind: str, request: Any, result: Any) -> None:
        """Into the harness's --use_cache, if there is one: what is done needs not be done again after a crash."""
        if request is not None:
            self.cache_hook.add_partial(kind, request, result)


def _sampling(options: dict[str, Any], repeat: int) -> dict[str, Any]:
    """Our names for the harness's. Raises OptionError for what has none.

    The same seed would make all `repeat`s of a request alike.
    """
    sampled, beams = options.pop("do_sample"), options.pop("num_beams", 1)
    temperature, seed = options.pop("temperature", 1.0), options.pop("seed", None)
    unknown = [*(set(options) - set(_SAMPLING)), *(["num_beams"] if beams != 1 else [])]
    if unknown:
        raise OptionError(f"generation options {', '.join(sorted(unknown))}: not supported")
    named = {_SAMPLING[name]: value for name, value in options.items()}
    own = {"temperature": temperature if sampled else 0.0, "seed": None if seed is None else seed + repeat}
    return {**_OFF, **named, **own}


def main() -> None:
    """Run lm_eval's command line with this model known to it. A known failure is a line each, and its exit code."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except GrokLocalError as error:
        sys.stderr.writelines(f"error: {problem}\n" for problem in error.problems)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

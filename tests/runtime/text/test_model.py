"""The engine against the official code's logits, and what generate promises."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import grok_local
from grok_local.errors import ContextError, GGUFError, ModelError, OptionError
from grok_local.runtime.engine.sampling import Sampling
from samples.checkpoints import REFERENCE

GOLDEN = np.load(REFERENCE / "logits.npz")


@pytest.fixture(scope="module")
def exact(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[grok_local.Model]:
    """The golden checkpoint in float32, with a float32 KV cache."""
    path = grok_local.quantize_checkpoint(golden, tmp_path_factory.mktemp("f32") / "x.gguf", type="f32").path
    with grok_local.load(path, context=256, threads=2, kv_type="f32") as model:
        yield model


@pytest.mark.parametrize("number", range(sum(name.startswith("tokens") for name in GOLDEN.files)))
def test_logits_are_those_of_the_official_code(exact: grok_local.Model, number: int) -> None:
    expected = GOLDEN[f"logits{number}"]
    logits = exact.logits(GOLDEN[f"tokens{number}"].tolist())
    assert logits.shape == expected.shape
    assert logits.dtype == np.float32
    error = np.sqrt(((logits - expected) ** 2).mean(axis=1) / (expected**2).mean(axis=1))
    assert np.median(error) < 3e-3
    assert (logits.argmax(axis=1) == expected.argmax(axis=1)).mean() >= 0.95


def test_greedy_generation_follows_the_logits(exact: grok_local.Model) -> None:
    reply = exact.generate("Hello world", max_tokens=8, temperature=0)
    text = "".join(reply)
    ids = list(reply.prompt)
    for token in reply.tokens:
        assert exact.logits(ids)[-1].argmax() == token
        ids.append(token)
    assert reply.text == text
    assert exact.detokenize(ids) == "Hello world" + text
    assert reply.finish_reason == "length"


def test_the_same_seed_gives_the_same_text(model: grok_local.Model) -> None:
    def text(seed: int) -> str:
        return "".join(model.generate("Once", max_tokens=20, temperature=1.0, seed=seed))

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_only_new_tokens_of_a_prompt_are_evaluated(model: grok_local.Model) -> None:
    first = model.generate("one two three four five", max_tokens=1, temperature=0)
    list(first)
    second = model.generate("one two three four five six", max_tokens=1, temperature=0)
    list(second)
    assert first.stats.evaluated_tokens == first.stats.prompt_tokens
    assert second.stats.cached_tokens == len(first.prompt)
    assert second.stats.evaluated_tokens == len(second.prompt) - len(first.prompt)


def test_the_cache_changes_no_token(model: grok_local.Model, packed: Path) -> None:
    list(model.generate("one two three", max_tokens=30, temperature=0))
    warm = model.generate("one two three four", max_tokens=30, temperature=0)
    list(warm)
    with grok_local.load(packed, context=512, threads=2) as fresh:
        cold = fresh.generate("one two three four", max_tokens=30, temperature=0)
        list(cold)
    assert warm.tokens == cold.tokens


def test_stop_strings_end_the_text_before_them(model: grok_local.Model) -> None:
    whole = "".join(model.generate("Once", max_tokens=40, temperature=1.0, seed=1))
    stop = whole[11:15]
    reply = model.generate("Once", max_tokens=40, temperature=1.0, seed=1, stop=[stop])
    pieces = list(reply)
    assert "".join(pieces) == whole[: whole.index(stop)]
    assert reply.finish_reason == "stop"
    single = model.generate("Once", max_tokens=40, temperature=1.0, seed=1, stop=stop)
    assert list(single) == pieces


def test_the_context_is_the_limit(packed: Path) -> None:
    with grok_local.load(packed, context=64, threads=1) as model:
        room = model.context_size
        with pytest.raises(ContextError, match=r"\d+ tokens and the context"):
            model.generate("x " * (room + 10))
        with pytest.raises(ContextError):
            model.logits([5] * (room + 1))
        reply = model.generate("Hello", temperature=0)
        list(reply)
        assert reply.finish_reason in ("context", "stop")
        assert len(reply.prompt) + len(reply.tokens) <= room + 1
        with pytest.raises(OptionError, match="empty"):
            model.generate("")


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"top_k": -2},
        {"top_p": 0},
        {"min_p": 1},
        {"repeat_penalty": 0},
        {"temperature": float("inf")},
        {"repeat_penalty": 10**400},
        {"seed": -2},
        {"max_tokens": 0},
        {"max_tokens": -2},
        {"temperature": "hot"},
        {"top_k": 1.5},
        {"stop": [""]},
        {"stop": [None]},
        {"stop": 5},
    ],
)
def test_options_out_of_range(model: grok_local.Model, options: dict[str, float]) -> None:
    with pytest.raises(OptionError):
        model.generate("x", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"max_tokens": 1.5}, "whole"),
        ({"max_tokens": np.bool_(True)}, "whole"),
        ({"max_tokens": np.arange(2)}, "whole"),
        ({"logprobs": 1.5}, "whole"),
        ({"seed": np.float32(1)}, "whole"),
        ({"top_p": "1"}, "a number"),
        ({"top_p": np.bool_(True)}, "a number"),
    ],
)
def test_a_number_of_another_kind_is_named(model: grok_local.Model, options: Any, kind: str) -> None:
    uses: list[Callable[[], Any]] = [
        lambda: model.generate("x", **options),
        lambda: model.chat([{"role": "user", "content": "x"}], **options),
    ]
    for use in uses:
        with pytest.raises(OptionError, match=f"{next(iter(options))} .*: .*{kind}.* is wanted"):
            use()


def test_numbers_of_numpy_are_numbers(model: grok_local.Model) -> None:
    options = {"max_tokens": 3, "logprobs": 2, "top_k": 5, "seed": 7, "temperature": 0.5, "min_p": 0.25}
    arrays: Any = {name: np.asarray([value])[0] for name, value in options.items()}
    arrays["temperature"] = np.float32(0.5)
    (theirs,) = model.batch([{"prompt": "Once", "id": np.int64(4), **arrays}])
    (ours,) = model.batch([{"prompt": "Once", "id": 4, **options}])
    assert (theirs.text, theirs.id, theirs.error) == (ours.text, 4, None)
    sampling = Sampling(**{name: value for name, value in arrays.items() if name not in ("max_tokens", "logprobs")})
    assert {type(value) for value in vars(sampling).values()} == {int, float}


def test_misspelt_options_are_not_swallowed(model: grok_local.Model) -> None:
    with pytest.raises(TypeError, match="temprature"):
        model.generate("x", temprature=0)  # type: ignore[call-arg]


def test_a_repetition_penalty_breaks_a_loop(model: grok_local.Model) -> None:
    def distinct(penalty: float) -> int:
        reply = model.generate("a", max_tokens=40, temperature=0, repeat_penalty=penalty)
        list(reply)
        return len(set(reply.tokens))

    assert distinct(1e6) == 40 > distinct(1.0)


def test_interrupting_an_answer(model: grok_local.Model) -> None:
    reply = model.generate("Once", temperature=1.0, seed=1)
    next(reply)
    model.interrupt()
    list(reply)
    assert reply.finish_reason == "interrupted"
    after = model.generate("Once", max_tokens=3, temperature=0)
    list(after)
    assert len(after.tokens) == 3


def test_interrupting_a_prompt(golden: Path, tmp_path: Path) -> None:
    path = grok_local.quantize_checkpoint(golden, tmp_path / "x.gguf").path
    with grok_local.load(path, context=8192, threads=1) as model:
        reply = model.generate("x " * 7000, max_tokens=1)
        threading.Timer(0.3, model.interrupt).start()
        started = time.monotonic()
        assert list(reply) == []
        assert time.monotonic() - started < 3
        assert reply.finish_reason == "interrupted"


def test_files_that_are_no_model(tmp_path: Path, packed: Path) -> None:
    path = tmp_path / "x.gguf"
    with pytest.raises(GGUFError, match="no such file"):
        grok_local.load(path)
    path.write_bytes(packed.read_bytes()[:-100_000])
    with pytest.raises(GGUFError, match="truncated"):
        grok_local.load(path)
    data = packed.read_bytes().replace(b"blk.1.attn_k.weight", b"blk.1.attn_X.weight")
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"llama\.cpp cannot load it"):
        grok_local.load(path)


def test_options_of_load(packed: Path) -> None:
    for options in ({"kv_type": "q4_0"}, {"context": -1}, {"threads": 0}):
        with pytest.raises(OptionError):
            grok_local.load(packed, **options)


def test_a_closed_model_says_so(packed: Path) -> None:
    model = grok_local.load(packed, context=64, threads=1)
    model.close()
    model.close()
    with pytest.raises(ModelError, match="closed"):
        model.tokenize("x")
    with pytest.raises(ModelError, match="closed"):
        model.logits([1])
    with pytest.raises(ModelError, match="closed"), model:
        pass


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_model_is_neither_pickled_nor_copied(model: grok_local.Model, way: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="load it in each process"):
        way(model)


def test_ids_outside_the_vocabulary(model: grok_local.Model) -> None:
    for use in (model.detokenize, model.logits):
        with pytest.raises(OptionError, match="99999"):
            use([99_999])


@pytest.mark.parametrize("ids", [b"hello", bytearray(b"x"), "hello", [5.0, 6], [True], 7, None])
def test_what_is_no_list_of_token_ids(model: grok_local.Model, ids: Any) -> None:
    uses: list[tuple[Any, str]] = [(model.logits, ""), (model.detokenize, "")]
    if not isinstance(ids, str):
        uses += [
            (model.generate, "prompt: a text, or "),
            (lambda ids: model.score([ids]), "score: of each a text, or "),
        ]
        (result,) = model.batch([ids])
        assert isinstance(result.error, OptionError)
    for use, other in uses:
        with pytest.raises(OptionError, match=f"^{other}a list of token ids,? is wanted$"):
            use(ids)


def test_half_a_character_is_refused(model: grok_local.Model) -> None:
    with pytest.raises(OptionError, match="half a character at place 1"):
        model.tokenize("a\ud83d")
    (result,) = model.batch([{"prompt": "\udc00", "max_tokens": 1}])
    assert isinstance(result.error, OptionError)


def test_the_first_token_comes_with_the_prompt(model: grok_local.Model) -> None:
    reply = model.generate("Once", max_tokens=1)
    list(reply)
    assert (reply.stats.generated_tokens, reply.stats.generation_speed) == (1, 0.0)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="files are counted there")
@pytest.mark.parametrize("stream", ["on", "off"])
def test_a_model_that_nobody_has_any_more_is_freed(packed: Path, stream: Any) -> None:
    def used() -> tuple[int, int]:
        gc.collect()
        return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

    before = used()
    model = grok_local.load(packed, context=256, threads=1, stream=stream, repack="off")
    reply = model.generate("Once", max_tokens=9)
    next(reply)
    assert stream == "off" or used() > before
    del model, reply
    assert used() == before

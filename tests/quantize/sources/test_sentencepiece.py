"""The vocabulary in the GGUF gives the official ids."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
from gguf.constants import TokenType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import grok_local
from grok_local.errors import TokenizerError
from grok_local.quantize.sources.sentencepiece import SENTENCEPIECE, read_tokenizer
from samples.checkpoints import REFERENCE, Spec, write_checkpoint

GROK_1 = REFERENCE / "grok-1-tokenizer.model"
TEXTS = [json.loads(line) for line in (REFERENCE / "tokenization.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def grok_1(tmp_path_factory: pytest.TempPathFactory) -> Iterator[grok_local.Model]:
    """A model with Grok-1's vocabulary, and next to nothing else."""
    folder = tmp_path_factory.mktemp("vocabulary")
    spec = Spec(layers=1, width=128, kv_width=128, expert_width=32, vocabulary=131072, experts=2, groups=1)
    path = write_checkpoint(folder, spec, GROK_1)
    output = grok_local.quantize_checkpoint(path, folder / "x.gguf", type="q4_0").path
    with grok_local.load(output, context=64, threads=1) as model:
        yield model


def test_the_official_ids(grok_1: grok_local.Model) -> None:
    texts = [text for text in TEXTS if "<|" not in text["text"]]
    assert len(texts) > 380
    wrong = [text["text"] for text in texts if grok_1.tokenize(text["text"]) != text["ids"]]
    assert not wrong


def test_there_and_back(grok_1: grok_local.Model) -> None:
    for text in TEXTS:
        if "<|" not in text["text"]:
            assert grok_1.detokenize(grok_1.tokenize(text["text"])) == text["text"]


OFFICIAL = sentencepiece.SentencePieceProcessor(model_file=str(GROK_1))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0▁"), max_size=60))
def test_any_text(grok_1: grok_local.Model, text: str) -> None:
    if "<|" not in text:
        assert grok_1.tokenize(text) == OFFICIAL.encode(text)


def test_a_continuation_has_no_space_of_its_own(grok_1: grok_local.Model) -> None:
    for before, after in (("Hello", " world"), ("A", "\n\nHuman: hi"), ("x", "y"), ("end.", "")):
        ids = grok_1.tokenize(before) + grok_1.engine.continue_ids(after)
        assert grok_1.detokenize(ids) == before + after


def test_types() -> None:
    types = dict(zip(range(131072), read_tokenizer(GROK_1, 131072).types, strict=True))
    assert [types[i] for i in (0, 1, 2, 3)] == [TokenType.CONTROL] * 3 + [TokenType.UNKNOWN]
    assert {types[i] for i in range(4, 47)} == {TokenType.NORMAL}  # user-defined in the official model
    assert {types[i] for i in range(47, 69)} == {TokenType.CONTROL}
    assert {types[i] for i in range(69, 325)} == {TokenType.BYTE}
    assert {types[i] for i in range(325, 131072)} == {TokenType.NORMAL}


def test_plain_text_makes_no_control_token(grok_1: grok_local.Model) -> None:
    assert not set(grok_1.tokenize("a<|separator|>b[EOS]<|control3|>")) & {0, 1, 2, *range(47, 69)}


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    for data in (b"", b"hello", GROK_1.read_bytes()[:100_000], bytes(1000)):
        path.write_bytes(data)
        with pytest.raises(TokenizerError, match="xai-org/grok-1"):
            read_tokenizer(path, 131072)
    with pytest.raises(TokenizerError, match="no such"):
        SENTENCEPIECE.find(tmp_path, tmp_path / "nothing")

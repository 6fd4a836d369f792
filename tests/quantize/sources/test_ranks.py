"""Grok-2's tokenizer in the GGUF gives the ids that merging by rank gives, on texts of every kind."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf.constants import TokenType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import grok_local
from grok_local.errors import TokenizerError
from grok_local.formats.gguf_file import read_header
from grok_local.quantize.sources.ranks import CHAT_TEMPLATE, RANKS, WORD_PATTERN, read_ranks
from grok_local.runtime.text.forms import Template
from samples import byte_pairs
from samples.grok2_release import Grok2Spec, write_release

ROOT = Path(__file__).parents[3]
NARROW = Grok2Spec(layers=1, width=128, kv_width=128, expert_width=32, dense_width=32, experts=2)
SAMPLED = [(ROOT / name).read_text("utf-8") for name in ("README.md", "docs/quantize.md", "grok_local/files.py")]
TEXTS = [
    "",
    "Hello, world! It's 2025; they'RE we'Ll I'D 'S",
    "def f(x):\n\treturn  x**2   # no\r\n\r\n\n  \n",
    "١٢٣ ½²Ⅷ 12345 1,000.5",
    "Привет, мир! Γειά σου· 你好,世界。こんにちは 안녕 שלום مرحبا हिन्दी ไทย",
    "👩‍👩‍👧 🏳️‍🌈 é e\u0301 ﬁ \u200b\u00a0\u3000\u2028x",
    " \t\n a  b   \n\n   c \r\n d\u0085e",
]


def alphabet(generator: random.Random) -> str:
    """A character, of an alphabet that comes up often in the same text."""
    blocks = [(0x20, 0x7F), (0xA0, 0x250), (0x370, 0x600), (0x900, 0xE00), (0x3040, 0x3100), (0x4E00, 0x9FFF)]
    blocks += [(0x1F300, 0x1F650), (0x2000, 0x2070), (0x0, 0x21)]
    return chr(generator.randrange(*generator.choice(blocks)))


def random_text(generator: random.Random) -> str:
    kind, length = generator.randrange(4), generator.randrange(1, 50)
    if kind == 0:
        source = generator.choice(SAMPLED)
        start = generator.randrange(len(source))
        return source[start : start + 4 * length]
    if kind == 1:
        return "".join(generator.choice("abc'sStTdDlL  \n\r\t0123,.!?-_") for _ in range(length))
    if kind == 2:
        return "".join(generator.choice(" \n\r\t\u00a0\u2003\u3000\x85\x1c\u200ba1.") for _ in range(length))
    text = "".join(alphabet(generator) for _ in range(length)).replace("\0", "")
    # What is not assigned yet depends on the version of Unicode.
    return "".join(character for character in text if unicodedata.category(character) != "Cn")


def invented(generator: random.Random, size: int) -> dict[bytes, int]:
    """A vocabulary that no training made: tokens of tokens at random, of which some can only be made in other ways."""
    ranks = {bytes([byte]): 128 + byte for byte in range(256)}
    pool = [bytes([byte]) for byte in b"abcdeABst \n'01."]
    while 128 + len(ranks) < size:
        token = generator.choice(pool) + generator.choice(pool)
        if token not in ranks and len(token) < 12:
            ranks[token] = 128 + len(ranks)
            pool.append(token)
    return ranks


def packed_with(ranks: dict[bytes, int], folder: Path) -> Path:
    size = 128 + len(ranks) + 8
    spec = Grok2Spec(**{**vars(NARROW), "vocabulary": size})
    checkpoint = write_release(folder / "release", spec)
    byte_pairs.write_tokenizer(checkpoint / "tokenizer.tok.json", ranks, size)
    return grok_local.quantize_checkpoint(checkpoint, folder / "x.gguf", type="q4_0").path


@pytest.fixture(scope="module")
def trained() -> dict[bytes, int]:
    return byte_pairs.train(SAMPLED, 900)


@pytest.fixture(scope="module")
def model(trained: dict[bytes, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[grok_local.Model]:
    path = packed_with(trained, tmp_path_factory.mktemp("trained"))
    with grok_local.load(path, context=64, threads=1) as loaded:
        yield loaded


def test_two_thousand_texts(model: grok_local.Model, trained: dict[bytes, int]) -> None:
    generator = random.Random(15)
    texts = TEXTS + [random_text(generator) for _ in range(2000)]
    wrong = [text for text in texts if model.tokenize(text) != byte_pairs.encode(text, trained)]
    assert not wrong
    assert all(model.detokenize(model.tokenize(text)) == text for text in texts)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs", "Cn"], exclude_characters="\0ſ"), max_size=60))
def test_any_text(model: grok_local.Model, trained: dict[bytes, int], text: str) -> None:
    assert model.tokenize(text) == byte_pairs.encode(text, trained)


@pytest.mark.parametrize("seed", range(3))
def test_vocabularies_that_nobody_trained(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    ranks = invented(generator, 1200)
    merges = len(read_header(path := packed_with(ranks, tmp_path)).metadata["tokenizer.ggml.merges"])
    assert merges < len(ranks) - 256  # some are never made
    with grok_local.load(path, context=64, threads=1) as loaded:
        for _ in range(500):
            text = "".join(generator.choice("abcdeABst \n'01.") for _ in range(60))
            assert loaded.tokenize(text) == byte_pairs.encode(text, ranks)


def test_tiktoken_agrees(trained: dict[bytes, int]) -> None:
    """The plain encoder, which the others are compared with, against the library the release is run with."""
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not part of the development group")
    official = tiktoken.Encoding("grok-2", pat_str=WORD_PATTERN, mergeable_ranks=trained, special_tokens={})
    generator = random.Random(16)
    for text in TEXTS + [random_text(generator) for _ in range(2000)]:
        assert byte_pairs.encode(text, trained) == official.encode(text, disallowed_special=())


def test_control_tokens(model: grok_local.Model) -> None:
    text = "Human: Hi<|separator|>\n\n"
    assert 1 in model.tokenize(text, special=True)
    assert not set(model.tokenize(text + "<|pad|><|eos|><|control1|>")) & {0, 1, 2}
    assert [token for token in range(model.engine.vocabulary) if model.engine.is_end(token)] == [1, 2]
    assert model.engine.special_text("eos") == "<|eos|>"
    assert model.engine.special_text("bos") == ""


def test_metadata(model: grok_local.Model) -> None:
    metadata = model.engine.metadata
    expected = {"model": "gpt2", "pre": "grok-2", "eot_token_id": 1, "eos_token_id": 2, "padding_token_id": 0}
    assert {key: metadata[f"tokenizer.ggml.{key}"] for key in expected} == expected
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert "tokenizer.ggml.bos_token_id" not in metadata
    types = metadata["tokenizer.ggml.token_type"]
    assert {int(kind) for kind in types[:128]} == {TokenType.CONTROL}
    assert {int(kind) for kind in types[128:900]} == {TokenType.NORMAL}


def test_the_chat_template() -> None:
    messages = [
        {"role": "system", "content": " Be kind. "},
        {"role": "user", "content": "Hi\n"},
        {"role": "assistant", "content": " Hello"},
        {"role": "user", "content": "Who?"},
    ]
    text = "".join(segment.text for segment in Template(CHAT_TEMPLATE).render(messages))
    assert text == (
        "System: Be kind.<|separator|>\n\nHuman: Hi<|separator|>\n\nAssistant:  Hello<|separator|>\n\n"
        "Human: Who?<|separator|>\n\nAssistant:"
    )


def test_ids_that_nothing_has(tmp_path: Path) -> None:
    ranks = {bytes([byte]): 128 + byte for byte in range(256)}
    path = byte_pairs.write_tokenizer(tmp_path / "x", ranks, 400)
    contents = json.loads(path.read_text())
    contents["special_tokens"] = contents["special_tokens"][:3]
    path.write_text(json.dumps(contents))
    tokenizer = read_ranks(path, 400)
    assert tokenizer.types[3:128] == (TokenType.UNUSED,) * 125
    assert len(set(tokenizer.tokens)) == tokenizer.size == 400


def _with(**changes: Any) -> dict[str, Any]:
    tokens = [{"bytes": [byte], "token": 3 + byte} for byte in range(256)]
    special = [{"bytes": list(name.encode()), "token": at} for at, name in enumerate(("<|pad|>", "<|separator|>"))]
    return {"regular_tokens": tokens, "special_tokens": special, "word_split": "V1", "vocab_size": 300, **changes}


def _and(bytes: Any, token: Any) -> dict[str, Any]:
    return _with(regular_tokens=[*_with()["regular_tokens"], {"bytes": bytes, "token": token}])


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "lists no regular_tokens"),
        (" " * (33 << 20), "too large"),
        (_with(word_split="V2"), "splits words in another way"),
        (_with(pat_str=r"\w+"), "splits words in another way"),
        (_with(regular_tokens={}), "its tokens are no list"),
        (_with(regular_tokens=[7]), "7 is no token"),
        (_with(regular_tokens=[]), "has a token for 0 of the 256 bytes"),
        (_with(vocab_size=301), "has 301 tokens and the checkpoint's embedding 300 rows"),
        (_with(special_tokens=[]), "has no <|separator|>"),
        (_with(special_tokens=[{"bytes": [0, 1], "token": 1}]), "not plain text"),
        (_with(special_tokens=[{"bytes": [65], "token": 1}]), "two tokens of one id, or of one text"),
        (_and([300], 270), "token 270 is not of bytes"),
        (_and([1.0], 270), "token 270 is not of bytes"),
        (_and([], 270), "is no token"),
        (_and([65] * 2000, 270), "is no token"),
        (_and([65, 66], -1), "is no token"),
        (_and([65, 66], 300), "has token 300, and says it has 300"),
        (_and([65, 66], 1 << 70), "has token 1180591620717411303424"),
        (_and([65, 66], 3), "two tokens of one id"),
        (_and([65], 270), "two tokens of one id, or of one text"),
        (_and(list(b"<|pad|>"), 270), "two tokens of one id, or of one text"),
        (_and(list(b"<|unused280|>"), 270), "two tokens of one id, or of one text"),
    ],
)
def test_files_that_are_no_tokenizer(tmp_path: Path, contents: Any, words: str) -> None:
    path = tmp_path / "tokenizer.tok.json"
    path.write_text(contents if isinstance(contents, str) else json.dumps(contents))
    with pytest.raises(TokenizerError, match="xai-org/grok-2") as caught:
        read_ranks(path, 300)
    assert words in str(caught.value)


def test_where_it_is_looked_for(tmp_path: Path) -> None:
    folder = tmp_path / "release"
    folder.mkdir()
    with pytest.raises(TokenizerError, match=r"no tokenizer\.tok\.json in it or the folder above"):
        RANKS.find(folder, None)
    (tmp_path / "tokenizer.tok.json").touch()
    assert RANKS.find(folder, None) == tmp_path / "tokenizer.tok.json"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=5), inside, max_size=3),
    max_leaves=6,
)
TOKENS = st.lists(
    st.fixed_dictionaries({"bytes": st.lists(st.integers(0, 260), max_size=4) | JSON, "token": st.integers() | JSON}),
    max_size=4,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(regular=TOKENS | JSON, special=TOKENS | JSON, size=st.integers() | JSON, due=st.none() | st.just(300))
def test_any_contents(tmp_path: Path, regular: Any, special: Any, size: Any, due: int | None) -> None:
    path = tmp_path / "tokenizer.tok.json"
    base = _with()["regular_tokens"]
    listed = [*base, *regular] if isinstance(regular, list) else regular
    path.write_text(json.dumps(_with(regular_tokens=listed, special_tokens=special, vocab_size=size)))
    try:
        tokenizer = read_ranks(path, due)
    except TokenizerError as error:
        assert "tokenizer.tok.json" in str(error)  # noqa: PT017
    else:
        assert len(set(tokenizer.tokens)) == len(tokenizer.types) == tokenizer.size <= 1 << 20

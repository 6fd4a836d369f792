"""Prompts as scripts bring them, and questions in a pipe."""

from __future__ import annotations

import codecs
import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grok_local.commands.prompts import decoded, require_apart, unescaped
from grok_local.errors import OptionError
from samples.rewritten import CHATML, chatml, rewritten
from tests.conftest import Run

QUESTION = "What is an expert?"


def test_an_output_is_not_the_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, other, link = tmp_path / "in", tmp_path / "out", tmp_path / "link"
    source.write_text("x")
    link.hardlink_to(source)
    with source.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        for file, output in ((source, source), (source, link), (tmp_path / "." / "in", link), (Path("-"), source)):
            with pytest.raises(OptionError, match="is the input"):
                require_apart(file, output)
        for file in (source, Path("-"), tmp_path / "missing", Path("/dev/null")):
            require_apart(file, other)
            require_apart(file, None)
            require_apart(file, Path("/dev/null"))


def asked(packed: Path, *arguments: object, stdin: bytes | Any = b"", **env: str) -> subprocess.CompletedProcess[bytes]:
    options = ("-m", packed, "--context", "256", "--max-tokens", "8", "--temperature", "0", "--json")
    command = [sys.executable, "-m", "grok_local", "generate", *map(str, (*options, *arguments))]
    given: dict[str, Any] = {"input": stdin} if isinstance(stdin, bytes) else {"stdin": stdin}
    return subprocess.run(command, capture_output=True, timeout=60, env={**os.environ, **env}, check=False, **given)


def answer(done: subprocess.CompletedProcess[bytes]) -> tuple[int, str]:
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return found["prompt_tokens"], found["text"]


@pytest.fixture(scope="module")
def expected(packed: Path) -> tuple[int, str]:
    return answer(asked(packed, QUESTION))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (QUESTION.encode(), ""),
        (codecs.BOM_UTF8 + QUESTION.encode(), ""),
        (QUESTION.encode("utf-16"), ""),
        (codecs.BOM_UTF16_BE + QUESTION.encode("utf-16-be"), ""),
        (QUESTION.encode() + b"\n", "the newline at the end of the prompt is left out"),
        (QUESTION.encode() + b"\r\n", "the newline at the end of the prompt is left out"),
    ],
)
def test_the_same_text_is_the_same_prompt(
    packed: Path, expected: tuple[int, str], tmp_path: Path, data: bytes, said: str
) -> None:
    (tmp_path / "prompt.txt").write_bytes(data)
    for done in (asked(packed, "-", stdin=data), asked(packed, "-f", tmp_path / "prompt.txt")):
        assert answer(done) == expected
        assert said in done.stderr.decode()


def test_two_newlines_are_one(packed: Path, expected: tuple[int, str]) -> None:
    assert answer(asked(packed, "-", stdin=QUESTION.encode() + b"\n\n"))[0] > expected[0]


def test_bytes_that_are_no_text(packed: Path) -> None:
    done = asked(packed, "-", stdin=b"abc\xff")
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"no text in UTF-8: byte 3" in done.stderr


def test_file_then_stdin_then_argument(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one\n")
    whole = answer(asked(packed, "one\ntwo\nthree"))
    done = asked(packed, "-f", tmp_path / "a", "three", stdin=b"two\n")
    assert answer(done) == whole
    assert b"3 characters from stdin come before the prompt" in done.stderr
    assert answer(asked(packed, "-f", tmp_path / "a", "-", stdin=b"two\nthree")) == whole


def test_a_dash_is_stdin_as_a_file_too(packed: Path, expected: tuple[int, str]) -> None:
    assert answer(asked(packed, "-f", "-", stdin=QUESTION.encode())) == expected


def test_nothing_on_stdin_is_nothing(packed: Path, expected: tuple[int, str], tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with (tmp_path / "empty").open("rb") as empty:
        for stdin in (b"", subprocess.DEVNULL, empty):
            assert answer(asked(packed, QUESTION, stdin=stdin)) == expected


def test_the_input_of_a_shells_loop_is_left_alone(packed: Path, expected: tuple[int, str], tmp_path: Path) -> None:
    """while read line; do grok-local generate "$line"; done <FILE"""
    (tmp_path / "lines").write_text(f"{QUESTION}\nnext line\n")
    with (tmp_path / "lines").open("rb", buffering=0) as file:
        file.read(len(QUESTION) + 1)
        done = asked(packed, QUESTION, stdin=file)
        assert answer(done) == expected
        assert b"read in part" in done.stderr
        assert file.read() == b"next line\n"


@pytest.mark.parametrize("prompt", ["- name three experts", "--- title", "-1 + 1 =", "--max-tokens 3 is what?"])
def test_a_prompt_may_begin_with_a_dash(packed: Path, prompt: str) -> None:
    assert answer(asked(packed, prompt)) == answer(asked(packed, "--", prompt))


def test_a_word_with_a_dash_is_an_option_or_comes_after_two(packed: Path) -> None:
    done = asked(packed, "-x")
    assert done.returncode == 2
    assert b"comes after --" in done.stderr
    answer(asked(packed, "--stop=a b", "x"))
    answer(asked(packed, "--stop", "- a", "x"))


@pytest.mark.parametrize(
    ("written", "meant"),
    [(r"\n\n", "\n\n"), (r"a\tb", "a\tb"), (r"\\n", r"\n"), (r"\x", r"\x"), ("\n", "\n"), ("\\", "\\"), ("", "")],
)
def test_escapes_in_options(written: str, meant: str) -> None:
    assert unescaped(written) == meant


@given(st.text(alphabet="ab\\\n\tn"))
def test_what_is_escaped_comes_back(text: str) -> None:
    written = text.replace("\\", r"\\").replace("\n", r"\n").replace("\t", r"\t")
    assert unescaped(written) == text


def test_numbers_that_mean_no_limit_elsewhere(packed: Path) -> None:
    done = asked(packed, "--max-tokens", "-1", "--top-k", "-1", "--seed", "-1", "--context", "64", "x")
    assert json.loads(done.stdout)["finish_reason"] in ("context", "stop")


def test_json_in_any_locale(packed: Path) -> None:
    expected = answer(asked(packed, "naïve 日本"))[0]
    for env in ({"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}):
        done = asked(packed, "naïve 日本", "--stop", "ï", **env)
        assert "text" in json.loads(done.stdout.decode("ascii", "replace"))
        assert answer(done)[0] == expected


def test_what_is_typed_in_no_encoding_is_named(packed: Path) -> None:
    done = asked(packed, os.fsdecode(b"\xe9t\xe9"))
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"the command line: no text in UTF-8: byte 0" in done.stderr


# -- special tokens ----------------------------------------------------------------------------------------------------


def test_a_ready_made_prompt(packed: Path, tmp_path: Path) -> None:
    import grok_local

    path = chatml(packed, tmp_path / "chatml.gguf")
    ready = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    with grok_local.load(path, context=256) as model:
        ids = model.tokenize(ready, special=True)
        assert len(ids) < len(model.tokenize(ready))
        assert tuple(ids) == model.chat([{"role": "user", "content": "Hi"}], max_tokens=1).prompt
        assert model.generate(ready, special=True, max_tokens=1).prompt == tuple(ids)
        assert model.generate(ids, max_tokens=1).prompt == tuple(ids)
    assert answer(asked(path, "--special", ready))[0] == len(ids)


def test_bos_comes_once_and_eos_never(packed: Path, tmp_path: Path) -> None:
    import grok_local

    keys = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    with grok_local.load(rewritten(packed, tmp_path / "x.gguf", keys=keys), context=64) as model:
        bos, plain = model.engine.bos, model.tokenize("Hi")
        named = model.engine.piece(bos, special=True).decode() + "Hi"
        assert plain[0] == bos
        assert plain.count(bos) == model.tokenize(named, special=True).count(bos) == 1
        assert not model.engine.is_end(plain[-1])


def test_a_long_run_of_one_character(packed: Path, tmp_path: Path) -> None:
    """std::regex recurses for every character with some pre-tokenizers: 200,000 overflow a stack of 8 MB."""
    keys = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-4o", "tokenizer.ggml.merges": ["A A"]}
    script = (
        "import grok_local, sys\n"
        "with grok_local.load(sys.argv[1], context=64) as model:\n"
        "    print(len(model.tokenize('A' * 200_000)))\n"
    )
    path = rewritten(packed, tmp_path / "x.gguf", keys=keys)
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert int(done.stdout) > 0


# -- chat in a pipe ----------------------------------------------------------------------------------------------------


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line]


def test_questions_in_a_pipe(run: Run, packed: Path) -> None:
    options = ("-m", packed, "--context", 256, "--max-tokens", 4, "--stop", r"\n")
    done = run("chat", *options, stdin="\ufeffOne?\r\n/usr/bin holds what?\n//\n/dance\nTwo?\n/exit\nnever\n")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("tokens, ") == 5


def test_one_question_too_long(run: Run, packed: Path) -> None:
    options = ("-m", packed, "--context", 128, "--max-tokens", 4)
    done = run("chat", *options, stdin="One?\n" + "word " * 900 + "\nTwo?\n")
    assert done.returncode == 1
    assert "error: line 2: the message has" in done.stderr
    assert done.stderr.count("tok/s") == 2
    assert done.stderr.endswith("error: 1 of 3 questions were not answered\n")


def test_quiet_chat_says_nothing_but_answers(run: Run, packed: Path) -> None:
    done = run("chat", "-m", packed, "--context", 9000, "--max-tokens", 4, "--quiet", stdin="One?\n")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_template_is_chosen(run: Run, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(CHATML)
    for template in ("none", tmp_path / "t.jinja"):
        done = run("chat", "-m", packed, "--context", 256, "--max-tokens", 4, "--template", template, stdin="Hi\n")
        assert done.returncode == 0, done.stderr
    done = run("chat", "-m", packed, "--context", 256, "--template", "nowhere", stdin="Hi\n")
    assert done.returncode == 2
    assert "template nowhere: cannot be read" in done.stderr


def test_a_template_that_takes_no_system_role(run: Run, packed: Path, tmp_path: Path) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    keys = {"tokenizer.chat_template": refusing + "{% for m in messages %}{{ m.content }}{% endfor %}"}
    path = rewritten(packed, tmp_path / "x.gguf", keys=keys)
    done = run("chat", "-m", path, "--context", 256, "--max-tokens", 4, stdin="Hi\n/system Be brief.\nWho?\nAnd?\n")
    assert done.returncode == 0
    assert done.stderr.count("has no system role") == 1


@pytest.mark.parametrize(
    ("data", "program"),
    [
        (gzip.compress(QUESTION.encode()), "gunzip"),
        (lzma.compress(QUESTION.encode()), "unxz"),
        (b"(\xb5/\xfd\x20\x01\x09\x00\x00x", "unzstd"),
        (b"PK\3\4\x14\0", "unzip"),
    ],
)
def test_what_is_compressed_is_no_text(data: bytes, program: str) -> None:
    with pytest.raises(OptionError, match=f"^in.gz: is compressed: {program} it first$"):
        decoded(data, "in.gz")


def test_utf_16_without_its_mark_is_no_text(packed: Path) -> None:
    done = asked(packed, "-", stdin=QUESTION.encode("utf-16-le"))
    assert done.returncode == 2
    assert b"it has NUL bytes" in done.stderr

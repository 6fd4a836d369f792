"""What verify says of numbers that are none, of holes, and of files that have nothing to be checked against."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import pytest

import grok_local
from grok_local.errors import ModelError
from grok_local.formats.gguf_file import read_model
from grok_local.quantize.verify import verify
from samples.rewritten import rewritten
from tests.conftest import Run


@pytest.fixture(scope="module")
def foreign(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somebody else's file: without our keys."""
    return rewritten(packed, tmp_path_factory.mktemp("foreign") / "x.gguf", without=("grok_local.",))


def patched(source: Path, path: Path, tensor: str, data: bytes, *, at: int = 0) -> Path:
    path.write_bytes(source.read_bytes())
    place = next(t for t in read_model(source)[0].tensors if t.name == tensor)
    with path.open("r+b") as file:
        file.seek(place.offset + at)
        file.write(data or bytes(place.nbytes))
    return path


@pytest.mark.parametrize(
    ("tensor", "data", "words"),
    [
        ("output_norm.weight", struct.pack("<f", float("nan")), "not finite"),
        ("output_norm.weight", struct.pack("<f", float("-inf")), "not finite"),
        ("blk.1.ffn_up_exps.weight", struct.pack("<e", float("inf")), "not finite"),
        ("blk.1.ffn_up_exps.weight", b"", "all zeros"),
    ],
)
def test_what_cannot_be_right(foreign: Path, tmp_path: Path, tensor: str, data: bytes, words: str) -> None:
    report = verify(patched(foreign, tmp_path / "x.gguf", tensor, data))
    assert len(report.problems) == 1
    assert report.problems[0].startswith(f"{tensor}: ")
    assert words in report.problems[0]


def test_one_line_says_what_was_checked(run: Run, foreign: Path, packed: Path, small: Path) -> None:
    digest = hashlib.sha256(foreign.read_bytes()).hexdigest()
    for arguments, words in (
        ([packed], "26 tensors, each with the hash it was packed with"),
        ([packed, "--against", small], "as packing the checkpoint gives them; 19 exact"),
        ([foreign], "the file has no hashes, so nothing but its structure could be checked"),
        ([foreign, "--sha256", digest], "26 tensors"),
    ):
        done = run("verify", *arguments)
        assert done.returncode == 0, done.stderr
        assert words in done.stdout
        assert done.stdout.count("\n") == 1
    assert run("verify", packed, "--verbose").stdout.count("hash right") == 26
    wrong = run("verify", foreign, "--sha256", "0" * 64)
    assert wrong.returncode == 1
    assert f"its SHA-256 is {digest}" in wrong.stderr


def test_logits_that_are_not_finite_are_an_error(run: Run, foreign: Path, tmp_path: Path) -> None:
    path = patched(foreign, tmp_path / "x.gguf", "output_norm.weight", 256 * struct.pack("<f", float("nan")))
    with grok_local.load(path, context=64) as model:
        with pytest.raises(ModelError, match="not finite"):
            model.logits([1, 2])
        for temperature in (0.0, 0.8):
            with pytest.raises(ModelError, match="not finite"):
                list(model.generate("x", temperature=temperature))
    for done in (run("generate", "-m", path, "--json", "x"), run("chat", "-m", path, stdin="x\n")):
        assert done.returncode == 1
        assert "not finite" in done.stderr


def test_a_file_that_changes_under_the_model(foreign: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(foreign.read_bytes())
    with grok_local.load(path, context=64) as model:
        list(model.generate("x", max_tokens=2))
        patched(foreign, path, "output_norm.weight", bytes(4))
        with pytest.raises(ModelError, match="has changed since it was loaded"):
            list(model.generate("y", max_tokens=2))

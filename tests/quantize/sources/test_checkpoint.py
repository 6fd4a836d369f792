"""Opening a checkpoint: dimensions from shapes, and every problem listed at once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from grok_local.errors import CheckpointError
from grok_local.models import grok1
from grok_local.quantize.sources.checkpoint import check_scales, fingerprint
from grok_local.quantize.sources.recognise import open_checkpoint
from samples.checkpoints import SMALL, QuantizedWeight8bit, Spec, dump, write_checkpoint


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    """A checkpoint that may be damaged."""
    return Path(shutil.copytree(small, tmp_path / "copy")) / "ckpt-0"


def _problems(folder: Path) -> tuple[str, ...]:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    return caught.value.problems


def test_the_releases_own_order() -> None:
    leaves = list(grok1.leaves(grok1.RELEASE.published))
    assert len(leaves) == 770
    layers = [leaf.layer for leaf in leaves[2::12]]
    assert layers[:14] == [0, 1, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 2, 20]
    assert (layers[-1], set(layers)) == (9, set(range(64)))
    assert leaves[2 + 12 * 2].path == "transformer/decoder_layer_10/moe/linear/w"


def test_the_releases_size_to_the_byte() -> None:
    # By role, as published: pickles of 8 leaves with their opcodes.
    first = [leaf for leaf in grok1.leaves(grok1.RELEASE.published) if not leaf.layer]
    sizes = {leaf.path.rpartition("decoder_layer_0/")[2]: leaf for leaf in first}
    gate = np.prod(sizes["moe/linear/w"].shape, dtype=np.int64) + 2 * 8 * 32768
    assert 0 < 1_611_137_347 - gate < 400
    embedding = 4 * np.prod(sizes["language_model/in_out_embed/embeddings"].shape, dtype=np.int64)
    assert 0 < 3_221_225_637 - embedding < 400


@pytest.mark.parametrize("name", ["ckpt-0", "ckpt", ""])
def test_finds_the_folder(small: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(small / "ckpt-0", tmp_path / "x" / name, dirs_exist_ok=True)
    assert open_checkpoint(tmp_path / "x").dimensions == SMALL.dimensions()


def test_dimensions_come_from_the_shapes(tmp_path: Path) -> None:
    spec = Spec(layers=3, width=384, expert_width=96, kv_width=128, vocabulary=100, experts=4, groups=4)
    opened = open_checkpoint(write_checkpoint(tmp_path, spec))
    assert opened.dimensions == spec.dimensions()
    assert [tensor.file_name for tensor in opened.tensors] == [f"tensor{index:05d}_000" for index in range(38)]


def test_lists_everything_that_is_wrong(copy: Path) -> None:
    (copy / "tensor00003_000").unlink()
    (copy / "tensor00005_000").write_bytes((copy / "tensor00005_000").read_bytes()[:-10])
    (copy / "tensor00009_000").write_bytes(dump(np.ones(100, np.float32)))
    (copy / "tensor00012_000").write_bytes(b"")
    (copy / "tensor00013_000").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (copy / "tensor00026_000").write_bytes(dump(np.ones(256, np.float32)))
    (copy / "tensor00002_001").write_bytes(b"x")
    problems = _problems(copy)
    expected = {
        "tensor00003_000": "missing",
        "tensor00005_000": "truncated",
        "tensor00009_000": "shape",
        "tensor00012_000": "empty",
        "tensor00013_000": "git-lfs",
        "tensor00026_000": "nobody expects",
        "tensor00002_001": "nobody expects",
    }
    assert len(problems) == len(expected)
    for line in problems:
        assert expected[line.partition(":")[0]] in line


def test_a_half_fetched_release_says_what_is_missing(copy: Path) -> None:
    for path in sorted(copy.iterdir())[-5:]:
        path.unlink()
    assert [line.partition(":")[0] for line in _problems(copy)] == [f"tensor{n:05d}_000" for n in range(21, 26)]


@pytest.mark.parametrize(
    ("index", "value", "words"),
    [
        (4, np.ones((8, 256, 256), np.float32), "float32"),
        (7, QuantizedWeight8bit(np.ones((256, 256), np.int8), np.ones((3, 256), ml_dtypes.bfloat16)), "scales"),
        (7, QuantizedWeight8bit(np.ones((256, 256), np.int8), np.ones((1, 256), np.float32)), "scales"),
        (13, QuantizedWeight8bit(np.ones((256, 8), np.int8), np.ones((1, 8), ml_dtypes.bfloat16)), "plain float32"),
    ],
)
def test_wrong_types_and_scales(copy: Path, index: int, value: Any, words: str) -> None:
    (copy / f"tensor{index:05d}_000").write_bytes(dump(value))
    (problem,) = _problems(copy)
    assert problem.startswith(f"tensor{index:05d}_000: transformer/decoder_layer_0/")
    assert words in problem


def test_a_query_of_another_width_cannot_run(copy: Path) -> None:
    for layer in range(2):
        query = QuantizedWeight8bit(np.ones((256, 384), np.int8), np.ones((1, 384), ml_dtypes.bfloat16))
        (copy / f"tensor{7 + 12 * layer:05d}_000").write_bytes(dump(query))
    (problem,) = _problems(copy)
    assert "384" in problem
    assert "256" in problem


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert "no Grok-1 or Grok-2 checkpoint" in _problems(tmp_path)[0]
    assert "no such folder" in _problems(tmp_path / "nowhere")[0]


def test_scales_that_are_not_finite(copy: Path) -> None:
    bad = QuantizedWeight8bit(np.ones((256, 256), np.int8), np.full((1, 256), np.nan, ml_dtypes.bfloat16))
    (copy / "tensor00007_000").write_bytes(dump(bad))
    with pytest.raises(CheckpointError, match=r"tensor00007_000: .* not finite"):
        check_scales(open_checkpoint(copy))


def _change_weight(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[50_000] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("change", [_change_weight])
def test_the_fingerprint_tells_checkpoints_apart(copy: Path, small: Path, change: Callable[[Path], None]) -> None:
    before = fingerprint(open_checkpoint(copy))
    assert before == fingerprint(open_checkpoint(small))
    change(copy / "tensor00002_000")
    assert fingerprint(open_checkpoint(copy)) != before

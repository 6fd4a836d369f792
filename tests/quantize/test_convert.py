"""quantize_checkpoint, against an independent formula and the C library's own bytes."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from gguf.constants import GGMLQuantizationType as Q

import grok_local
from grok_local.errors import CheckpointError, OptionError, OutputError, TokenizerError
from grok_local.formats import gguf_file
from grok_local.ggml import quants
from grok_local.models import grok1
from grok_local.models.release import Kind
from grok_local.quantize.output.part_file import PartFile
from grok_local.quantize.packing import pool
from grok_local.quantize.recipe import RECIPES
from samples.checkpoints import SMALL, QuantizedWeight8bit, Spec, dump, tensors, write_checkpoint
from samples.processes import measured
from tests.conftest import TOKENIZER

Floats = npt.NDArray[np.float32]


def _expected(leaf: grok1.Leaf, value: Any) -> Floats:
    """The tensor as GGUF rows in float32, by the formula of the release's model.py."""
    if isinstance(value, QuantizedWeight8bit):
        rows, groups = value.weight.shape[-2], value.scales.shape[-2]
        scales = np.repeat(value.scales.astype(np.float32), rows // groups, axis=-2)
        return np.ascontiguousarray((value.weight.astype(np.float32) * scales).swapaxes(-1, -2))
    return np.ascontiguousarray(value.T if leaf.kind is Kind.ROUTER else value)


def _stored(path: Path) -> dict[str, gguf_file.Tensor]:
    return {tensor.name: tensor for header in gguf_file.read_model(path) for tensor in header.tensors}


def _bytes(tensor: gguf_file.Tensor) -> npt.NDArray[np.uint8]:
    return np.fromfile(tensor.path, np.uint8, tensor.nbytes, offset=tensor.offset)


def _floats(tensor: gguf_file.Tensor) -> Floats:
    out = np.empty(tensor.shape, np.float32)
    quants.dequantize(tensor.type, _bytes(tensor), out)
    return out


def _packed(kind: Q, values: Floats) -> npt.NDArray[np.uint8]:
    rows = values.reshape(-1, values.shape[-1])
    out = np.empty(len(rows) * quants.bytes_per_row(kind, rows.shape[1]), np.uint8)
    quants.quantize_rows(kind, rows, out)
    return out


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", RECIPES)
def test_every_tensor_of_every_type(small: Path, tmp_path: Path, name: str) -> None:
    recipe = RECIPES[name]
    stored = _stored(grok_local.quantize_checkpoint(small, tmp_path / "x.gguf", type=name).path)
    assert len(stored) == 2 + 12 * SMALL.layers
    for leaf, value in tensors(SMALL):
        tensor, expected = stored[leaf.gguf_name], _expected(leaf, value)
        assert tensor.shape == expected.shape
        assert tensor.type == recipe.wanted(leaf.kind)
        if tensor.type == Q.Q8_0:  # int8 and scale as they are in the release
            assert np.array_equal(_floats(tensor), expected)
        else:
            assert np.array_equal(_bytes(tensor), _packed(tensor.type, expected)), leaf.path


@pytest.mark.parametrize("name", ["q4_k", "iq4_xs", "mxfp4", "q8_0"])
def test_rows_that_no_block_divides(tmp_path: Path, name: str) -> None:
    spec = Spec(layers=1, width=384, expert_width=72, kv_width=128, vocabulary=2048, groups=1)
    report = grok_local.quantize_checkpoint(write_checkpoint(tmp_path, spec, TOKENIZER), tmp_path / "x.gguf", type=name)
    stored = _stored(report.path)
    falls_to = {"q4_k": Q.Q5_0, "iq4_xs": Q.IQ4_NL, "mxfp4": Q.MXFP4, "q8_0": Q.Q8_0}
    assert stored["blk.0.ffn_up_exps.weight"].type == falls_to[name]
    assert stored["blk.0.ffn_down_exps.weight"].type == Q.F16  # 72 weights are not even blocks of 32
    assert any("moe/linear_1/w: rows of 72" in line and "F16" in line for line in report.fallbacks)
    for leaf, value in tensors(spec):
        tensor, expected = stored[leaf.gguf_name], _expected(leaf, value)
        if tensor.type != Q.Q8_0:
            assert np.array_equal(_bytes(tensor), _packed(tensor.type, expected)), leaf.path


@pytest.mark.parametrize("groups", [1, 2, 4, 16])
def test_scale_groups_smaller_than_a_block_are_not_copied(tmp_path: Path, groups: int) -> None:
    spec = Spec(layers=1, width=256, kv_width=128, expert_width=256, groups=groups)
    path = write_checkpoint(tmp_path, spec, TOKENIZER)
    stored = _stored(grok_local.quantize_checkpoint(path, tmp_path / "x.gguf").path)
    for leaf, value in tensors(spec):
        if leaf.path.endswith("multi_head_attention/linear/w"):
            tensor, expected = stored[leaf.gguf_name], _expected(leaf, value)
            exact = np.array_equal(_floats(tensor), expected)
            assert exact == (256 // groups >= 32)
            assert exact or np.array_equal(_bytes(tensor), _packed(Q.Q8_0, expected))


def _with_scales(folder: Path, scales: Floats) -> QuantizedWeight8bit:
    """Replace the query of layer 0."""
    weight = np.random.default_rng(5).integers(-127, 128, (256, 256), np.int8)
    value = QuantizedWeight8bit(weight, scales.astype(ml_dtypes.bfloat16))
    (folder / "ckpt-0" / "tensor00007_000").write_bytes(dump(value))
    return value


def test_only_scales_that_half_precision_holds_are_copied(small: Path, tmp_path: Path) -> None:
    path = shutil.copytree(small, tmp_path / "copy")
    scales = np.full((1, 256), 0.0078125, np.float32)
    scales[0, 3], scales[0, 9], scales[0, 20] = 2.0**-17 * 1.1, 2.0**-20 * 1.6640625, 0
    value = _with_scales(path, scales)
    leaf = next(leaf for leaf in grok1.leaves(SMALL.dimensions()) if leaf.index == 7)
    expected = _expected(leaf, value)
    tensor = _stored(grok_local.quantize_checkpoint(path, tmp_path / "x.gguf").path)["blk.0.attn_q.weight"]
    same = (_floats(tensor) == expected).all(axis=1)
    assert np.flatnonzero(~same).tolist() == [9]
    row = tensor.nbytes // 256
    assert np.array_equal(_bytes(tensor)[9 * row : 10 * row], _packed(Q.Q8_0, expected[9:10]))


def test_weights_too_large_for_the_type(small: Path, tmp_path: Path) -> None:
    path = shutil.copytree(small, tmp_path / "copy")
    _with_scales(path, np.full((1, 256), 70_000, np.float32))
    with pytest.raises(CheckpointError, match=r"tensor00007_000: .*weights of 8\.\d+e\+06.*--type f32"):
        grok_local.quantize_checkpoint(path, tmp_path / "x.gguf")
    assert grok_local.quantize_checkpoint(path, tmp_path / "y.gguf", type="f32").tensors == 26


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_embedding_that_is_not_finite(small: Path, tmp_path: Path, value: float) -> None:
    """No type helps there, so none is advised."""
    path = shutil.copytree(small, tmp_path / "copy")
    (path / "ckpt-0" / "tensor00000_000").write_bytes(dump(np.full((2048, 256), value, np.float32)))
    with pytest.raises(CheckpointError, match=rf"tensor00000_000: .*weights of {value}, more than Q6_K can hold$"):
        grok_local.quantize_checkpoint(path, tmp_path / "x.gguf")


def test_threads_and_memory_change_no_byte(small: Path, tmp_path: Path, packed: Path, monkeypatch: Any) -> None:
    least = 360_000_000
    for number, options in enumerate([{"threads": 1}, {"threads": 4}, {"threads": 3, "memory": least}]):
        report = grok_local.quantize_checkpoint(small, tmp_path / f"{number}" / packed.name, **options)  # type: ignore[arg-type]
        assert _sha256(report.path) == _sha256(packed)


def test_the_process_stays_within_its_memory(golden: Path, tmp_path: Path) -> None:
    ballast = bytearray(600_000_000)  # what this process has had is not the command's
    ballast[::4096] = b"x" * len(ballast[::4096])
    del ballast
    command = [sys.executable, "-m", "grok_local", "quantize", str(golden), "-o", str(tmp_path / "x.gguf")]
    _, peak = measured([*command, "--type", "f32", "--memory", "450M"])
    assert 30_000_000 < peak < 450_000_000


def test_too_little_memory_says_what_is_enough(small: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"give \d+ MB or more") as caught:
        grok_local.quantize_checkpoint(small, tmp_path / "x.gguf", memory="10M")
    enough = str(caught.value).partition("give ")[2].partition(" or")[0].replace(" ", "")
    assert grok_local.quantize_checkpoint(small, tmp_path / "x.gguf", memory=enough).tensors == 26


def test_slabs_of_any_size_give_the_same_bytes(tmp_path: Path, monkeypatch: Any) -> None:
    """Small pieces and slabs: every path through reading a part of a matrix."""
    spec = Spec(layers=1, width=256, kv_width=128, expert_width=520)
    path = write_checkpoint(tmp_path, spec, TOKENIZER)
    monkeypatch.setattr("grok_local.quantize.layout.pieces.PIECE_WEIGHTS", 1 << 15)
    digests = set()
    for number, slab in enumerate((1, 60_000, 1 << 30)):
        real = pool.Budget.of
        monkeypatch.setattr(
            pool.Budget, "of", lambda *a, real=real, slab=slab: pool.Budget(2, max(slab, 300_000), real(*a).piece)
        )
        digests.add(_sha256(grok_local.quantize_checkpoint(path, tmp_path / f"{number}" / "x.gguf", type="q4_0").path))
        monkeypatch.setattr(pool.Budget, "of", real)
    assert len(digests) == 1
    stored = _stored(tmp_path / "0" / "x.gguf")
    for leaf, value in tensors(spec):
        if leaf.kind is Kind.EXPERTS:
            assert np.array_equal(
                _bytes(stored[leaf.gguf_name]), _packed(stored[leaf.gguf_name].type, _expected(leaf, value))
            )


def test_metadata_is_complete(packed: Path) -> None:
    metadata = gguf_file.read_header(packed).metadata
    expected = {
        "general.architecture": "grok",
        "general.license": "apache-2.0",
        "general.file_type": 15,
        "general.alignment": 4096,
        "general.quantization_version": 2,
        "grok.block_count": 2,
        "grok.context_length": 8192,
        "grok.embedding_length": 256,
        "grok.feed_forward_length": 256,
        "grok.attention.head_count": 2,
        "grok.attention.head_count_kv": 1,
        "grok.expert_count": 8,
        "grok.expert_used_count": 2,
        "grok.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
    }
    assert {key: metadata.get(key) for key in expected} == expected
    assert metadata["grok.embedding_scale"] == pytest.approx(78.38367176906169)
    assert metadata["grok.logit_scale"] == pytest.approx(0.5773502691896257)
    assert metadata["general.name"]
    assert metadata["general.size_label"].startswith("8x")
    assert not {"grok.final_logit_softcapping", "grok.expert_feed_forward_length"} & metadata.keys()


def test_ggufs_own_reader_agrees(packed: Path) -> None:
    reader = gguf.GGUFReader(packed)
    ours = _stored(packed)
    assert {t.name: (int(t.tensor_type), int(t.data_offset), int(t.n_bytes)) for t in reader.tensors} == {
        t.name: (int(t.type), t.offset, t.nbytes) for t in ours.values()
    }
    assert all(tensor.offset % 4096 == 0 for tensor in ours.values())


def test_parts(small: Path, tmp_path: Path, packed: Path) -> None:
    report = grok_local.quantize_checkpoint(small, tmp_path / "x.gguf", split_size="600K")
    count = len(report.paths)
    assert count > 2
    assert [p.name for p in report.paths] == [f"x-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [p.name for p in report.paths]
    headers = [gguf_file.read_header(path) for path in report.paths]
    for number, header in enumerate(headers):
        assert header.metadata["general.alignment"] == 4096
        assert (header.metadata["split.no"], header.metadata["split.count"]) == (number, count)
        assert header.metadata["split.tensors.count"] == 26
    whole, parts = _stored(packed), _stored(report.paths[1])
    assert all(np.array_equal(_bytes(whole[name]), _bytes(parts[name])) for name in whole)
    for path in report.paths:
        with grok_local.load(path, context=64, threads=1) as model:
            assert len(model.tokenize("hello")) > 0
    report.paths[1].unlink()
    with pytest.raises(grok_local.GrokLocalError, match=r"00002-of-.*missing"):
        grok_local.load(report.paths[0])


def test_an_output_that_exists(small: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.gguf"
    first = grok_local.quantize_checkpoint(small, output)
    before = output.stat().st_mtime_ns
    again = grok_local.quantize_checkpoint(small, output)
    assert (first.unchanged, again.unchanged) == (False, True)
    with pytest.raises(OutputError, match="--force"):
        grok_local.quantize_checkpoint(small, output, type="q4_0")
    assert output.stat().st_mtime_ns == before
    output.write_bytes(b"something else")
    with pytest.raises(OutputError, match="--force"):
        grok_local.quantize_checkpoint(small, output)
    assert output.read_bytes() == b"something else"
    assert not grok_local.quantize_checkpoint(small, output, type="q4_0", force=True).unchanged
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def test_all_problems_come_together(small: Path, tmp_path: Path) -> None:
    path = shutil.copytree(small, tmp_path / "copy")
    (path / "ckpt-0" / "tensor00008_000").unlink()
    (path / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError) as caught:
        grok_local.quantize_checkpoint(path, tmp_path / "x.gguf")
    assert "tensor00008_000: missing" in caught.value.problems
    assert any("tokenizer.model" in line and "xai-org/grok-1" in line for line in caught.value.problems)
    assert not list(tmp_path.glob("x*"))


def test_a_tokenizer_of_another_size(small: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"131072 pieces .* 2048 rows"):
        grok_local.quantize_checkpoint(
            small, tmp_path / "x.gguf", tokenizer=TOKENIZER.with_name("grok-1-tokenizer.model")
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"type": "q3_k"}, "no type 'q3_k'"),
        ({"memory": "lots"}, "not a size"),
        ({"split_size": "-3"}, "not a size"),
        ({"threads": 0}, "at least one"),
    ],
)
def test_options_that_make_no_sense(small: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        grok_local.quantize_checkpoint(small, tmp_path / "x.gguf", **options)


def test_no_room_on_the_disk(small: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(OutputError, match=r"disk space are missing"):
        grok_local.quantize_checkpoint(small, tmp_path / "x.gguf")
    assert not list(tmp_path.glob("x*"))


def test_a_disk_that_fills_up_half_way(small: Path, tmp_path: Path, packed: Path, monkeypatch: Any) -> None:
    real, written = PartFile.write, [0]

    def write(self: PartFile, data: npt.NDArray[np.uint8], offset: int) -> None:
        written[0] += 1
        if written[0] > 15:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, data, offset)

    monkeypatch.setattr(PartFile, "write", write)
    output = tmp_path / packed.name
    with pytest.raises(OutputError, match=r"No space left.*run the same command again"):
        grok_local.quantize_checkpoint(small, output)
    assert not output.exists()
    monkeypatch.setattr(PartFile, "write", real)
    report = grok_local.quantize_checkpoint(small, output)
    assert report.resumed_pieces == 15
    assert _sha256(output) == _sha256(packed)


def test_a_checkpoint_that_shrinks_meanwhile(small: Path, tmp_path: Path) -> None:
    path = shutil.copytree(small, tmp_path / "copy")

    def shrink(_: object) -> None:
        os.truncate(path / "ckpt-0" / "tensor00014_000", 1000)

    with pytest.raises(CheckpointError, match="tensor00014_000: became shorter"):
        grok_local.quantize_checkpoint(path, tmp_path / "x.gguf", threads=1, progress=shrink)


@pytest.mark.parametrize("name", ["tensor00000_000", "tensor00025_000"])
def test_a_checkpoint_that_cannot_be_read_is_not_one_that_cannot_be_written(
    small: Path, tmp_path: Path, name: str
) -> None:
    path = shutil.copytree(small, tmp_path / "copy")

    def lose(_: object) -> None:
        (path / "ckpt-0" / name).unlink(missing_ok=True)

    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read \(No such file"):
        grok_local.quantize_checkpoint(path, tmp_path / "x.gguf", threads=1, progress=lose)


def test_a_folder_nobody_can_write(small: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        grok_local.quantize_checkpoint(small, tmp_path / "file" / "x.gguf")


def test_progress_reaches_the_end(small: Path, tmp_path: Path) -> None:
    events: list[grok_local.Progress] = []
    report = grok_local.quantize_checkpoint(small, tmp_path / "x.gguf", progress=events.append)
    weights = sum(int(np.prod(leaf.shape)) for leaf in grok1.leaves(SMALL.dimensions()))
    assert events[-1].done == events[-1].total == weights
    assert [event.done for event in events] == sorted(event.done for event in events)
    assert events[-1].bytes_written <= report.bytes


def test_no_force_replaces_what_is_being_read(small: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(small, tmp_path / "c"))
    for name in ("tensor00002_000", "tokenizer.model"):
        path = next(checkpoint.rglob(name))
        before = path.read_bytes()
        with pytest.raises(OutputError, match="is a file of the checkpoint itself"):
            grok_local.quantize_checkpoint(checkpoint, path, force=True)
        assert path.read_bytes() == before


def test_files_of_somebody_else_are_left_alone(small: Path, tmp_path: Path) -> None:
    for name, words in (("x.gguf.partial", "without its journal"), ("x.gguf.journal", "no journal of grok-local")):
        other = tmp_path / name
        other.write_bytes(b"precious\nand torn")
        with pytest.raises(OutputError, match=words):
            grok_local.quantize_checkpoint(small, tmp_path / "x.gguf")
        assert other.read_bytes() == b"precious\nand torn"
        assert [path.name for path in tmp_path.iterdir()] == [name]
        other.unlink()
    (tmp_path / "x.gguf.partial").touch()
    grok_local.quantize_checkpoint(small, tmp_path / "x.gguf", force=True)

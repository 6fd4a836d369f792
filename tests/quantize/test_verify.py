"""verify: exact tensors as exact, the errors of the others right, every changed byte found."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf.quants import dequantize

import grok_local
from grok_local.errors import VerifyError
from grok_local.formats import gguf_file
from grok_local.quantize.verify import verify
from samples.checkpoints import SMALL, Spec, tensors, write_checkpoint
from tests.conftest import TOKENIZER
from tests.quantize.test_convert import _bytes, _expected


def test_hashes_are_right(packed: Path) -> None:
    report = verify(packed)
    assert report.hashed
    assert not report.problems
    assert len(report.tensors) == 26


def test_errors_agree_with_ggufs_own_dequantization(small: Path, packed: Path) -> None:
    checks = {check.name: check for check in verify(packed, small).tensors}
    stored = {tensor.name: tensor for tensor in gguf_file.read_header(packed).tensors}
    for leaf, value in tensors(SMALL):
        check, tensor, truth = checks[leaf.gguf_name], stored[leaf.gguf_name], _expected(leaf, value)
        rows = _bytes(tensor).reshape(*truth.shape[:-1], -1)
        error = dequantize(rows if rows.ndim > 1 else rows.view(np.float32), tensor.type).reshape(truth.shape) - truth
        assert check.max_error == pytest.approx(np.abs(error).max(), rel=1e-4, abs=1e-9)
        expected = math.sqrt(float((error.astype(np.float64) ** 2).sum() / (truth.astype(np.float64) ** 2).sum()))
        assert check.relative_rms == pytest.approx(expected, rel=1e-3, abs=1e-9)
        assert check.exact == (error == 0).all()
    assert checks["blk.0.attn_output.weight"].exact
    assert not checks["blk.0.ffn_up_exps.weight"].exact


def test_q8_0_loses_nothing(small: Path, tmp_path: Path) -> None:
    path = grok_local.quantize_checkpoint(small, tmp_path / "x.gguf", type="q8_0").path
    report = verify(path, small)
    assert not report.problems
    assert all(check.exact for check in report.tensors)


def test_parts_are_verified_together(small: Path, tmp_path: Path) -> None:
    paths = grok_local.quantize_checkpoint(small, tmp_path / "x.gguf", split_size="700K").paths
    assert len(verify(paths[1]).tensors) == 26
    assert not verify(paths[-1], small).problems


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.1.ffn_down_exps.weight", "blk.0.attn_norm.weight"])
def test_a_flipped_bit_is_found(small: Path, packed: Path, tmp_path: Path, name: str) -> None:
    path = Path(shutil.copy(packed, tmp_path))
    (tensor,) = [tensor for tensor in gguf_file.read_header(path).tensors if tensor.name == name]
    data = bytearray(path.read_bytes())
    data[tensor.offset + tensor.nbytes - 3] ^= 4
    path.write_bytes(data)
    for report in (verify(path), verify(path, small)):
        assert [check.name for check in report.tensors if check.problem] == [name]
        assert len(report.problems) == 1


def test_another_checkpoint(packed: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "a", Spec(seed=2, layers=2, width=256, kv_width=128), TOKENIZER)
    assert len(verify(packed, other).problems) == 26
    larger = write_checkpoint(tmp_path / "b", Spec(layers=3, width=256, kv_width=128), TOKENIZER)
    with pytest.raises(VerifyError) as caught:
        verify(packed, larger)
    assert "blk.2.attn_k.weight: in the checkpoint, but not in the GGUF" in caught.value.problems

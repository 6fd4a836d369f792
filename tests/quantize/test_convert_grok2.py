"""Grok-2 packed: against the C library's own bytes, killed and resumed, and computed with."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from gguf.constants import GGMLQuantizationType as Q

import grok_local
from grok_local.errors import CheckpointError, OptionError, OutputError, TokenizerError
from grok_local.formats import gguf_file
from grok_local.formats.safetensors import read_safetensors
from grok_local.ggml import quants
from grok_local.models.grok2 import named_tensors
from grok_local.models.release import Kind, Target
from grok_local.quantize.recipe import RECIPES
from grok_local.quantize.verify import verify
from samples.grok2_release import SMALL_2, Grok2Spec, values, write_release, write_safetensors
from samples.processes import measured
from samples.reference_grok2 import ReferenceGrok2, Routing
from tests.conftest import Run

Floats = npt.NDArray[np.float32]
IDS = np.random.default_rng(3).integers(128, SMALL_2.vocabulary, 48).tolist()


def expected_tensors(spec: Grok2Spec) -> Iterator[tuple[Target, Floats]]:
    """What the release says, before it was cut into shards."""
    for tensor in named_tensors(spec.dimensions()):
        matrices = [value.astype(np.float32) for _, value in values(tensor, spec)]
        yield tensor.target, np.stack(matrices) if tensor.target.kind is Kind.EXPERTS else matrices[0]


def stored(path: Path) -> dict[str, gguf_file.Tensor]:
    return {tensor.name: tensor for header in gguf_file.read_model(path) for tensor in header.tensors}


def bytes_of(tensor: gguf_file.Tensor) -> npt.NDArray[np.uint8]:
    return np.fromfile(tensor.path, np.uint8, tensor.nbytes, offset=tensor.offset)


def packed_by_hand(kind: Q, tensor: Floats) -> npt.NDArray[np.uint8]:
    rows = np.ascontiguousarray(tensor.reshape(-1, tensor.shape[-1]))
    out = np.empty(len(rows) * quants.bytes_per_row(kind, rows.shape[1]), np.uint8)
    quants.quantize_rows(kind, rows, out)
    return out


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def packed_grok2(small_grok2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("packed-grok2") / "x.gguf"
    return grok_local.quantize_checkpoint(small_grok2, output).path


@pytest.mark.parametrize("name", RECIPES)
def test_every_tensor_of_every_type(small_grok2: Path, tmp_path: Path, name: str) -> None:
    report = grok_local.quantize_checkpoint(small_grok2, tmp_path / "x.gguf", type=name)
    found = stored(report.path)
    assert len(found) == report.tensors == 3 + 15 * SMALL_2.layers
    for target, truth in expected_tensors(SMALL_2):
        tensor = found[target.name]
        assert (tensor.shape, tensor.type) == (truth.shape, RECIPES[name].wanted(target.kind))
        assert np.array_equal(bytes_of(tensor), packed_by_hand(tensor.type, truth)), target.name
    assert not report.fallbacks


def test_the_dense_network_has_more_bits_than_the_experts(packed_grok2: Path) -> None:
    found = stored(packed_grok2)
    assert {found[f"blk.1.ffn_{name}.weight"].type for name in ("gate", "up", "down")} == {Q.Q6_K}
    assert {found[f"blk.1.ffn_{name}_exps.weight"].type for name in ("gate", "up", "down")} == {Q.Q4_K}


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_numbers_of_other_types(small_grok2: Path, tmp_path: Path, dtype: Any) -> None:
    """What bfloat16 holds and half precision too is the same in all three."""
    copy = Path(shutil.copytree(small_grok2, tmp_path / "copy"))
    truth = {}
    for path in sorted(copy.glob("*-TP-*.safetensors")):
        data, arrays = path.read_bytes(), {}
        for name, info in read_safetensors(path).items():
            numbers = np.frombuffer(data[info.offset : info.offset + info.nbytes], ml_dtypes.bfloat16)
            arrays[name] = numbers.astype(np.float32).astype(dtype).reshape(info.shape)
            truth[name] = arrays[name]
        write_safetensors(path, arrays)
    found = stored(grok_local.quantize_checkpoint(copy, tmp_path / "x.gguf", type="f32").path)
    for target, expected in expected_tensors(SMALL_2):
        assert np.array_equal(bytes_of(found[target.name]).view(np.float32), expected.astype(dtype).reshape(-1))


@pytest.mark.parametrize("name", ["q4_k", "q8_0"])
def test_rows_that_no_block_divides(tmp_path: Path, name: str) -> None:
    spec = replace(SMALL_2, layers=1, expert_width=72, dense_width=288)
    report = grok_local.quantize_checkpoint(write_release(tmp_path / "x", spec), tmp_path / "x.gguf", type=name)
    found = stored(report.path)
    assert found["blk.0.ffn_down_exps.weight"].type == Q.F16  # 72 weights are not even blocks of 32
    assert found["blk.0.ffn_down.weight"].type == Q.Q8_0  # 288 are, but not of 256
    assert any("block_sparse_moe.experts.*.w2.weight: rows of 72" in line for line in report.fallbacks)
    for target, truth in expected_tensors(spec):
        assert np.array_equal(bytes_of(found[target.name]), packed_by_hand(found[target.name].type, truth))


def test_threads_memory_and_small_slabs_change_no_byte(
    tmp_path: Path, small_grok2: Path, packed_grok2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, options in enumerate([{"threads": 1}, {"threads": 5}, {"threads": 3, "memory": "390M"}]):
        report = grok_local.quantize_checkpoint(small_grok2, tmp_path / str(number) / "x.gguf", **options)  # type: ignore[arg-type]
        assert sha256(report.path) == sha256(packed_grok2)
    # Pieces of 128 rows: parts of columns that lie in eight files.
    monkeypatch.setattr("grok_local.quantize.layout.pieces.PIECE_WEIGHTS", 1 << 15)
    report = grok_local.quantize_checkpoint(small_grok2, tmp_path / "small" / "x.gguf", threads=2)
    assert all(
        np.array_equal(bytes_of(tensor), bytes_of(stored(packed_grok2)[name]))
        for name, tensor in stored(report.path).items()
    )


def test_the_process_stays_within_its_memory(tmp_path: Path) -> None:
    spec = replace(SMALL_2, layers=1, width=2048, expert_width=1024, dense_width=8192, kv_width=256)
    folder = write_release(tmp_path / "x", spec)
    command = [sys.executable, "-m", "grok_local", "quantize", str(folder), "-o", str(tmp_path / "x.gguf")]
    _, peak = measured([*command, "--type", "q8_0", "--memory", "500M"])
    assert 30_000_000 < peak < 500_000_000
    with pytest.raises(OptionError, match=r"give \d+ MB or more"):
        grok_local.quantize_checkpoint(folder, tmp_path / "y.gguf", memory="350M")


def test_parts(small_grok2: Path, tmp_path: Path, packed_grok2: Path) -> None:
    report = grok_local.quantize_checkpoint(small_grok2, tmp_path / "x.gguf", split_size="700K")
    assert len(report.paths) > 2
    whole, parts = stored(packed_grok2), stored(report.paths[1])
    assert whole.keys() == parts.keys()
    assert all(np.array_equal(bytes_of(whole[name]), bytes_of(parts[name])) for name in whole)
    assert not verify(report.paths[0], small_grok2).problems
    with grok_local.load(report.path, context=64, threads=1) as model:
        assert model.tokenize("hello")


def test_metadata(packed_grok2: Path) -> None:
    metadata = gguf_file.read_header(packed_grok2).metadata
    expected = {
        "general.architecture": "grok",
        "general.license": "grok-2-community",
        "general.basename": "grok-2",
        "general.file_type": 15,
        "grok.block_count": 2,
        "grok.context_length": 131072,
        "grok.embedding_length": 256,
        "grok.feed_forward_length": 512,
        "grok.expert_feed_forward_length": 256,
        "grok.attention.head_count": 2,
        "grok.attention.head_count_kv": 1,
        "grok.attention.key_length": 128,
        "grok.attention.value_length": 128,
        "grok.rope.dimension_count": 128,
        "grok.rope.freq_base": 208533504.0,  # the nearest float32 to 208533496
        "grok.expert_count": 4,
        "grok.expert_used_count": 2,
        "grok.logit_scale": 0.5,
        "grok.attn_logit_softcapping": 30.0,
        "grok.final_logit_softcapping": 50.0,
        "grok.router_logit_softcapping": 30.0,
        "grok.attention.temperature_length": 1024,
    }
    assert {key: metadata.get(key) for key in expected} == expected
    assert metadata["grok.embedding_scale"] == pytest.approx(90.50966799187809)
    assert metadata["grok.attention.output_scale"] == pytest.approx(128**-0.5)
    assert metadata["grok.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert not [key for key in metadata if "rope.scaling" in key]  # the base is the scaled one already
    assert {int(tensor.offset) % 4096 for tensor in stored(packed_grok2).values()} == {0}


def test_verify(small_grok2: Path, packed_grok2: Path, tmp_path: Path) -> None:
    assert not verify(packed_grok2).problems
    report = verify(packed_grok2, small_grok2)
    assert not report.problems
    truth = {target.name: value for target, value in expected_tensors(SMALL_2)}
    for check in report.tensors:
        unpacked = np.empty(truth[check.name].shape, np.float32)
        tensor = stored(packed_grok2)[check.name]
        quants.dequantize(tensor.type, bytes_of(tensor), unpacked)
        error = np.linalg.norm(unpacked - truth[check.name]) / np.linalg.norm(truth[check.name])
        assert check.relative_rms == pytest.approx(float(error), rel=1e-3, abs=1e-9)
    exact = grok_local.quantize_checkpoint(small_grok2, tmp_path / "x.gguf", type="bf16").path
    assert all(check.exact for check in verify(exact, small_grok2).tensors)


def test_verify_finds_a_changed_shard(small_grok2: Path, packed_grok2: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small_grok2, tmp_path / "copy"))
    path = copy / "pytorch_model-00007-TP-005.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x80
    path.write_bytes(data)
    problems = verify(packed_grok2, copy).problems
    assert [line.partition(":")[0] for line in problems] == ["blk.1.ffn_down_exps.weight"]


def test_an_output_that_exists_and_a_shard_that_was_fetched_again(small_grok2: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small_grok2, tmp_path / "copy"))
    output = tmp_path / "x.gguf"
    assert not grok_local.quantize_checkpoint(copy, output).unchanged
    assert grok_local.quantize_checkpoint(copy, output).unchanged
    path = copy / "pytorch_model-00006-TP-003.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    with pytest.raises(OutputError, match="--force"):
        grok_local.quantize_checkpoint(copy, output)


def test_inputs_are_never_replaced(small_grok2: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small_grok2, tmp_path / "copy"))
    for name in ("pytorch_model-00007-TP-005.safetensors", "tokenizer.tok.json", "config.json"):
        before = sha256(copy / name)
        with pytest.raises(OutputError, match="is a file of the checkpoint itself"):
            grok_local.quantize_checkpoint(copy, copy / name, force=True)
        assert sha256(copy / name) == before


def test_weights_that_are_not_finite(small_grok2: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small_grok2, tmp_path / "copy"))
    path = copy / "pytorch_model-00008-TP-006.safetensors"
    data = bytearray(path.read_bytes())
    data[-2:] = (0x7FC0).to_bytes(2, "little")
    path.write_bytes(data)
    words = r"pytorch_model-00008-TP-000\.safetensors and 7 more: .*experts\.\*\.w3\.weight has weights of nan"
    with pytest.raises(CheckpointError, match=words):
        grok_local.quantize_checkpoint(copy, tmp_path / "x.gguf")


def test_all_problems_come_together(small_grok2: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small_grok2, tmp_path / "copy"))
    (copy / "pytorch_model-00006-TP-003.safetensors").unlink()
    (copy / "tokenizer.tok.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        grok_local.quantize_checkpoint(copy, tmp_path / "x.gguf")
    assert ["TP-003" in caught.value.problems[0], "tokenizer.tok.json" in caught.value.problems[1]] == [True, True]
    assert not list(tmp_path.glob("x*"))


def test_the_other_releases_tokenizer(small_grok2: Path, tmp_path: Path, small: Path) -> None:
    with pytest.raises(TokenizerError, match="is not JSON"):
        grok_local.quantize_checkpoint(small_grok2, tmp_path / "x.gguf", tokenizer=small / "tokenizer.model")


def _start(checkpoint: Path, output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "grok_local", "quantize", str(checkpoint), "-o", str(output), "--threads", "2"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))


def _kill_after(process: subprocess.Popen[bytes], journal: Path, lines: int) -> bool:
    """Kill once the journal has `lines`; False if the run was faster."""
    while process.poll() is None:
        if journal.exists() and journal.read_bytes().count(b"\n") >= lines:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.001)
    return False


def test_killed_at_four_moments(tmp_path: Path) -> None:
    folder = write_release(tmp_path / "release", replace(SMALL_2, layers=4, expert_width=512, dense_width=1024))
    straight = grok_local.quantize_checkpoint(folder, tmp_path / "straight" / "x.gguf").path
    output, generator, kills = tmp_path / "killed" / "x.gguf", random.Random(2), 0
    journal = output.with_name("x.gguf.journal")
    for _ in range(4):
        lines = journal.read_bytes().count(b"\n") if journal.exists() else 0
        kills += _kill_after(_start(folder, output), journal, lines + generator.randint(1, 20))
        assert output.exists() == (not journal.exists())
    assert kills >= 2
    assert _start(folder, output).wait() == 0
    assert sha256(output) == sha256(straight)
    assert [path.name for path in output.parent.iterdir()] == ["x.gguf"]


def test_a_rank_fetched_again_costs_its_own_tensors(
    small_grok2: Path, tmp_path: Path, packed_grok2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, output = Path(shutil.copytree(small_grok2, tmp_path / "copy")), tmp_path / "x.gguf"
    pieces = grok_local.quantize_checkpoint(copy, tmp_path / "y.gguf").tensors + 3 * 2 * (SMALL_2.experts - 1)

    def stop(progress: grok_local.quantize.convert.Progress) -> None:
        if progress.done == progress.total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grok_local.quantize_checkpoint(copy, output, progress=stop)
    os.utime(copy / "pytorch_model-00006-TP-003.safetensors", ns=(1, 1))
    report = grok_local.quantize_checkpoint(copy, output)
    assert pieces - 2 * SMALL_2.experts - 1 <= report.resumed_pieces <= pieces - 2 * SMALL_2.experts
    assert sha256(output) == sha256(packed_grok2)


@pytest.mark.parametrize(("name", "bound"), [("f32", 1e-3), ("bf16", 2e-2), ("q8_0", 8e-2)])
def test_logits(small_grok2: Path, tmp_path: Path, name: str, bound: float) -> None:
    """By either arithmetic: each is far from the other's reference."""
    path = grok_local.quantize_checkpoint(small_grok2, tmp_path / "x.gguf", type=name).path
    reference = ReferenceGrok2(small_grok2)
    truths = {"release": reference.forward(IDS, Routing.RELEASE)[0]}
    truths["llama.cpp"] = reference.forward(IDS, Routing.LLAMA_CPP)[0]
    for routing in truths:
        with grok_local.load(path, context=128, threads=2, kv_type="f32", routing=routing) as model:  # type: ignore[arg-type]
            found = model.logits(IDS)
        for arithmetic, truth in truths.items():
            errors = np.linalg.norm(found - truth, axis=1) / np.linalg.norm(truth, axis=1)
            assert np.median(errors) < bound if arithmetic == routing else np.median(errors) > 0.05
            assert name != "f32" or (errors.max() < 3e-3) == (arithmetic == routing)


def test_it_answers_in_its_template(packed_grok2: Path) -> None:
    with grok_local.load(packed_grok2, context=256, threads=1) as model:
        reply = model.chat([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}], max_tokens=4)
        assert len(list(reply)) <= 4
        begun = "System: Be kind.<|separator|>\n\nHuman: Hi<|separator|>\n\nAssistant:"
        ids = model.tokenize(begun, special=True)
        assert model.engine.cached[0][: len(ids)] == ids


def test_from_the_command_line(run: Run, small_grok2: Path, tmp_path: Path) -> None:
    shown = run("inspect", small_grok2, "--json")
    assert json.loads(shown.stdout)["release"] == "grok-2"
    assert run("quantize", small_grok2, "-o", tmp_path / "x.gguf", "--type", "q4_0").returncode == 0
    assert "it is a checkpoint in Grok-2's format: grok-local quantize" in run("plan", "-m", small_grok2).stderr

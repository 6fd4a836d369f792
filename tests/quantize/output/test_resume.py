"""Killed at any moment and started again, a run ends in the bytes of an undisturbed one."""

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
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import grok_local
from grok_local.errors import CheckpointError, OptionError, OutputError
from grok_local.quantize.output.part_file import PartFile
from samples.checkpoints import dump


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _start(checkpoint: Path, output: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "grok_local", "quantize", str(checkpoint), "-o", str(output), *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))


def _journal_lines(output: Path) -> int:
    journal = output.with_name(output.name + ".journal")
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def _kill_after(process: subprocess.Popen[bytes], output: Path, lines: int) -> bool:
    """Kill once the journal has `lines`; False if the run was faster."""
    while process.poll() is None:
        if _journal_lines(output) >= lines:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.001)
    return False


@pytest.mark.parametrize("threads", ["1", "4"])
def test_killed_at_ten_moments(golden: Path, tmp_path: Path, threads: str) -> None:
    straight, output = tmp_path / "straight" / "x.gguf", tmp_path / "killed" / "x.gguf"
    grok_local.quantize_checkpoint(golden, straight, threads=3)
    generator, kills, lines = random.Random(int(threads)), 0, 0
    for _ in range(10):
        lines = _journal_lines(output) + generator.randint(0, 60)
        kills += _kill_after(_start(golden, output, "--threads", threads), output, lines)
        if not output.exists():
            assert [path.name for path in output.parent.glob("*.gguf")] == []
    assert kills >= 5
    assert _start(golden, output, "--threads", threads).wait() == 0
    assert _sha256(output) == _sha256(straight)
    assert [path.name for path in output.parent.iterdir()] == ["x.gguf"]


def stop_after_20_pieces(checkpoint: Path, output: Path, **options: Any) -> Path:
    real, count = PartFile.write, [0]

    def write(self: PartFile, data: Any, offset: int) -> None:
        count[0] += 1
        if count[0] > 20:
            raise OSError("stop")
        real(self, data, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartFile, "write", write)
        with pytest.raises(OutputError):
            grok_local.quantize_checkpoint(checkpoint, output, **options)
    return output


@pytest.fixture
def stopped(small: Path, tmp_path: Path) -> Path:
    """The name of an output whose run ended after 20 pieces."""
    return stop_after_20_pieces(small, tmp_path / "x.gguf")


def test_only_what_is_missing_is_packed_again(small: Path, stopped: Path, packed: Path) -> None:
    assert grok_local.quantize_checkpoint(small, stopped).resumed_pieces == 20


def test_a_torn_journal_line_and_lost_bytes_do_no_harm(small: Path, stopped: Path, tmp_path: Path) -> None:
    journal, partial = stopped.with_name("x.gguf.journal"), stopped.with_name("x.gguf.partial")
    with journal.open("ab") as file:
        file.write(b'{"piece": 3, "sha')
    with partial.open("r+b") as file:  # as after a power cut: journaled, but not on the disk
        file.seek(partial.stat().st_size // 16)
        file.write(bytes(200_000))
    report = grok_local.quantize_checkpoint(small, stopped)
    assert 0 < report.resumed_pieces < 20
    straight = grok_local.quantize_checkpoint(small, tmp_path / "straight" / "x.gguf").path
    assert _sha256(stopped) == _sha256(straight)


def test_a_tensor_fetched_again_is_packed_again(small: Path, tmp_path: Path, stopped: Path) -> None:
    source = small / "ckpt-0" / "tensor00002_000"
    times = source.stat()
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns + 1_000_000))
    try:
        assert grok_local.quantize_checkpoint(small, stopped).resumed_pieces < 20
    finally:
        os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_other_options_do_not_destroy_a_run(small: Path, stopped: Path) -> None:
    with pytest.raises(OutputError, match="--force"):
        grok_local.quantize_checkpoint(small, stopped, type="q4_0")
    assert grok_local.quantize_checkpoint(small, stopped).resumed_pieces == 20
    stopped.unlink()


def test_force_starts_anew_with_other_options_and_goes_on_with_the_same(small: Path, stopped: Path) -> None:
    assert grok_local.quantize_checkpoint(small, stopped, force=True).resumed_pieces == 20
    assert grok_local.quantize_checkpoint(small, stopped, type="q4_0", force=True).resumed_pieces == 0


@pytest.mark.parametrize("keeps_time", [False, True])
def test_a_file_that_is_replaced_while_it_is_packed(small: Path, tmp_path: Path, keeps_time: bool) -> None:
    path, output = shutil.copytree(small, tmp_path / "copy"), tmp_path / "x.gguf"
    source = path / "ckpt-0" / "tensor00002_000"
    replaced: list[Path] = []

    def replace(progress: object) -> None:
        if not replaced:
            data = bytearray(source.read_bytes())
            data[len(data) // 2] ^= 1
            (tmp_path / "new").write_bytes(data)
            if keeps_time:
                os.utime(tmp_path / "new", ns=(source.stat().st_atime_ns, source.stat().st_mtime_ns))
            replaced.append((tmp_path / "new").replace(source))

    with pytest.raises(CheckpointError, match="tensor00002_000: changed while it was packed: run the same command"):
        grok_local.quantize_checkpoint(path, output, progress=replace)
    assert not output.exists()
    assert grok_local.quantize_checkpoint(path, output).resumed_pieces > 0
    assert _sha256(output) == _sha256(grok_local.quantize_checkpoint(path, tmp_path / "straight" / "x.gguf").path)


def test_another_checkpoint_whose_files_have_the_same_times(small: Path, stopped: Path, tmp_path: Path) -> None:
    other = shutil.copytree(small, tmp_path / "other")
    for path in (other / "ckpt-0").iterdir():
        times, data = path.stat(), bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert grok_local.quantize_checkpoint(other, stopped).resumed_pieces == 0


def _leave_out_the_middle(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    with path.open("wb") as file:
        file.write(data[: len(data) // 4])
        file.seek(3 * len(data) // 4)
        file.write(data[3 * len(data) // 4 :])


def test_what_a_download_left_out_is_not_packed_as_zeros(small: Path, tmp_path: Path) -> None:
    path = shutil.copytree(small, tmp_path / "copy")
    _leave_out_the_middle(path / "ckpt-0" / "tensor00002_000")
    with pytest.raises(CheckpointError, match="tensor00002_000: a part of it was never written"):
        grok_local.quantize_checkpoint(path, tmp_path / "x.gguf")


def test_zeros_of_an_embedding_may_be_holes(small: Path, tmp_path: Path) -> None:
    """Of tokens that nobody uses, on a file system that keeps zeros so."""
    path = shutil.copytree(small, tmp_path / "copy")
    _leave_out_the_middle(path / "ckpt-0" / "tensor00000_000")
    assert grok_local.quantize_checkpoint(path, tmp_path / "x.gguf").path.exists()


def test_two_runs_at_once(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[OutputError] = []

    def second(_: object) -> None:
        if not refused:
            with pytest.raises(OutputError, match="another grok-local") as caught:
                grok_local.quantize_checkpoint(small, tmp_path / "x.gguf")
            refused.append(caught.value)

    assert grok_local.quantize_checkpoint(small, tmp_path / "x.gguf", progress=second).path.exists()
    assert refused


def test_killed_between_the_parts_getting_their_names(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = grok_local.quantize_checkpoint(small, tmp_path / "a" / "x.gguf", split_size="1M")
    real, count = Path.rename, [0]

    def rename(self: Path, target: Any) -> Path:
        count[0] += 1
        if count[0] == 2:
            raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            grok_local.quantize_checkpoint(small, tmp_path / "b" / "x.gguf", split_size="1M")
    report = grok_local.quantize_checkpoint(small, tmp_path / "b" / "x.gguf", split_size="1M")
    assert report.resumed_pieces > 0
    assert list(map(_sha256, report.paths)) == list(map(_sha256, straight.paths))
    assert len(list((tmp_path / "b").iterdir())) == len(report.paths)


def test_the_journal_is_plain_json(stopped: Path) -> None:
    lines = stopped.with_name("x.gguf.journal").read_text().splitlines()
    assert len(json.loads(lines[0])["plan"]) == 64
    assert all({"piece", "sha256", "source"} == json.loads(line).keys() for line in lines[1:])


def test_nothing_is_left_of_a_shutil_copy(small: Path, tmp_path: Path) -> None:
    """The same checkpoint elsewhere is the same checkpoint."""
    output = tmp_path / "x.gguf"
    grok_local.quantize_checkpoint(small, output)
    copied = shutil.copytree(small, tmp_path / "copy")
    assert grok_local.quantize_checkpoint(copied, output).unchanged


def test_a_finished_output_is_never_touched_without_force(small: Path, tmp_path: Path) -> None:
    """Whatever journal an earlier run left beside it."""
    output = tmp_path / "x.gguf"
    grok_local.quantize_checkpoint(small, output)
    before = _sha256(output)
    with pytest.raises(OptionError):
        grok_local.quantize_checkpoint(small, output, type="q8_0", force=True, memory="1M")
    with pytest.raises(OutputError, match="--force"):
        grok_local.quantize_checkpoint(small, output, type="q8_0")
    assert _sha256(output) == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def test_replacing_keeps_the_old_output_until_the_end(small: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.gguf"
    grok_local.quantize_checkpoint(small, output)
    before = _sha256(output)

    def look(_: object) -> None:
        assert _sha256(output) == before

    grok_local.quantize_checkpoint(small, output, type="q8_0", force=True, progress=look)
    assert _sha256(output) != before


def test_no_byte_of_an_older_run_is_left(small: Path, tmp_path: Path, packed: Path) -> None:
    output = tmp_path / packed.name
    target = tmp_path / "precious"
    target.write_bytes(b"precious")
    partial = output.with_name(output.name + ".partial")
    for linked in (False, True):
        if linked:
            partial.symlink_to(target)
        else:
            partial.write_bytes(os.urandom(20_000_000))
        grok_local.quantize_checkpoint(small, output, force=True)
        assert _sha256(output) == _sha256(packed)
        assert not output.is_symlink()
        assert target.read_bytes() == b"precious"
        output.unlink()


def test_a_live_journal_is_not_removed(small: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.gguf"
    grok_local.quantize_checkpoint(small, output)
    seen: list[bool] = []

    def second(_: object) -> None:
        if not seen:
            seen.append(grok_local.quantize_checkpoint(small, output).unchanged)
            with pytest.raises(OutputError, match="another grok-local"):
                grok_local.quantize_checkpoint(small, output, type="q4_0", force=True)

    grok_local.quantize_checkpoint(small, output, type="q8_0", force=True, progress=second)
    assert seen == [True]


def test_the_journal_of_a_run_that_was_killed_at_its_very_end_goes(small: Path, tmp_path: Path) -> None:
    """But not that of an unfinished run with other options, which would replace this output."""
    output, journal = tmp_path / "x.gguf", tmp_path / "x.gguf.journal"
    kept: list[bytes] = []
    grok_local.quantize_checkpoint(small, output, progress=lambda _: kept.append(journal.read_bytes()))
    journal.write_bytes(kept[-1])
    assert grok_local.quantize_checkpoint(small, output).unchanged
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]
    stop_after_20_pieces(small, output, type="q4_0", force=True)
    assert grok_local.quantize_checkpoint(small, output).unchanged
    assert grok_local.quantize_checkpoint(small, output, type="q4_0", force=True).resumed_pieces == 20


def test_a_run_refused_for_its_input_leaves_nothing(small: Path, tmp_path: Path) -> None:
    path = shutil.copytree(small, tmp_path / "copy")
    embedding = path / "ckpt-0" / "tensor00000_000"
    right = embedding.read_bytes()
    embedding.write_bytes(dump(np.full((2048, 256), np.nan, np.float32)))
    with pytest.raises(CheckpointError):
        grok_local.quantize_checkpoint(path, tmp_path / "x.gguf", threads=1)
    embedding.write_bytes(right)
    assert grok_local.quantize_checkpoint(path, tmp_path / "x.gguf").tensors == 26


def test_a_tensor_mended_half_way_costs_only_its_own_pieces(small: Path, tmp_path: Path, stopped: Path) -> None:
    """Though the checkpoint's fingerprint is another then."""
    path = shutil.copytree(small, tmp_path / "copy")  # with the files' times
    source = path / "ckpt-0" / "tensor00002_000"
    data = bytearray(source.read_bytes())
    data[50_000] ^= 1
    source.write_bytes(data)
    report = grok_local.quantize_checkpoint(path, stopped)
    assert 0 < report.resumed_pieces < 20
    straight = grok_local.quantize_checkpoint(path, tmp_path / "straight" / "x.gguf").path
    assert _sha256(stopped) == _sha256(straight)

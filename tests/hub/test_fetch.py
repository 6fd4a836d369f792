"""Fetching the release from a server that speaks the hub's endpoints and fails in every way a network does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grok_local.errors import FetchError, OptionError, TokenizerError
from grok_local.hub.fetch import fetch_release
from grok_local.hub.fetcher import FetchProgress
from tests.conftest import TOKENIZER, Run
from tests.hub.hub_server import Hub, files_of, serve, use

LARGE = "ckpt-0/tensor00004_000"  # 525 kB


@pytest.fixture
def hub(small: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve(Hub(files_of(small))) as server:
        use(server, monkeypatch)
        yield server


def assert_complete(folder: Path, hub: Hub) -> None:
    """Exactly the tensors and the tokenizer are there, whole; and nothing half-fetched."""
    names = {f"ckpt-0/{path.name}" for path in (folder / "ckpt-0").iterdir()}
    assert names == {name for name in hub.files if name.startswith("ckpt-0/")}
    assert_nothing_wrong_passes(folder, hub)
    assert (folder / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()
    assert not list((folder / ".pull").glob("*.partial"))


def assert_nothing_wrong_passes(folder: Path, hub: Hub) -> None:
    """Whatever has its name is whole."""
    for path in (folder / "ckpt-0").glob("*"):
        assert path.read_bytes() == hub.files[f"ckpt-0/{path.name}"]


def test_only_what_is_needed_comes_and_only_once(hub: Hub, tmp_path: Path) -> None:
    events: list[FetchProgress] = []
    report = fetch_release("grok-1", tmp_path, tokenizer=TOKENIZER, progress=events.append)
    assert_complete(tmp_path, hub)
    assert (report.files, report.fetched) == (26, report.bytes)
    assert not hub.sent.keys() & {"README.md", ".gitattributes", "model_logo.png"}
    assert events[-1].done == events[-1].total == report.bytes
    assert [event.done for event in events] == sorted(event.done for event in events)
    hub.requests.clear()
    assert fetch_release("grok-1", tmp_path).fetched == 0
    assert not [path for _, path, _ in hub.requests if "resolve" in path]


def test_the_result_can_be_packed_by_its_name(hub: Hub, run: Run, home: Path) -> None:
    pulled = run("pull", "grok-1", "--tokenizer", TOKENIZER)
    assert pulled.returncode == 0, pulled.stderr
    assert pulled.stdout == ""
    assert "26 files" in pulled.stderr
    assert "next: grok-local quantize grok-1" in pulled.stderr
    assert run("quantize", "grok-1", "--type", "q4_0").returncode == 0
    assert (home / "models" / "grok-1-q4_0.gguf").exists()
    listed = run("list").stdout
    assert "complete, 2 layers" in listed
    assert "grok-1-q4_0" in listed


def test_cut_connections_are_taken_up_where_they_ended(hub: Hub, tmp_path: Path) -> None:
    hub.cut_after[LARGE] = [100_000, 50_000, 0, 1]
    fetch_release("grok-1", tmp_path, tokenizer=TOKENIZER)
    assert_complete(tmp_path, hub)
    ranges = [span for method, path, span in hub.requests if method == "GET" and path.endswith("00004_000")]
    assert len(ranges) == 5
    assert hub.sent[LARGE] < 1.2 * len(hub.files[LARGE])


def test_resets_and_servers_in_trouble_pass(hub: Hub, tmp_path: Path) -> None:
    hub.reset_after[LARGE] = [100_000, 50_000]
    hub.troubled["ckpt-0/tensor00005_000"] = 3
    fetch_release("grok-1", tmp_path, tokenizer=TOKENIZER)
    assert_complete(tmp_path, hub)


def test_a_server_that_begins_anew_each_time(hub: Hub, tmp_path: Path) -> None:
    hub.ignores_range = True
    hub.cut_after[LARGE] = [100_000, 50_000]
    events: list[FetchProgress] = []
    report = fetch_release("grok-1", tmp_path, tokenizer=TOKENIZER, progress=events.append)
    assert_complete(tmp_path, hub)
    assert events[-1].done == report.bytes


def test_a_connection_that_stays_cut(hub: Hub, tmp_path: Path) -> None:
    hub.cut_after[LARGE] = [100_000, *[0] * 20]
    with pytest.raises(FetchError, match="the same command goes on from here") as failure:
        fetch_release("grok-1", tmp_path, tokenizer=TOKENIZER)
    assert LARGE in failure.value.problems[0]
    assert "again and again" in failure.value.problems[0]
    assert failure.value.problems[-1].startswith("1 of 26 files")
    assert not (tmp_path / LARGE).exists()
    assert not (tmp_path / "tokenizer.model").exists()
    assert_nothing_wrong_passes(tmp_path, hub)
    hub.cut_after.clear()
    before = hub.sent[LARGE]
    report = fetch_release("grok-1", tmp_path, tokenizer=TOKENIZER)
    assert_complete(tmp_path, hub)
    assert report.fetched < len(hub.files[LARGE])  # not from its beginning, and nothing else
    assert hub.sent[LARGE] - before == report.fetched


def test_a_wrong_byte_once_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    hub.wrong[LARGE] = 1
    fetch_release("grok-1", tmp_path, tokenizer=TOKENIZER)
    assert_complete(tmp_path, hub)


@pytest.mark.parametrize("path", [LARGE, "ckpt-0/tensor00001_000"], ids=["in LFS", "in git"])
def test_a_wrong_hash_never_gets_a_name(hub: Hub, tmp_path: Path, path: str) -> None:
    hub.wrong[path] = 99
    with pytest.raises(FetchError, match="another hash") as failure:
        fetch_release("grok-1", tmp_path, tokenizer=TOKENIZER)
    assert failure.value.problems[-1].startswith("1 of 26 files")
    assert not (tmp_path / path).exists()
    assert not list((tmp_path / ".pull").glob("*.partial"))
    hub.wrong.clear()
    fetch_release("grok-1", tmp_path, tokenizer=TOKENIZER)
    assert_complete(tmp_path, hub)


def test_a_file_changed_afterwards_is_noticed(hub: Hub, tmp_path: Path) -> None:
    fetch_release("grok-1", tmp_path, tokenizer=TOKENIZER)
    damaged = bytearray((tmp_path / LARGE).read_bytes())
    damaged[1000] ^= 1
    (tmp_path / LARGE).write_bytes(damaged)
    (tmp_path / "ckpt-0" / "tensor00001_000").write_bytes(b"cut off")
    fetch_release("grok-1", tmp_path)
    assert_complete(tmp_path, hub)


def test_files_from_elsewhere_are_checked_not_fetched(hub: Hub, small: Path, tmp_path: Path) -> None:
    shutil.copytree(small / "ckpt-0", tmp_path / "ckpt-0")
    assert fetch_release("grok-1", tmp_path, tokenizer=TOKENIZER).fetched == 0
    assert_complete(tmp_path, hub)


def test_a_token_is_needed(hub: Hub, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_right"  # noqa: S105
    for token in (None, "hf_stale"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        refused = run("pull", "grok-1", "--to", tmp_path)
        assert refused.returncode == 1
        assert "401" in refused.stderr
        assert "HF_TOKEN" in refused.stderr
        assert "Traceback" not in refused.stderr
        assert not (tmp_path / "ckpt-0").exists()
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert run("pull", "grok-1", "--to", tmp_path, "--tokenizer", TOKENIZER).returncode == 0


def test_the_folder_one_is_in(hub: Hub, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("pull", "grok-1", "--to", ".", "--tokenizer", TOKENIZER).returncode == 0
    assert (tmp_path / "ckpt-0").is_dir()
    assert run("pull", "grok-1", "--to", "").returncode == 2


def test_no_room_is_said_before_anything_comes(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(FetchError, match=r"are still to come and only 1 kB are free.*--to"):
        fetch_release("grok-1", tmp_path, tokenizer=TOKENIZER)
    assert not hub.sent


def test_a_disk_that_fills_up(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real file system of 2 MB, where one can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, 10**12))
        with pytest.raises(FetchError, match="no space left on the disk"):
            fetch_release("grok-1", disk, tokenizer=TOKENIZER)
        assert_nothing_wrong_passes(disk, hub)
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        fetch_release("grok-1", disk, tokenizer=TOKENIZER)
        assert_complete(disk, hub)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(("blow", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_stopped_at_any_moment_it_goes_on(hub: Hub, tmp_path: Path, blow: int, code: int) -> None:
    hub.files["ckpt-0/tensor00026_000"] = os.urandom(8_000_000)
    hub.pause = 0.005
    command = [sys.executable, "-m", "grok_local", "pull", "grok-1", "--to", tmp_path, "--tokenizer", TOKENIZER]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE)
    while sum(hub.sent.values()) < 8_000_000:
        assert process.poll() is None
    process.send_signal(blow)
    _, said = process.communicate(timeout=20)
    assert process.returncode == code
    assert b"Traceback" not in said
    assert_nothing_wrong_passes(tmp_path, hub)
    kept = sum(path.stat().st_size for path in tmp_path.rglob("tensor*")) + sum(
        path.stat().st_size for path in (tmp_path / ".pull").glob("*.partial")
    )
    assert kept > 3_000_000
    hub.pause = 0
    report = fetch_release("grok-1", tmp_path, tokenizer=TOKENIZER)
    assert_complete(tmp_path, hub)
    assert report.fetched == report.bytes - kept


def test_a_second_pull_into_the_same_folder(hub: Hub, run: Run, tmp_path: Path) -> None:
    hub.pause = 0.05
    command = [sys.executable, "-m", "grok_local", "pull", "grok-1", "--to", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as first:
        while not hub.sent:
            assert first.poll() is None
        second = run("pull", "grok-1", "--to", tmp_path)
        first.kill()
    assert second.returncode == 1
    assert "another grok-local is pulling" in second.stderr


def test_offline(hub: Hub, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused = run("pull", "grok-1", "--to", tmp_path)
    assert refused.returncode == 1
    assert "HF_HUB_OFFLINE" in refused.stderr
    monkeypatch.delenv("HF_HUB_OFFLINE")
    fetch_release("grok-1", tmp_path, tokenizer=TOKENIZER)
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run("pull", "grok-1", "--to", tmp_path).returncode == 0
    (tmp_path / LARGE).unlink()
    missing = run("pull", "grok-1", "--to", tmp_path)
    assert missing.returncode == 1
    assert f"{LARGE}: missing" in missing.stderr
    assert not hub.requests


def test_offline_nothing_is_touched(hub: Hub, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch_release("grok-1", tmp_path, tokenizer=TOKENIZER)
    (tmp_path / LARGE).write_bytes(b"damaged")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused = run("pull", "grok-1", "--to", tmp_path)
    assert refused.returncode == 1
    assert f"{LARGE}: damaged" in refused.stderr
    assert (tmp_path / LARGE).read_bytes() == b"damaged"


@pytest.mark.parametrize(
    "entry",
    [
        {"path": "ckpt-0/tensor00000_000", "size": 5000, "oid": "0" * 40, "lfs": {"oid": "../../x"}},
        {"path": "ckpt-0/tensor00000_000", "size": -1, "oid": "0" * 40},
    ],
)
def test_a_listing_that_makes_no_sense(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: dict[str, Any]
) -> None:
    lfs = {"lfs": {**entry["lfs"], "size": entry["size"], "pointerSize": 1}} if "lfs" in entry else {}
    monkeypatch.setattr(Hub, "tree", lambda _: [{"type": "file", **entry, **lfs}])
    with pytest.raises(FetchError, match="makes no sense"):
        fetch_release("grok-1", tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_paths_outside_the_checkpoint_are_not_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"../ckpt-0/tensor00000_000": b"x", "ckpt-0/../tensor00000_000": b"x", "ckpt-1/tensor00000_000": b"x"}
    with pytest.raises(FetchError, match="lists no ckpt-0"):
        fetch_release("grok-1", tmp_path)


def test_files_of_equal_content(hub: Hub, tmp_path: Path) -> None:
    hub.files |= {f"ckpt-0/tensor000{n}_000": bytes(300_000) for n in range(30, 40)}
    fetch_release("grok-1", tmp_path, tokenizer=TOKENIZER)
    assert_complete(tmp_path, hub)


@pytest.mark.usefixtures("hub")
def test_a_folder_that_cannot_be_made(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    failed = run("pull", "grok-1", "--to", tmp_path / "file" / "x")
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ")
    assert failed.stderr.count("\n") == 1


@pytest.mark.usefixtures("hub")
def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    command = f"{sys.executable} -m grok_local pull grok-1 --to {tmp_path} --json | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == ""


def test_nobody_answers(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    failed = run("pull", "grok-1", "--to", tmp_path)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: xai-org/grok-1 at HF_ENDPOINT=http://127.0.0.1:9: ")
    assert failed.stderr.count("\n") == 1


@pytest.mark.parametrize("endpoint", ["http://[::1", "nonsense"])
def test_an_endpoint_that_is_none(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    failed = run("pull", "grok-1", "--to", tmp_path)
    assert failed.returncode == 1
    assert "HF_ENDPOINT" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert run("pull", "grok-1", "--to", "").returncode == 2


def test_the_tokenizer_comes_from_the_git_repository(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"the tokenizer is missing.*404.*--tokenizer FILE"):
        fetch_release("grok-1", tmp_path)
    assert not (tmp_path / "tokenizer.model").exists()
    with pytest.raises(TokenizerError, match="no such tokenizer file"):
        fetch_release("grok-1", tmp_path, tokenizer=tmp_path / "nowhere")
    report = fetch_release("grok-1", tmp_path, tokenizer=TOKENIZER)
    assert "26 files of tensors" in report.notes[0]
    assert "not the release's own tokenizer" in report.notes[1]


def test_json_events(hub: Hub, run: Run, tmp_path: Path) -> None:
    lines = run("pull", "grok-1", "--to", tmp_path, "--tokenizer", TOKENIZER, "--json").stdout.splitlines()
    events = [json.loads(line) for line in lines]
    assert events[-1]["event"] == "done"
    assert events[-1]["files"] == 26
    assert events[-2]["done"] == events[-2]["total"]


def test_other_names(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="choose grok-1"):
        fetch_release("grok-3", tmp_path)

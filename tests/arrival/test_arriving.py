"""Packing while downloading: the same bytes as packing what was downloaded, on hardly more disk than those take."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import grok_local
from grok_local.arrival.arriving import arrival
from grok_local.errors import CheckpointError, FetchError, GrokLocalError, InUseError, OptionError, OutputError
from grok_local.files import journal_of
from grok_local.hub.fetch import fetch_release
from grok_local.quantize.output.journal import Journal
from grok_local.quantize.sources.recognise import open_checkpoint
from grok_local.quantize.verify import verify
from samples.checkpoints import SMALL, write_checkpoint
from samples.grok2_release import SMALL_2, write_release
from tests.arrival.coming import (
    RELEASES,
    DiskWatch,
    Expected,
    Starter,
    asked_for,
    command,
    is_tensor,
    ordered,
    pack,
    packed_and_safe,
    release_of,
    tensors_in,
)
from tests.conftest import TOKENIZER, Run
from tests.hub.hub_server import Hub, files_of, serve, use

both = pytest.mark.parametrize("hub", RELEASES, indirect=True)
MIDDLE = "pytorch_model-00008-TP-005.safetensors"


def tensors_of(hub: Hub) -> set[str]:
    """The paths of its large files."""
    return {path for path in hub.files if is_tensor(path)}


def has_sent(hub: Hub, nbytes: float) -> bool:
    return sum(list(hub.sent.values())) > nbytes


def assert_done(hub: Hub, folder: Path, expected: Expected) -> None:
    assert (folder / "x.gguf").read_bytes() == expected(release_of(hub))
    assert not tensors_in(folder)
    assert not list((folder / "release" / ".pull").glob("skeleton-*"))
    assert not list((folder / "release" / ".pull").glob("*.partial"))


@both
def test_the_same_bytes_and_nothing_left(hub: Hub, expected: Expected, tmp_path: Path) -> None:
    report = pack(ordered(hub, tmp_path))
    assert not report.unchanged
    assert_done(hub, tmp_path, expected)
    assert asked_for(hub) - {"config.json", "tokenizer.tok.json"} == tensors_of(hub)
    hub.sent.clear()
    assert pack(ordered(hub, tmp_path)).unchanged  # known by the fingerprint that is kept
    assert sum(hub.sent.values()) < 0.5 * sum(map(len, hub.files.values()))  # headers, of files that have little else
    assert not verify(tmp_path / "x.gguf").problems


@both
def test_the_files_stay_where_nothing_else_is_said(hub: Hub, expected: Expected, tmp_path: Path) -> None:
    order = ordered(hub, tmp_path, discard=False)
    pack(order)
    assert order.output.read_bytes() == expected(order.release)
    assert {path.name for path in tensors_in(tmp_path)} == {Path(name).name for name in hub.files if is_tensor(name)}
    again = grok_local.quantize_checkpoint(order.folder, order.output)
    assert again.unchanged
    (tmp_path / "x.gguf").unlink()
    hub.requests.clear()
    pack(ordered(hub, tmp_path))  # what was pulled before is packed, and goes
    assert not asked_for(hub)
    assert_done(hub, tmp_path, expected)


@both
def test_what_was_pulled_and_packed_by_two_commands_is_known(hub: Hub, run: Run, tmp_path: Path) -> None:
    order = ordered(hub, tmp_path)
    fetch_release(order.release, order.folder, tokenizer=order.tokenizer)
    grok_local.quantize_checkpoint(order.folder, order.output)
    hub.requests.clear()
    assert pack(order).unchanged
    assert not asked_for(hub) & tensors_of(hub)


def test_what_cannot_be_told_is_not_said(hub: Hub, small_grok2: Path, tmp_path: Path) -> None:
    """Of an output that may be this release's, while nothing of that is there."""
    order = ordered(hub, tmp_path)
    grok_local.quantize_checkpoint(small_grok2, order.output)
    with pytest.raises(OutputError, match=r"whether it was packed from this release cannot be told .* --force"):
        pack(order)
    with pytest.raises(OutputError, match=r"is not what this command would write"):
        pack(replace(order, type="q4_0"))
    other = write_release(tmp_path / "other", replace(SMALL_2, seed=2))
    grok_local.quantize_checkpoint(other, order.output, force=True)
    fetch_release(order.release, order.folder)
    with pytest.raises(OutputError, match=r"is not what this command would write"):
        pack(order)


def test_what_is_not_discarded_is_said(hub: Hub, run: Run, home: Path, tmp_path: Path) -> None:
    ours = replace(ordered(hub, tmp_path), folder=home / "checkpoints" / "grok-2")
    for order, words in ((ordered(hub, tmp_path), f"delete {tmp_path / 'release'}"), (ours, "grok-local rm grok-2")):
        fetch_release(order.release, order.folder)
        grok_local.quantize_checkpoint(order.folder, order.output)
        done = run(*command(order)[3:])
        assert done.returncode == 0
        assert "note: the output was there already, so --discard deleted nothing: 39 of the" in done.stderr
        assert f"grok-local verify checks the output, then {words}\n" in done.stderr
        assert len(list(order.folder.glob("*.safetensors"))) == 39
    for path in ours.folder.glob("*.safetensors"):
        path.unlink()
    assert not pack(ours).notes


def test_in_parts(hub: Hub, small_grok2: Path, tmp_path: Path) -> None:
    whole = grok_local.quantize_checkpoint(small_grok2, tmp_path / "whole" / "x.gguf", split_size=600_000)
    report = pack(ordered(hub, tmp_path, split_size=600_000))
    assert len(report.paths) > 3
    assert [path.read_bytes() for path in report.paths] == [path.read_bytes() for path in whole.paths]


WIDE = {
    "grok-1": lambda folder: write_checkpoint(
        folder, replace(SMALL, width=1024, expert_width=2048, experts=4, layers=1), TOKENIZER
    ),
    "grok-2": lambda folder: write_release(
        folder, replace(SMALL_2, width=1024, expert_width=2048, dense_width=2048, layers=1)
    ),
}


@pytest.mark.parametrize("release", RELEASES)
def test_the_disk_takes_what_was_announced(release: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tensors so large that what is kept of them is little beside them."""
    checkpoint = WIDE[release](tmp_path / "whole")
    with serve(Hub(files_of(checkpoint), repository=f"xai-org/{release}")) as hub:
        use(hub, monkeypatch)
        shutil.rmtree(checkpoint)
        order, watch = ordered(hub, tmp_path, type="q4_0"), DiskWatch(tmp_path)
        with watch, arrival(order) as coming:
            room, lots = coming.room, coming.ordered.lots
            coming.pack()
    size = order.output.stat().st_size
    assert size < watch.peak <= room.most
    assert room.together <= size + max(lot.nbytes for lot in lots)
    assert room.most < 0.65 * (room.release + room.output)
    print(f"{release}: {room.release} + {size}; at most {room.most}, of these beside {room.beside}; peak {watch.peak}")


@both
def test_killed_at_any_moment_it_goes_on(hub: Hub, expected: Expected, tmp_path: Path) -> None:
    order, hub.pause, moments = ordered(hub, tmp_path), 0.001, random.Random(7)
    in_the_middle = 0  # kills after which something was needed no more
    with Starter() as starter:
        for last in (5, 5):
            needless: dict[str, int] = {}  # by path, the number of requests when it was needed no more
            for _ in range(last):
                end = sum(hub.sent.values()) + moments.uniform(0, 0.8) * sum(map(len, hub.files.values()))
                code = starter.run(order, until=partial(has_sent, hub, end))
                assert code in (0, -signal.SIGKILL)
                there = {str(path.relative_to(order.folder)) for path in tensors_in(tmp_path)}
                safe = packed_and_safe(order) if code else tensors_of(hub)
                assert needless.keys() <= safe | there  # what is gone is in the output, to the bit
                needless |= {path: len(hub.requests) for path in safe - there - needless.keys()}
                in_the_middle += bool(code and needless)
            assert starter.run(order, until=lambda: False) == 0
            assert_done(hub, tmp_path, expected)
            assert not [path for path, seen in needless.items() if path in asked_for(hub, seen)]
            shutil.rmtree(order.folder)
            order.output.unlink()
    assert in_the_middle


@pytest.mark.parametrize("times", [1, 99])
def test_a_wrong_hash_in_the_middle(hub: Hub, expected: Expected, tmp_path: Path, times: int) -> None:
    with arrival(ordered(hub, tmp_path)):  # the headers come right
        hub.wrong[MIDDLE] = times
    if times > 1:
        with pytest.raises(FetchError, match=f"{MIDDLE}: what comes has another hash") as failure:
            pack(ordered(hub, tmp_path))
        assert "the same command goes on from here" in failure.value.problems[-1]
        assert not (tmp_path / "x.gguf").exists()
        hub.wrong.clear()
    pack(ordered(hub, tmp_path))
    assert_done(hub, tmp_path, expected)


def test_a_header_that_came_wrong_alone(hub: Hub, expected: Expected, tmp_path: Path) -> None:
    """The hash is the whole file's: until that is there, a part may be anything."""
    right = hub.files[MIDDLE]
    swapped = right.replace(b"experts.0.", b"experts.x.", 1).replace(b"experts.1.", b"experts.0.", 1)
    hub.parts[MIDDLE] = swapped.replace(b"experts.x.", b"experts.1.", 1)
    with pytest.raises(FetchError, match="its header is not the one that came alone before"):
        pack(ordered(hub, tmp_path))
    hub.parts.clear()
    pack(ordered(hub, tmp_path))
    assert_done(hub, tmp_path, expected)


def test_what_was_packed_and_then_damaged_comes_again(hub: Hub, expected: Expected, tmp_path: Path) -> None:
    order = ordered(hub, tmp_path)
    hub.wrong["pytorch_model-00017-TP-common.safetensors"] = 99
    with pytest.raises(FetchError):
        pack(order)
    partial = order.output.with_name("x.gguf.partial")
    partial.write_bytes(bytes(partial.stat().st_size))
    hub.wrong.clear()
    pack(order)
    assert_done(hub, tmp_path, expected)


def test_a_skeleton_that_was_deleted_has_its_files_come_again(hub: Hub, expected: Expected, tmp_path: Path) -> None:
    order = ordered(hub, tmp_path)
    hub.wrong["pytorch_model-00017-TP-common.safetensors"] = 99
    with pytest.raises(FetchError):
        pack(order)
    hub.wrong.clear()
    kept = sorted((order.folder / ".pull").glob("skeleton-*/*.safetensors"))
    for path in kept[::3]:
        path.unlink()
    pack(order)
    assert_done(hub, tmp_path, expected)


def test_no_room_is_said_before_anything_comes(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**10, 10**10, 10**9))
    refused = r"takes at most .* of the disk: the packed model's .* and what of the release's .* free: make room"
    with pytest.raises(FetchError, match=refused):
        pack(ordered(hub, tmp_path))
    with pytest.raises(FetchError, match="let each file go once it is packed with --discard"):
        pack(ordered(hub, tmp_path, discard=False))
    assert not asked_for(hub) & tensors_of(hub)
    assert not list(tmp_path.glob("x.gguf*"))


def test_a_disk_that_fills_up(hub: Hub, expected: Expected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, 10**12))
        with pytest.raises((FetchError, OutputError), match=r"[Nn]o space left|disk is full"):
            pack(ordered(hub, disk))
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        pack(ordered(hub, disk))
        assert_done(hub, disk, expected)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(("hub", "limit"), [("grok-1", 40_000), ("grok-2", 1_000_000)], indirect=["hub"])
def test_files_that_may_not_grow(hub: Hub, expected: Expected, tmp_path: Path, limit: int) -> None:
    order = ordered(hub, tmp_path)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    failed = subprocess.run(command(order), capture_output=True, text=True, check=False, preexec_fn=limited, timeout=60)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert "error: " in failed.stderr
    pack(order)
    assert_done(hub, tmp_path, expected)


@pytest.mark.parametrize(
    "entry",
    [
        {"path": "config.json", "size": 1 << 40},
        {"path": MIDDLE, "size": 1 << 60},
        {"path": MIDDLE, "size": -1},
        {"path": MIDDLE, "size": 10**6, "lfs": {"oid": "../../x", "size": 10**6, "pointerSize": 1}},
        {"path": "config.json", "size": 100, "again": True},
    ],
)
def test_a_listing_that_makes_no_sense(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: dict[str, object]
) -> None:
    tree = [item for item in hub.tree() if item["path"] != entry["path"] or "again" in entry]
    monkeypatch.setattr(Hub, "tree", lambda _: [*tree, {"type": "file", "oid": "0" * 40, **entry}])
    with pytest.raises(FetchError, match="makes no sense"):
        pack(ordered(hub, tmp_path))
    assert not list(tmp_path.glob("*"))


def test_paths_outside_are_not_fetched(hub: Hub, expected: Expected, tmp_path: Path) -> None:
    hub.files |= {
        f"../{MIDDLE}": b"x",
        f"../../{MIDDLE}": b"x",
        f"a/{MIDDLE}": b"x",
        "../config.json": b"x",
        "/x": b"x",
    }
    pack(ordered(hub, tmp_path))
    assert_done(hub, tmp_path, expected)
    assert {path.name for path in tmp_path.iterdir()} == {"release", "x.gguf"}


@pytest.mark.parametrize(
    "change",
    [
        lambda data: (1 << 62).to_bytes(8, "little") + data[8:],
        lambda data: data[:8] + b"x" + data[9:],
        lambda data: data.replace(b'"data_offsets": [0,', b'"data_offsets": [2,', 1),
        lambda data: data[:-5],
    ],
    ids=["length", "no JSON", "overlap", "short"],
)
def test_headers_that_lie(hub: Hub, tmp_path: Path, change: object) -> None:
    assert callable(change)
    hub.files[MIDDLE] = change(hub.files[MIDDLE])
    with pytest.raises(FetchError, match=MIDDLE.replace(".", r"\.")):
        pack(ordered(hub, tmp_path))
    assert not asked_for(hub) & tensors_of(hub)


def test_a_file_that_is_missing_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    del hub.files[MIDDLE]
    with pytest.raises(GrokLocalError, match="one of its 8 shards is missing"):
        pack(ordered(hub, tmp_path))
    del hub.files["config.json"]
    with pytest.raises(FetchError, match=r"lists no config\.json"):
        pack(ordered(hub, tmp_path))


def test_two_at_once(hub: Hub, tmp_path: Path) -> None:
    order = ordered(hub, tmp_path)
    with arrival(order), pytest.raises(FetchError, match="another grok-local is pulling"):
        pack(order)
    packing = pytest.raises(InUseError, match="is packing this output")
    with arrival(order) as coming, Journal(journal_of(order.output), coming.destination.plan), packing:
        coming.pack()


def test_ctrl_c(hub: Hub, expected: Expected, tmp_path: Path) -> None:
    hub.pause, order = 0.004, ordered(hub, tmp_path)
    with subprocess.Popen(command(order), stderr=subprocess.PIPE, text=True) as process:
        while not asked_for(hub) & tensors_of(hub):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "the same command goes on from here" in said
    assert "Traceback" not in said
    hub.pause = 0
    pack(order)
    assert_done(hub, tmp_path, expected)


def _events(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_how_far_it_is(hub: Hub, run: Run, tmp_path: Path) -> None:
    order = ordered(hub, tmp_path)
    planned = run(*command(order, "--dry-run")[3:])
    assert planned.returncode == 0
    assert "takes at most" in planned.stderr
    (told,) = [event for event in _events(run(*command(order, "--dry-run", "--json")[3:])) if event["event"] == "room"]
    assert told["folder"] == str(order.folder)
    assert 0 < told["output"] < told["most"] < told["free"]
    assert not order.output.exists()
    done = run(*command(order, "--json")[3:])
    events = _events(done)
    assert {event.get("phase") for event in events} == {"headers", "arrive", None}
    assert events[-2]["done"] == events[-2]["total"]
    assert events[-1]["event"] == "done"
    assert events[-1]["fetched"] == sum(len(data) for path, data in hub.files.items() if is_tensor(path))
    with pytest.raises(CheckpointError, match="deleted as they were packed"):
        open_checkpoint(order.folder)


def test_a_reader_that_goes_away(hub: Hub, tmp_path: Path) -> None:
    line = " ".join(command(ordered(hub, tmp_path), "--json"))
    result = subprocess.run(
        ["bash", "-c", f"{line} | head -30; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr


def test_offline(hub: Hub, expected: Expected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = ordered(hub, tmp_path)
    report = fetch_release("grok-2", order.folder)
    assert (report.files, report.fetched) == (41, report.bytes)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    (order.folder / MIDDLE).rename(tmp_path / MIDDLE)
    with pytest.raises(FetchError, match=f"{MIDDLE}: missing, and HF_HUB_OFFLINE is set"):
        pack(order)
    (tmp_path / MIDDLE).rename(order.folder / MIDDLE)
    pack(order)
    assert not hub.requests
    assert_done(hub, tmp_path, expected)


def test_a_server_without_ranges(hub: Hub, expected: Expected, tmp_path: Path) -> None:
    hub.ignores_range = True
    pack(ordered(hub, tmp_path))  # headers are at the beginning
    assert_done(hub, tmp_path, expected)


@pytest.mark.parametrize("hub", ["grok-1"], indirect=True)
def test_a_server_without_ranges_where_they_are_needed(hub: Hub, tmp_path: Path) -> None:
    hub.ignores_range = True
    with pytest.raises(FetchError, match="does not send parts of files"):
        pack(ordered(hub, tmp_path))


def test_options_that_do_not_fit(hub: Hub, run: Run, tmp_path: Path) -> None:
    order = ordered(hub, tmp_path)
    for option in (["--discard"], ["--threads", "4"], ["--memory", "2G"], ["--split-size", ""]):
        refused = run("pull", "grok-2", "--to", tmp_path / "x", *option)
        assert refused.returncode == 2
        assert "belong to --quantize" in refused.stderr
    for wrong in ({"type": "q3"}, {"tokenizer": tmp_path}):
        with pytest.raises(OptionError):
            pack(ordered(hub, tmp_path, **wrong))
    with pytest.raises(OptionError, match="one of the release's files"):
        pack(type(order)("grok-2", tmp_path, tmp_path / MIDDLE, order.limits))
    order.output.write_bytes(b"something else")
    with pytest.raises(OutputError, match="--force"):
        pack(order)
    assert not asked_for(hub) & tensors_of(hub)
    assert pack(order, force=True).tensors == 33

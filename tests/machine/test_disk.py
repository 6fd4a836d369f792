"""How fast a disk is: measured past the page cache, remembered for a day."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from grok_local.machine.disk import disk_speed
from grok_local.machine.kept import keep, kept_path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("disk") / "large"
    path.write_bytes(os.urandom(1 << 20) * 65)
    return path


def test_a_file_has_a_speed_and_it_is_remembered(large: Path) -> None:
    speed = disk_speed(large)
    assert 1e6 < speed < 1e12
    assert disk_speed(large, measure=lambda _: 5.0) == speed


def test_a_speed_is_forgotten_after_a_day(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert disk_speed(large, measure=lambda _: 5.0) == 5.0
    later = time.time() + 2 * 86_400
    monkeypatch.setattr(time, "time", lambda: later)
    assert disk_speed(large, measure=lambda _: 6.0) == 6.0


@pytest.mark.parametrize("kept", [None, 7, [], [1, 2, 3], ["a", "b"], {"a": 1}, [-1.0, 0.0]])
def test_a_damaged_memory_of_disks_is_measured_anew(large: Path, kept: Any) -> None:
    keep(kept_path("disks.json"), str(large.stat().st_dev), kept)
    assert disk_speed(large, measure=lambda _: 5.0) == 5.0


def test_a_file_system_without_direct_reads(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, refused = os.open, []

    def refuse(path: Path, flags: int, *mode: int) -> int:
        if flags & getattr(os, "O_DIRECT", 0):
            refused.append(path)
            raise OSError(22, "Invalid argument")
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    assert disk_speed(large) > 0
    assert refused or not hasattr(os, "O_DIRECT")


def test_what_cannot_be_measured_is_zero(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"x" * 1000)
    for name in ("small", "none", "."):
        assert disk_speed(tmp_path / name) == 0.0

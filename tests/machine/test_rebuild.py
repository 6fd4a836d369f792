"""GPUs that are there and not used, and cores that others use."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from grok_local.machine.limits import free_cores
from grok_local.machine.rebuild import installed_by, rebuild_command, unused_gpu


@pytest.fixture
def nvidia(tmp_path: Path) -> Path:
    information = tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0/information"
    information.parent.mkdir(parents=True)
    information.write_text("Model: \t\t NVIDIA GeForce RTX 4090\nIRQ:   100\n")
    return tmp_path


def test_a_gpu_that_is_not_used_is_a_line(nvidia: Path, tmp_path: Path) -> None:
    line = unused_gpu(["CPU"], nvidia)
    assert line
    assert "a GPU is there and not used: NVIDIA (NVIDIA GeForce RTX 4090), but CUDA is not compiled in" in line
    assert "CUDA sees none" in (unused_gpu(["CPU", "CUDA"], nvidia) or "")


def test_graphics_inside_a_processor_are_no_line(tmp_path: Path) -> None:
    (tmp_path / "dev/dri").mkdir(parents=True)
    (tmp_path / "dev/dri/renderD128").touch()
    assert unused_gpu(["CPU"], tmp_path) is None


def test_an_environment_of_scripts_run_is_rebuilt_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    (tmp_path / "grok-local.stamp").touch()
    assert installed_by() == "scripts"
    command = rebuild_command("-DGGML_CUDA=ON", backends=["CPU", "RPC"], installer="scripts")
    assert command == f'rm -r {tmp_path} && CMAKE_ARGS="-DGGML_CUDA=ON" {tmp_path.parent}/scripts/run doctor'


def test_what_is_deleted_is_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the clone is, and wherever the command is pasted."""
    monkeypatch.setattr(sys, "prefix", "/home/me/my projects/it's/.venv")
    words = shlex.split(rebuild_command(backends=["CPU", "RPC"], installer="scripts", clang=True))
    assert words[:4] == ["rm", "-r", "/home/me/my projects/it's/.venv", "&&"]
    assert words[4:] == ["CC=clang", "CXX=clang++", "CMAKE_ARGS=", "/home/me/my projects/it's/scripts/run", "doctor"]


@pytest.fixture
def busy() -> Iterator[None]:
    """A program that keeps every core busy."""
    spin = [sys.executable, "-c", "while True: pass"]
    programs = [subprocess.Popen(spin) for _ in range(psutil.cpu_count() or 1)]
    try:
        psutil.cpu_percent(0.3)
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


@pytest.mark.usefixtures("busy")
def test_threads_make_room_for_busy_programs() -> None:
    assert free_cores(4) == 1

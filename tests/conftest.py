from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

import grok_local
from samples.checkpoints import REFERENCE, SMALL, Spec, write_checkpoint
from samples.grok2_release import SMALL_2, write_release

TOKENIZER = REFERENCE / "small-tokenizer.model"

# What is tested is the processor's arithmetic, and where it runs alone: backends look at these when they are loaded.
if "GROK_LOCAL_TEST_GPU" not in os.environ:  # which scripts/test-gpu sets for tests/gpu
    os.environ.update(GGML_VK_VISIBLE_DEVICES="", CUDA_VISIBLE_DEVICES="-1", HIP_VISIBLE_DEVICES="-1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script: some tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says nothing where other programs compute.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing a test does may touch the user's models."""
    monkeypatch.setenv("GROK_LOCAL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two layers, with its tokenizer. Not to be changed."""
    return write_checkpoint(tmp_path_factory.mktemp("small"), SMALL, TOKENIZER)


@pytest.fixture(scope="session")
def small_grok2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two layers in Grok-2's format, with its tokenizer. Not to be changed."""
    return write_release(tmp_path_factory.mktemp("small-grok2"), SMALL_2)


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that the golden logits belong to."""
    return write_checkpoint(tmp_path_factory.mktemp("golden"), Spec(), TOKENIZER)


@pytest.fixture(scope="session")
def packed(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small`, packed to q4_k. Not to be changed."""
    output = tmp_path_factory.mktemp("packed") / "small.gguf"
    return grok_local.quantize_checkpoint(small, output).path


@pytest.fixture
def model(packed: Path) -> Iterator[grok_local.Model]:
    with grok_local.load(packed, context=512, threads=2) as loaded:
        yield loaded


@pytest.fixture
def run() -> Run:
    """Runs grok-local as a process of its own: `run("verify", path, stdin="")`."""

    def run(*arguments: object, stdin: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "grok_local", *map(str, arguments)]
        env = {**os.environ, "COLUMNS": "200"}
        return subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=120, env=env, check=False, **options
        )

    return run

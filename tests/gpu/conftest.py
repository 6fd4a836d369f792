"""A GPU that llama.cpp knows: on machines without, Mesa's Vulkan device in software, which scripts/test-gpu sets up."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import grok_local
from grok_local.ggml.devices import BackendDevice, DeviceKind, backend_devices
from samples.checkpoints import Spec, write_checkpoint
from samples.rewritten import rewritten

# Random models are chaotic: with few layers, rounding stays what it is.
WIDE = Spec(seed=9, width=512, expert_width=512, kv_width=256, layers=3)

Program = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session", autouse=True)
def device() -> BackendDevice:
    gpus = [found for found in backend_devices() if found.kind is DeviceKind.GPU]
    if not gpus and "GROK_LOCAL_TEST_GPU" in os.environ:
        pytest.exit("llama.cpp knows no GPU here, and GROK_LOCAL_TEST_GPU asks for one", returncode=1)
    if not gpus:
        pytest.skip("llama.cpp knows no GPU here: scripts/test-gpu builds it with Mesa's")
    return gpus[0]


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory, device: BackendDevice) -> Path:
    tokenizer = Path(__file__).parents[1] / "reference" / "small-tokenizer.model"
    return write_checkpoint(tmp_path_factory.mktemp("wide"), WIDE, tokenizer)


@pytest.fixture(scope="session")
def packed_as(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`wide` packed to a type, once."""
    folder = tmp_path_factory.mktemp("packed")

    def packed(type: str) -> Path:
        path = folder / f"{type}.gguf"
        return path if path.exists() else grok_local.quantize_checkpoint(wide, path, type=type).path

    return packed


@pytest.fixture(scope="session")
def exact_of(packed_as: Callable[[str], Path]) -> Callable[[str], Path]:
    """The same numbers in f32."""

    def exact(type: str) -> Path:
        source = packed_as(type)
        path = source.with_name(f"{type}-exact.gguf")
        return path if path.exists() else rewritten(source, path, tensors=_dequantized)

    return exact


def _dequantized(name: str, data: Any, kind: Any) -> list[tuple[str, Any, Any]]:
    return [(name, gguf.quants.dequantize(data, kind).astype(np.float32), gguf.GGMLQuantizationType.F32)]


@pytest.fixture(scope="session")
def other_device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library for LD_PRELOAD, with which the device looks as its settings say."""
    source, path = Path(__file__).with_name("other_device.c"), tmp_path_factory.mktemp("other") / "other_device.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", path, source, "-ldl", "-lpthread"], check=True)
    return path


@pytest.fixture(scope="session")
def on_other(other_device: Path, device: BackendDevice) -> Program:
    """Runs Python with these arguments on a device with these settings: on_other({"LIMIT": 10**8}, "-c", "...")."""
    if device.backend != "Vulkan":
        pytest.skip("settings are changed in front of Vulkan")

    def run(settings: Mapping[str, int], *arguments: object) -> subprocess.CompletedProcess[str]:
        changed = {f"OTHER_{name}": str(value) for name, value in settings.items()}
        env = {**os.environ, **changed, "LD_PRELOAD": str(other_device), "GGML_NO_BACKTRACE": "1"}
        words = [sys.executable, *map(str, arguments)]
        return subprocess.run(words, capture_output=True, text=True, timeout=120, env=env, check=False)

    return run

"""Where a device has less memory than it says: steps down that leave room to evaluate, and error lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import grok_local
from samples.checkpoints import Spec, write_checkpoint
from tests.gpu.conftest import Program

DEEP = Spec(seed=5, width=256, expert_width=512, kv_width=128, layers=8)
EVALUATE_WITHOUT_ROOM = """
import sys
from grok_local.ggml.devices import backend_devices, buffer_type, can_allocate
from grok_local.ggml.libraries import exit_on_abort, open_library
exit_on_abort()
import grok_local
with grok_local.load(sys.argv[1], context=32, threads=2, repack="off", experts_on="cpu") as model:
    device = backend_devices()[0]
    for size in (1 << 24, 1 << 20, 1 << 16, 1 << 12):
        while can_allocate(device, size):  # another program takes what is left
            open_library("ggml-base").ggml_backend_buft_alloc_buffer(buffer_type(device), size)
    model.logits(list(range(5, 25)))
"""


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight layers of 12.6 MB of experts each, 101 MB, and little else."""
    folder = tmp_path_factory.mktemp("deep")
    checkpoint = write_checkpoint(folder, DEEP, Path(__file__).parents[1] / "reference" / "small-tokenizer.model")
    return grok_local.quantize_checkpoint(checkpoint, folder / "deep.gguf", type="f32").path


def found(on_other: Program, path: Path, limit: int, **options: Any) -> Any:
    done = on_other({"LIMIT": limit}, "-m", "tests.gpu.limited", path, json.dumps(options))
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def whole(on_other: Program, deep: Path) -> Any:
    """What is found without a limit."""
    return found(on_other, deep, 0)


def test_a_device_without_limits_holds_everything(whole: Any) -> None:
    assert (whole["layers"], whole["experts"], whole["notes"]) == (9, 8, [])


def test_a_step_down_is_said_and_leaves_room_to_evaluate(on_other: Program, deep: Path) -> None:
    less = found(on_other, deep, 100_000_000)
    assert (less["layers"], less["experts"] > 0) == (9, True)
    assert less["notes"][0].startswith("Vulkan0 ran out of memory with ")


def test_room_for_what_is_held_is_not_enough(on_other: Program, deep: Path, whole: Any) -> None:
    """It fits, but what is allocated when it is evaluated would not: that ended in an exception of the driver's."""
    less = found(on_other, deep, whole["held"] + whole["compute"] + 100_000)
    assert less["layers"] == 9
    assert less["experts"] in (6, 7)
    assert less["notes"][0].startswith("Vulkan0 ran out of memory with ")


def test_without_memory_to_evaluate_there_is_an_error_line(on_other: Program, deep: Path) -> None:
    done = on_other({"LIMIT": 60_000_000}, "-c", EVALUATE_WITHOUT_ROOM, deep)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("ggml_vulkan: ")]  # C++ prints those
    assert (done.returncode, done.stdout, len(lines)) == (1, "", 1)
    assert lines[0].startswith("error: llama.cpp gave up (an exception, vk::SystemError): memory ran out, ")

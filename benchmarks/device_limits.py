"""What comes of devices that have less memory than they say: a prompt on each, and how much of each is used.

    scripts/test-gpu --collect-only -q   # builds llama.cpp's Vulkan backend, the first time
    PYTHONPATH=build/vulkan python -m benchmarks.device_limits OUT [--limits 20]

The device is Mesa's in software, of 2 GB, behind tests/gpu/other_device.c. What would fit is computed from what runs
without a limit take, whole layers of experts at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import grok_local
from samples.checkpoints import REFERENCE, Spec, write_checkpoint

SPEC = Spec(seed=5, width=512, expert_width=1024, kv_width=256, layers=24)  # 50 MB of experts a layer in f32
SMALLEST, LARGEST = 60e6, 2e9


def model_in(folder: Path) -> Path:
    path = folder / "deep-f32.gguf"
    if not path.exists():
        checkpoint = write_checkpoint(folder / "checkpoint", SPEC, REFERENCE / "small-tokenizer.model")
        grok_local.quantize_checkpoint(checkpoint, path, type="f32")
    return path


class Limited:
    """Runs tests.gpu.limited with a device that is not what it says."""

    def __init__(self, folder: Path, model: Path) -> None:
        self._model, self._peak, self._library = model, folder / "peak", folder / "other_device.so"
        source = Path(__file__).parents[1] / "tests" / "gpu" / "other_device.c"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", self._library, source, "-ldl"], check=True)

    def run(self, limit: int, **options: Any) -> tuple[subprocess.CompletedProcess[str], int]:
        """What came of it, and how many bytes were allocated at most."""
        settings = {"OTHER_LIMIT": str(limit), "OTHER_PEAK": str(self._peak), "LD_PRELOAD": str(self._library)}
        env: Mapping[str, str] = {**os.environ, "GGML_VK_VISIBLE_DEVICES": "0", **settings}
        command = [sys.executable, "-m", "tests.gpu.limited", str(self._model), json.dumps(options)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        return done, int(self._peak.read_text()) if self._peak.exists() else 0

    def held_and_beside(self, **options: Any) -> tuple[int, int]:
        """Of a run without a limit: bytes of weights and KV cache, and what else it takes."""
        done, peak = self.run(0, **options)
        held = int(json.loads(done.stdout)["held"])
        return held, peak - held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--limits", type=int, default=20)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    limited = Limited(args.out, model_in(args.out))
    dense, beside_ram = limited.held_and_beside(experts_on="cpu")
    everything, beside = limited.held_and_beside()
    layer = (everything - dense) / SPEC.layers
    print(f"dense {dense / 1e6:.1f} MB, a layer's experts {layer / 1e6:.1f} MB, beside {beside_ram / 1e6:.1f} MB")
    for limit in np.geomspace(SMALLEST, LARGEST, args.limits).astype(int).tolist():
        fitting = dense + max(limit - beside_ram - dense, 0) // layer * layer
        best = everything if everything + beside <= limit else min(fitting, max(limit - beside_ram, 0))
        _show(limited, limit, best)


def _show(limited: Limited, limit: int, best: float) -> None:
    started = time.monotonic()
    done, _ = limited.run(limit)
    found: dict[str, Any] = json.loads(done.stdout or '{"held": 0, "notes": [], "experts": "no"}')
    text = f"code {done.returncode}, {done.stderr.count(chr(10))} lines of stderr, {len(found['notes'])} steps"
    used = f"{found['held'] / 1e6:7.1f} MB of {best / 1e6:7.1f}: {found['held'] / best:4.0%}"
    print(f"{limit / 1e6:7.1f} MB: {text}, {found['experts']} layers, {used}, {time.monotonic() - started:.0f} s")
    if done.returncode:
        print(done.stderr, end="")


if __name__ == "__main__":
    main()

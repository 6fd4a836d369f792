"""The whole way in a few seconds: a small random checkpoint in the release's format, packed, verified, asked.

    uv run python -m examples.quickstart

The model has learnt nothing, so what it says is noise; every step is the one Grok-1 itself takes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.checkpoints import REFERENCE, Spec, write_checkpoint


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="grok-local-") as folder:
        checkpoint = Path(folder) / "grok-1"
        write_checkpoint(checkpoint, Spec(), REFERENCE / "small-tokenizer.model")
        output = Path(folder) / "grok-1-q4_k.gguf"
        _run("quantize", checkpoint, "-o", output)
        _run("verify", output, "--against", checkpoint)
        _run("generate", "-m", output, "The answer to life is", "--max-tokens", 16, "--seed", 1)


def _run(*arguments: object) -> None:
    print(f"$ grok-local {' '.join(map(str, arguments))}", flush=True)
    subprocess.run([sys.executable, "-m", "grok_local", *map(str, arguments)], check=True)


if __name__ == "__main__":
    main()

"""Whether this checkout packs and computes what another does, to the byte: `python -m tests.unchanged OTHER_CHECKOUT`.

Both pack the reference checkpoint to all seven types, and evaluate and continue the same tokens with each, in processes
of their own. Only public names are used, so that the other checkout may be of any age.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from samples.checkpoints import REFERENCE, Spec, write_checkpoint

ROOT = Path(__file__).parents[1]
CHILD = """
import hashlib, json, sys
import grok_local
checkpoint, output, type = sys.argv[1:]
report = grok_local.quantize_checkpoint(checkpoint, output, type=type, threads=2)
ids = list(range(5, 105))
with grok_local.load(report.path, context=256, threads=2, repack="off") as model:
    logits = model.logits(ids)
    replies = [model.generate("Hello world", max_tokens=40, temperature=0),
               model.chat([{"role": "user", "content": "Why?"}], max_tokens=40, temperature=1.0, seed=3)]
    texts = ["".join(reply) for reply in replies]
    tokens = [reply.tokens for reply in replies]
sha256 = lambda data: hashlib.sha256(data).hexdigest()
print(json.dumps({"file": sha256(report.path.read_bytes()), "logits": sha256(logits.tobytes()), "tokens": tokens}))
"""
TYPES = ("q4_k", "q4_0", "iq4_xs", "mxfp4", "q8_0", "bf16", "f32")


def outcome(checkout: Path, checkpoint: Path, kind: str) -> dict[str, object]:
    """What one checkout makes of the checkpoint."""
    env = {**os.environ, "PYTHONPATH": str(checkout)}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", CHILD, str(checkpoint), str(Path(folder) / f"{kind}.gguf"), kind]
        done = subprocess.run(command, cwd=checkout, env=env, check=True, stdout=subprocess.PIPE)
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path)
    other = parser.parse_args().other.resolve()
    differing = 0
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / "reference", Spec(), REFERENCE / "small-tokenizer.model")
        for kind in TYPES:
            before, after = (outcome(checkout, checkpoint, kind) for checkout in (other, ROOT))
            same = {what: before[what] == after[what] for what in before}
            differing += not all(same.values())
            print(f"{kind:7} {str(before['file'])[:16]}  {same}", flush=True)
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()

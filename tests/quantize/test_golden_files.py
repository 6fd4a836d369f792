"""The reference checkpoint's files are what they were when they were first verified: `tests/reference/packed.json`.

The C library computes in floats, which another processor or compiler may round otherwise. So the file keeps for each
type a canary, the hash of what the library makes of a fixed array: where that differs, only what involves no arithmetic
of the library's is compared. `python -m tests.quantize.test_golden_files` writes the file anew.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest

import grok_local
from grok_local.formats.gguf_file import KEYS, NO_DIGEST, read_header, replace_strings
from grok_local.ggml import quants
from grok_local.quantize.recipe import RECIPES
from samples.checkpoints import REFERENCE, Spec, write_checkpoint

GOLDEN = REFERENCE / "packed.json"


def canary(name: str) -> str:
    """What the library makes here of a fixed array, for each type that the recipe uses."""
    rows, digest = np.random.default_rng(5).standard_normal((8, 512), np.float32), hashlib.sha256()
    recipe = RECIPES[name]
    for kind in (recipe.experts, recipe.attention, recipe.embedding):
        out = np.empty(len(rows) * quants.bytes_per_row(kind, rows.shape[1]), np.uint8)
        quants.quantize_rows(kind, rows, out)
        digest.update(out)
    return digest.hexdigest()


def digests(path: Path) -> dict[str, str]:
    """Of the whole file, and of its header without what depends on its tensors' bytes."""
    data, header = path.read_bytes(), read_header(path)
    hashes = header.metadata[KEYS.TENSOR_HASHES]
    blank = replace_strings(data[: header.end], hashes, [NO_DIGEST] * len(hashes))
    return {"file": hashlib.sha256(data).hexdigest(), "header": hashlib.sha256(blank).hexdigest()}


@pytest.mark.parametrize("name", RECIPES)
def test_the_file_is_what_it_was(golden: Path, tmp_path: Path, name: str) -> None:
    known = json.loads(GOLDEN.read_text())[name]
    found = digests(grok_local.quantize_checkpoint(golden, tmp_path / "golden.gguf", type=name).path)
    assert found["header"] == known["header"]
    assert (found["file"] == known["file"]) or canary(name) != known["canary"]


def main() -> None:
    values = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / "golden", Spec(), REFERENCE / "small-tokenizer.model")
        for name in RECIPES:
            path = grok_local.quantize_checkpoint(checkpoint, Path(folder) / f"{name}.gguf", type=name).path
            values[name] = {**digests(path), "canary": canary(name)}
    GOLDEN.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()

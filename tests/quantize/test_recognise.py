"""Folders that are no checkpoint, or hold one in another way than the release does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from grok_local.errors import CheckpointError
from grok_local.quantize.sources.recognise import open_checkpoint
from tests.conftest import Run


def hub_cache(small: Path, folder: Path) -> Path:
    """As huggingface_hub keeps it: a snapshot of links to blobs. Returns the snapshot."""
    repository = folder / "models--xai-org--grok-1"
    snapshot, blobs = repository / "snapshots" / ("a" * 40), repository / "blobs"
    (snapshot / "ckpt-0").mkdir(parents=True)
    blobs.mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    for number, file in enumerate(sorted(path for path in small.rglob("tensor*_000"))):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / "ckpt-0" / file.name).symlink_to(f"../../../blobs/{number}")
    return snapshot


def test_the_hubs_cache(small: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(small, tmp_path)
    for folder in (snapshot, snapshot.parents[1]):
        assert open_checkpoint(folder).folder == snapshot / "ckpt-0"
    with pytest.raises(CheckpointError, match=r"it is the hub's cache: give the folder snapshots/"):
        open_checkpoint(tmp_path)
    (snapshot.parents[1] / "blobs" / "5").unlink()
    with pytest.raises(CheckpointError, match=r"tensor00005_000: missing: the link leads to \.\./"):
        open_checkpoint(snapshot)


@pytest.mark.parametrize(
    ("config", "file", "words"),
    [
        (
            {"architectures": ["Grok1ForCausalLM"]},
            "tokenizer.tok.json",
            "Grok-2's config.json, and none of the tensors",
        ),
        ({"architectures": ["Grok1ModelForCausalLM"]}, "model-00001-of-00065.safetensors", "Hugging Face"),
        ({"architectures": ["LlamaForCausalLM"]}, "model.safetensors", "LlamaForCausalLM"),
        ({}, "README.md", "neither it nor its ckpt-0 or ckpt holds tensor00000_000"),
    ],
)
def test_what_a_folder_holds(run: Run, tmp_path: Path, config: dict[str, object], file: str, words: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / file).touch()
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    for command in (["quantize"], ["inspect"], ["plan", "-m"]):
        done = run(*command, folder)
        assert done.returncode == 1
        assert words in done.stderr

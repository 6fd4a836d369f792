"""Names: the built-in model, the models folder, what is pulled; listing, deleting, completing."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import grok_local
from grok_local.errors import GGUFError
from grok_local.library import names
from grok_local.library.built_in import CHECKPOINT
from tests.conftest import Run


@pytest.fixture
def models(home: Path, packed: Path) -> Path:
    """A models folder with one whole model and one in parts."""
    folder = home / "models"
    folder.mkdir(parents=True)
    shutil.copyfile(packed, folder / "mine.gguf")
    for part in (1, 2):
        (folder / f"split-0000{part}-of-00002.gguf").write_bytes(b"nonsense")
    return folder


def test_what_a_name_means(models: Path, packed: Path) -> None:
    assert names.resolve_model("mine") == names.resolve_model("mine.gguf") == models / "mine.gguf"
    assert names.resolve_model(str(packed)) == packed
    assert names.model_names() == ["tiny", "mine", "split"]
    with pytest.raises(GGUFError, match=r"no model of that name .*there are: tiny, mine, split"):
        names.resolve_model("yours")
    with pytest.raises(GGUFError, match="a folder"):
        names.resolve_model(str(models))
    with pytest.raises(GGUFError, match="no such file"):
        names.resolve_model(str(models / "elsewhere" / "mine"))


def test_the_built_in_model_is_packed_once(home: Path) -> None:
    events: list[object] = []

    @contextmanager
    def watched() -> Iterator[Callable[[object], None]]:
        yield events.append

    path = names.resolve_model("tiny", packing=watched)
    assert path.parent == home / "cache"
    assert events
    events.clear()
    assert names.resolve_model("tiny", packing=watched) == path
    assert not events
    assert [p.name for p in path.parent.iterdir()] == [path.name]


COUNTING = """
import atexit, sys
from grok_local import cli
from grok_local.quantize import verify
hashed, real = [], verify.verify
verify.verify = lambda path: hashed.append(path) or real(path)
atexit.register(lambda: print(len(hashed), file=sys.stderr))
cli.main()
"""


def test_the_built_in_model_is_hashed_once_at_a_start(home: Path) -> None:
    """It is what every first command waits for."""
    names.resolve_model("tiny")
    command = [sys.executable, "-c", COUNTING, "generate", "What is an expert?", "--max-tokens", "1"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert said.splitlines()[-1] == "1"


def test_several_first_uses_at_once(home: Path) -> None:
    command = [sys.executable, "-m", "grok_local", "generate", "Hello", "--max-tokens", "2"]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    for process in started:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    assert len(list((home / "cache").glob("*.gguf"))) == 1


def test_without_m_the_built_in_model_answers(run: Run, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run("generate", "What is an expert?", "--temperature", 0)
    assert first.returncode == 0
    assert "packed to 4 bits, once" in first.stderr
    assert "expert" in first.stdout
    second = run("chat", "--temperature", 0, stdin="What is an expert?\n")
    assert "packed" not in second.stderr
    monkeypatch.setenv("GROK_LOCAL_MODEL", "mine")
    assert "[2 tokens" in run("generate", "x", "--max-tokens", 2).stderr
    monkeypatch.setenv("GROK_LOCAL_MODEL", "nowhere")
    assert "no model of that name" in run("generate", "x").stderr


def test_names_from_python(models: Path) -> None:
    with grok_local.load("mine", context=64) as model:
        assert model.path == models / "mine.gguf"
    with grok_local.load("tiny") as model:
        assert model.metadata["grok.block_count"] == 4
        assert model.context_size == 512


def test_list(run: Run, models: Path, home: Path) -> None:
    partly = home / "checkpoints" / "grok-1"
    (partly / "ckpt-0").mkdir(parents=True)
    shown = run("list")
    assert shown.returncode == 0
    for words in ("tiny", "mine", "q4_k", "2 layers", "checkpoint ", "split", "cannot be read", "not complete"):
        assert words in shown.stdout
    entries = {entry["name"]: entry for entry in json.loads(run("list", "--json").stdout)}
    assert entries["mine"]["bytes"] == (models / "mine.gguf").stat().st_size
    assert entries["grok-1"]["kind"] == "checkpoint"


def test_rm(run: Run, models: Path, home: Path) -> None:
    refused = run("rm", "mine")
    assert refused.returncode == 2
    assert "--yes" in refused.stderr
    assert run("rm", "mine", "nowhere", "--yes").returncode == 2
    assert (models / "mine.gguf").exists()  # all or nothing
    assert run("rm", "mine", "split", "--yes").returncode == 0
    assert list(models.iterdir()) == []
    checkpoint = home / "checkpoints" / "grok-1" / "ckpt-0"
    checkpoint.mkdir(parents=True)
    (checkpoint / "tensor00000_000").write_bytes(b"x")
    assert run("rm", "grok-1", "-y").returncode == 0
    assert not (home / "checkpoints" / "grok-1").exists()
    run("generate", "x", "--max-tokens", 1)
    assert run("rm", "tiny", "-y").returncode == 0
    assert not list((home / "cache").iterdir())
    assert CHECKPOINT.is_dir()


@pytest.mark.parametrize(("answer", "kept"), [(b"n\n", True), (b"\n", True), (b"y\n", False)])
def test_rm_asks(models: Path, answer: bytes, kept: bool) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "grok_local", "rm", "mine"]
    process = subprocess.Popen(command, stdin=slave, stderr=subprocess.PIPE)
    os.write(master, answer)
    _, said = process.communicate(timeout=30)
    os.close(master)
    os.close(slave)
    assert process.returncode == 0
    assert b"delete model mine" in said
    assert (models / "mine.gguf").exists() == kept


def test_rm_deletes_nothing_else(run: Run, models: Path, home: Path, tmp_path: Path) -> None:
    others = [models / "mine.gguf.bak", models / "mine.gguf-v2.gguf", models / "mine2.gguf", tmp_path / "outside.gguf"]
    for path in others:
        path.write_bytes(b"x")
    left = [models / "mine.gguf.partial", models / "mine.gguf.journal"]
    for path in left:
        path.write_bytes(b"x")
    for name in ("../../outside", str(tmp_path / "outside.gguf"), ".", "", "mine.gguf.bak"):
        assert run("rm", "--yes", "--", name).returncode == 2, name
    assert run("rm", "mine", "--yes").returncode == 0
    assert not (models / "mine.gguf").exists()
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in others)
    assert home.is_dir()


def test_rm_waits_for_nobody(run: Run, models: Path) -> None:
    journal = models / "mine.gguf.journal"
    with journal.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused = run("rm", "mine", "--yes")
    assert refused.returncode == 1
    assert "another grok-local is working there" in refused.stderr
    assert (models / "mine.gguf").exists()


def test_names_that_mean_two_things(run: Run, models: Path, home: Path) -> None:
    (home / "checkpoints" / "mine").mkdir(parents=True)
    refused = run("rm", "mine", "--yes")
    assert refused.returncode == 2
    assert "is the name of model (" in refused.stderr


def test_a_link_that_leads_nowhere(run: Run, models: Path) -> None:
    (models / "gone.gguf").symlink_to(models / "nowhere")
    listed = run("list")
    assert listed.returncode == 0
    assert "gone" in listed.stdout
    assert run("rm", "gone", "--yes").returncode == 0
    assert not (models / "gone.gguf").is_symlink()


def test_rm_leaves_what_is_no_model(run: Run, models: Path, home: Path) -> None:
    (models / "folder.gguf").mkdir()
    (models / "folder.gguf" / "file").write_text("x")
    (models / ".gguf").write_text("x")
    photos = home / "checkpoints" / "photos"
    photos.mkdir(parents=True)
    (photos / "file").write_text("x")
    for name, code in (("folder", 2), (".gguf", 2), ("photos", 1), ("tiny", 1)):
        refused = run("rm", name, "--yes")
        assert refused.returncode == code, refused.stderr
        assert "Traceback" not in refused.stderr
    assert (models / "folder.gguf" / "file").exists()
    assert (photos / "file").exists()


def test_a_damaged_packed_model_is_packed_again(home: Path) -> None:
    path = names.resolve_model("tiny")
    whole = path.read_bytes()
    for damaged in (b"", whole[:2_000_000], whole[:3_000_000] + bytes(1000) + whole[3_001_000:]):
        path.write_bytes(damaged)
        assert names.resolve_model("tiny") == path
        assert path.read_bytes() == whole


def test_the_built_in_checkpoint_by_its_name(run: Run, home: Path) -> None:
    assert run("quantize", "tiny", "--type", "q4_0").returncode == 0
    assert run("verify", "tiny-q4_0", "--against", "tiny").returncode == 0
    assert (home / "models" / "tiny-q4_0.gguf").exists()
    assert json.loads(run("inspect", "tiny", "--json").stdout)["kind"] == "checkpoint"


@pytest.mark.usefixtures("models")
def test_the_shell_completes_names() -> None:
    for words, expected in (
        ("grok-local chat -m ", {"tiny", "mine", "split"}),
        ("grok-local chat -m m", {"mine"}),
        ("grok-local rm s", {"split"}),
    ):
        assert set(_completed(words)) == expected


def _completed(words: str) -> list[str]:
    env = {**os.environ, "_GROK_LOCAL_COMPLETE": "complete_bash"}
    env |= {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    command = [sys.executable, "-m", "grok_local"]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env).stdout.split()


def test_the_demo(run: Run, home: Path) -> None:
    shown = run("demo")
    assert shown.returncode == 0, shown.stderr
    for words in ("Q4_K", "exact", "> What is an expert?", "tok/s", "grok-local pull grok-1"):
        assert words in shown.stdout
    assert not (home / "models").exists()


def test_a_link_to_a_part_leads_to_the_parts(run: Run, small: Path, home: Path, tmp_path: Path) -> None:
    """Of any name, beside the parts, elsewhere, and over another link, as hubs' caches have them."""
    grok_local.quantize_checkpoint(small, tmp_path / "parts" / "x.gguf", split_size="1M")
    first = sorted((tmp_path / "parts").glob("*.gguf"))[0]
    (home / "models").mkdir(parents=True)
    links = [tmp_path / "parts" / "model.gguf", tmp_path / "m.gguf", tmp_path / first.name, home / "models" / "m.gguf"]
    for link in links:
        link.symlink_to(first)
    (tmp_path / "twice.gguf").symlink_to(links[1])
    for link in (*links, tmp_path / "twice.gguf"):
        assert names.resolve_model(str(link)).samefile(first)
        assert run("verify", link).returncode == 0
    assert "cannot be" not in run("list").stdout


def test_a_folder_with_one_model_is_that_model(packed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "README.md").touch()
    with pytest.raises(GGUFError, match="a folder without a GGUF"):
        names.resolve_model(str(folder))
    (folder / "a.gguf").symlink_to(packed)
    assert names.resolve_model(str(folder)).samefile(packed)
    (folder / "b.GGUF").symlink_to(packed)
    with pytest.raises(GGUFError, match=r"a folder with 2 models: give one of .*a\.gguf, .*b\.GGUF"):
        names.resolve_model(str(folder))


@pytest.mark.parametrize("name", ["Grok-1-Q4_K", "grok-1-q4_k.GGUF", "GROK-1-Q4_K.gguf"])
def test_capitals_do_not_matter(home: Path, packed: Path, name: str) -> None:
    (home / "models").mkdir(parents=True)
    (home / "models" / "grok-1-q4_K.gguf").symlink_to(packed)
    assert names.resolve_model(name).samefile(packed)


def test_pieces_are_listed(run: Run, home: Path) -> None:
    (home / "models").mkdir(parents=True)
    (home / "models" / "x.gguf.part1of2").write_bytes(b"GGUF" + bytes(100))
    shown = run("list").stdout
    assert "x.gguf.part1of2" in shown
    assert "join all of them in their order with cat" in shown


def test_a_releases_name_is_no_model_yet(run: Run) -> None:
    done = run("chat", "-m", "grok-1", stdin="Hi\n")
    assert done.returncode == 1
    assert "grok-local pull grok-1 fetches the release, and quantize packs it" in done.stderr


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("my-grok", "my-grok-q4_k.gguf"),
        ("grok-1/ckpt-0", "grok-1-q4_k.gguf"),
        ("models--xai-org--grok-1/snapshots/0123abc", "grok-1-q4_k.gguf"),
    ],
)
def test_an_output_is_named_after_its_checkpoint(tmp_path: Path, folder: str, name: str) -> None:
    assert names.default_output("Q4_K", tmp_path / folder).name == name

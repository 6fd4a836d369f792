"""Every example of the help and of the documents runs, and says what the documents say it says.

Those of `pull`, `worker` and `--ray` need other machines; tests/hub, tests/runtime/remote and
tests/adapters/test_fleet.py have theirs; `serve` does not end, and tests/serve has what is asked of it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "cli.md")]
ELSEWHERE = (
    " pull ",
    " worker ",
    " serve ",
    "--worker",
    "--ray",
    "-m training",
    " demo",
)  # the demo has a test of its own


def examples() -> list[str]:
    """Commands of fenced blocks, and of docstrings, without what is behind # or two blanks, and without jq."""
    blocks = [block for page in PAGES for block in re.findall(r"```\n(.*?)```", page.read_text(), re.DOTALL)]
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    helped = [source.read_text() for source in sorted((ROOT / "grok_local" / "commands").glob("*.py"))]
    lines += [line for text in helped for line in re.findall(r"^    (grok-local [a-z].*)$", text, re.MULTILINE)]
    commands = [
        re.split(r" #|  +(?!-)|\| jq", line.replace("scripts/run ", "grok-local "))[0].strip() for line in lines
    ]
    return sorted({c for c in commands if re.match(r"(cat \S+ \| )?grok-local [a-z]", c) and not _is_left_out(c)})


def _is_left_out(command: str) -> bool:
    synopsis = re.search(r"[\[\]]", command)
    return bool(synopsis) or any(word in f"{command} " for word in ELSEWHERE)


def _order(command: str) -> int:
    """What others need comes first, what deletes last."""
    return 0 if "--trace-experts" in command else 2 if " rm " in command else 1


EXAMPLES = sorted(examples(), key=_order)


@pytest.fixture(scope="module")
def world(small: Path, small_grok2: Path, packed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A home and a folder that have what the examples speak of."""
    folder = tmp_path_factory.mktemp("world")
    for name in ("models/grok-1-q4_k.gguf", "models/grok-1-q4_0.gguf", "../grok-1-q4_k.gguf", "../OUT.gguf"):
        (folder / "home" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(packed, folder / "home" / name)
    for name in ("grok-1", "CHECKPOINT", "home/checkpoints/grok-1"):
        shutil.copytree(small, folder / name)
    shutil.copyfile(next(small.rglob("tokenizer.model")), folder / "tokenizer.model")
    shutil.copytree(small_grok2, folder / "grok-2")
    (folder / "prompt.txt").write_text("Once upon a time\n")
    (folder / "questions.jsonl").write_text('{"prompt": "The router chooses", "choices": [" two", " one"]}\n')
    (folder / "prompts.jsonl").write_text('{"prompt": "The router chooses", "max_tokens": 4}\n')
    session = folder / "home" / "sessions" / "holiday"
    session.mkdir(parents=True)
    (session / "conversation.json").write_text('{"format": 1, "messages": [{"role": "user", "content": "Hi"}]}')
    (folder / "person.json").write_text('{"type": "object", "properties": {"born": {"type": "integer"}}}')
    (folder / "wiki.txt").write_text("A layer has eight experts. " * 200)
    command = folder / "bin" / "grok-local"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m grok_local "$@"\n')
    command.chmod(0o755)
    return {
        **os.environ,
        "HOME": str(folder),
        "GROK_LOCAL_HOME": str(folder / "home"),
        "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }


def run(command: str, world: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", command], cwd=world["HOME"], env=world, input="Hi\n", capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("command", EXAMPLES)
def test_it_runs(command: str, world: dict[str, str]) -> None:
    # A machine of the tests has less memory, and nobody who agrees.
    done = run(command.replace("--memory 48G", "--memory 1G").replace(" rm ", " rm --yes "), world)
    assert done.returncode in ((0, 1) if " doctor" in command else (0,)), done.stderr
    assert "Traceback" not in done.stderr


def test_there_are_examples() -> None:
    assert len(EXAMPLES) > 25


def quoted() -> list[tuple[str, str]]:
    text = (ROOT / "docs" / "machines.md").read_text()
    return re.findall(r"```\n(grok-local plan .*?)\n```\n\n> (.*?)\n", text)


@pytest.mark.parametrize(("command", "verdict"), quoted())
def test_the_machines_get_the_verdicts_the_page_says(command: str, verdict: str, world: dict[str, str]) -> None:
    shown = run(command, {**world, "COLUMNS": "200"}).stdout
    assert verdict in shown.replace("\n", " ").replace("  ", " ")

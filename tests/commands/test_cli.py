"""The command line, as processes of their own: what goes where, and the exit codes."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grok_local.cli import app
from tests.conftest import Run
from tests.test_documents import commands

# What prompt_toolkit sends when it begins and ends to read a line.
PROMPT_BEGINS, PROMPT_ENDS = b"\x1b[?2004h", b"\x1b[?2004l"
DOCS = Path(__file__).parents[2] / "docs"


def test_help_is_quick(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # a user's modules are compiled once
    run("--help")
    times = []
    for _ in range(5):
        started = time.monotonic()
        assert run("--help").returncode == 0
        times.append(time.monotonic() - started)
    assert min(times) < 0.3


def test_help_imports_nothing_slow() -> None:
    code = "import sys, grok_local.cli; print([m for m in ('numpy', 'rich', 'gguf', 'llama_cpp') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("command", [" ".join(command) for command in commands(app) if command])
def test_every_command_has_an_example_and_is_documented(run: Run, command: str) -> None:
    text = run(*command.split(), "--help").stdout
    assert f"grok-local {command}" in text
    assert f"## grok-local {command}" in (DOCS / "cli.md").read_text()


def test_quantize_verify_generate(run: Run, small: Path, home: Path) -> None:
    packed = run("quantize", small)
    assert (packed.returncode, packed.stdout) == (0, "")
    assert (home / "models" / f"{small.name}-q4_k.gguf").exists()
    assert "26 tensors" in packed.stderr
    again = run("quantize", small)
    assert again.returncode == 0
    assert "there already" in again.stderr
    assert run("quantize", small, "-o", home / "models", "--type", "q4_0").returncode == 0
    assert (home / "models" / f"{small.name}-q4_0.gguf").exists()
    (home / "models" / f"{small.name}-q4_0.gguf").unlink()
    verified = run("verify", f"{small.name}-q4_k", "--against", small, "--verbose")
    assert verified.returncode == 0
    assert verified.stdout.count("exact") == 19 + 1  # in the last line
    for model in (f"{small.name}-q4_k", f"{small.name}-Q4_K.GGUF"):
        reply = run("generate", "-m", model, "Hello", "--max-tokens", 5, "--temperature", 0, "--context", 64)
        assert reply.returncode == 0
        assert re.search(r"\[5 tokens, [\d.]+ tok/s", reply.stderr)
        assert "Hello" not in reply.stdout


def test_json_has_stdout_to_itself(run: Run, small: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.gguf"
    events = [json.loads(line) for line in run("quantize", small, "-o", output, "--json").stdout.splitlines()]
    assert {event["event"] for event in events} == {"progress", "done"}
    assert events[-1]["tensors"] == 26
    reply = json.loads(run("generate", "-m", output, "Hi", "--max-tokens", 4, "--json", "--context", 64).stdout)
    assert reply["generated_tokens"] == 4
    assert reply["finish_reason"] == "length"
    inspected = json.loads(run("inspect", output, "--json").stdout)
    assert inspected["metadata"]["general.architecture"] == "grok"
    assert len(inspected["tensors"]) == 26
    source = json.loads(run("inspect", small, "--json").stdout)
    assert source["dimensions"]["layers"] == 2
    checks = json.loads(run("verify", output, "--json").stdout)
    assert checks["problems"] == []


def test_inspect_shows_tables(run: Run, small: Path, packed: Path) -> None:
    for path, words in ((packed, "blk.1.ffn_up_exps.weight"), (small, "decoder_layer_1/moe/linear_v/w")):
        shown = run("inspect", path)
        assert shown.returncode == 0
        assert words in shown.stdout


def test_a_damaged_file_fails_verify(run: Run, packed: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "x.gguf"
    data = bytearray(packed.read_bytes())
    data[-5000] ^= 1
    damaged.write_bytes(data)
    result = run("verify", damaged)
    assert result.returncode == 1
    assert result.stderr.count("error: ") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["quantize", "nowhere"], 1, "nowhere: no such folder"),
        (["quantize", ".", "--type", "q3"], 2, "no type 'q3'"),
        (["quantize"], 2, "Missing argument"),
        (["verify", "nowhere.gguf"], 1, "nowhere.gguf: no such file"),
        (["inspect", "/no/where"], 1, "no such file"),
        (["inspect", "n" * 300], 1, "File name too long"),
        (["quantize", ".", "--memory", "9" * 400], 2, "not a size"),
        (["generate", "--threads", "100000", "x"], 2, "threads"),
        (["inspect", "nowhere.gguf"], 1, "no such file"),
        (["generate", "-m", "nowhere", "x"], 1, "no such file, and no model of that name"),
        (["pull", "grok-3"], 2, "choose grok-1"),
        (["rm"], 2, "Missing argument"),
        (["rm", "nowhere"], 2, "see grok-local list"),
        (["generate", "--no-such-option"], 2, "No such option"),
        (["generate", "--top-p", "2", "x"], 2, "top-p"),
        (["chat", "--context", "-1"], 2, "context"),
        (["dance"], 2, "dance"),
    ],
)
def test_errors_are_a_line_and_a_code(run: Run, tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == code
    assert words in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_a_prompt_from_stdin(run: Run, packed: Path) -> None:
    options = ["-m", packed, "--max-tokens", 6, "--temperature", 0, "--context", 64]
    given = run("generate", "Hello world", *options).stdout
    assert run("generate", "-", *options, stdin="Hello world").stdout == given
    assert run("generate", *options, stdin="Hello world").stdout == given


def test_chat_without_a_terminal(run: Run, packed: Path, tmp_path: Path) -> None:
    saved = tmp_path / "conversation.txt"
    lines = [
        "/help",
        "Hi",
        "/stats",
        "/undo",
        "/undo",
        "/dance",  # no command, so a question
        "/undo",
        "/system Be brief.",
        "Again",
        f"/save {saved}",
        "/save",
        "/exit",
        "never",
    ]
    result = run("chat", "-m", packed, "--max-tokens", 5, "--seed", 1, "--context", 512, stdin="\n".join(lines))
    assert result.returncode == 0
    assert len(re.findall(r"\[\d+ tokens, ", result.stderr)) == 3
    for words in (
        "/reset",
        "(taken back: Hi)",
        "(nothing to take back)",
        "(taken back: /dance)",
        "(system: Be brief.)",
    ):
        assert words in result.stderr
    assert saved.read_text().startswith("Human: Again\n\nAssistant: ")
    assert "never" not in result.stderr


def test_chat_on_a_terminal(packed: Path, home: Path) -> None:
    command = [sys.executable, "-m", "grok_local", "chat", "-m", str(packed), "--seed", "1", "--max-tokens", "8000"]
    master, slave = pty.openpty()
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "TERM": "xterm"})
    os.close(slave)
    try:
        _expect(master, b"/help lists")
        _expect(master, PROMPT_BEGINS)
        os.write(master, b"Tell me a long story\r")
        _expect(master, PROMPT_ENDS)
        _read(master, 100)  # of the answer
        process.send_signal(signal.SIGINT)  # ends the answer ...
        _expect(master, b"interrupted]")
        _expect(master, PROMPT_BEGINS)
        os.write(master, b"/stats\r")  # ... and not the conversation
        _expect(master, b"1 answers")
        _expect(master, PROMPT_BEGINS)
        os.write(master, b"\x04")
        assert process.wait(10) == 0
    finally:
        process.kill()
        os.close(master)
    assert "Tell me a long story" in (home / "history").read_text()


def _read(fd: int, size: int) -> None:
    while size > 0:
        size -= len(os.read(fd, 4096))


def _expect(fd: int, words: bytes, seconds: float = 30) -> None:
    seen, end = b"", time.monotonic() + seconds
    while words not in seen:
        ready, _, _ = select.select([fd], [], [], max(0, end - time.monotonic()))
        assert ready, f"{words!r} never came: {seen[-500:]!r}"
        seen += os.read(fd, 4096)


def test_ctrl_c_ends_generate_with_130(golden: Path, run: Run, tmp_path: Path) -> None:
    output = tmp_path / "x.gguf"
    run("quantize", golden, "-o", output)
    command = [
        sys.executable,
        "-m",
        "grok_local",
        "generate",
        "-m",
        str(output),
        "--max-tokens",
        "8000",
        "--seed",
        "1",
        "x",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"interrupted" in stderr
    assert b"Traceback" not in stderr


def test_a_reader_that_goes_away(packed: Path) -> None:
    command = [sys.executable, "-m", "grok_local", "inspect", str(packed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()  # before anything can have been written
        assert process.wait(60) == 1
        assert process.stderr.read() == b""


def test_version(run: Run) -> None:
    import grok_local

    assert run("--version").stdout == f"grok-local {grok_local.__version__}\n"


def test_where_llama_cpp_aborts_there_is_an_error(run: Run, packed: Path, tmp_path: Path) -> None:
    """Damage that only llama.cpp's assertions notice: no expert is used."""
    data = packed.read_bytes()
    key = b"grok.expert_used_count\x04\x00\x00\x00"
    damaged = tmp_path / "x.gguf"
    damaged.write_bytes(data.replace(key + b"\x02", key + b"\x00"))
    result = run("generate", "-m", damaged, "x")
    assert result.returncode == 1
    assert result.stderr.startswith("error: llama.cpp gave up (")
    assert result.stderr.count("\n") == 1
    verified = run("verify", damaged)
    assert verified.returncode == 1
    assert "its metadata is not what it was packed with" in verified.stderr


def test_closed_and_full_streams(packed: Path) -> None:
    grok_local = f"{sys.executable} -m grok_local"
    for command, code, words in (
        (f"{grok_local} inspect {packed} > /dev/full", 1, "error: output: No space left"),
        (f"{grok_local} chat -m {packed} <&-", 0, ""),
        (f"{grok_local} generate -m {packed} - <&-", 1, "error: the prompt is empty"),
        (f"{grok_local} inspect {packed} >&-", 1, "error: output: Bad file descriptor"),
        (f"{grok_local} verify {packed} --verbose 2>&- | grep -c token_embd", 0, ""),
    ):
        result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        assert result.returncode == code, command
        assert result.stderr.startswith(words), command
        assert "Traceback" not in result.stderr


def test_names_that_look_like_markup(run: Run, packed: Path, tmp_path: Path) -> None:
    path = tmp_path / "[bold]x[red].gguf"
    path.write_bytes(packed.read_bytes())
    for command in ("verify", "inspect"):
        result = run(command, path)
        assert result.returncode == 0, result.stderr
        assert "[bold]x[red].gguf" in result.stdout.replace("\n", "")


def test_a_small_context_is_what_it_says(run: Run, packed: Path) -> None:
    result = run("generate", "-m", packed, "--context", 40, "word " * 60)
    assert result.returncode == 1
    assert "the context 40" in result.stderr
    assert run("generate", "-m", packed, "--context", 100, "--max-tokens", 3, "word " * 20).returncode == 0


def test_saving_where_nothing_can_be_saved(run: Run, packed: Path) -> None:
    lines = ["/save ~nobody-here/x", "/save a\0b", "/save /no/where", "/stats"]
    result = run("chat", "-m", packed, stdin="\n".join(lines))
    assert result.returncode == 0
    assert result.stderr.count("cannot be written") == 3
    assert "(0 answers" in result.stderr


def test_lost_streams_are_not_the_outputs_fault(run: Run, small: Path, tmp_path: Path) -> None:
    grok_local = f"{sys.executable} -m grok_local"
    full = f"{grok_local} quantize {small} -o {tmp_path}/a.gguf --json > /dev/full"
    done = subprocess.run(["bash", "-c", full], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: output: No space left on device\n")
    for command in (f"quantize {small} -o {tmp_path}/b.gguf", "list"):
        assert subprocess.run(["bash", "-c", f"{grok_local} {command} 2> /dev/full"], check=False).returncode == 0
    assert (tmp_path / "b.gguf").exists()


def test_names_that_are_no_text(run: Run, small: Path, tmp_path: Path) -> None:
    odd = tmp_path / "n\x1b[31m\nred.gguf"
    assert "\x1b" not in run("quantize", small, "-o", odd).stderr
    output = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.gguf")
    report = json.loads(run("quantize", small, "-o", output, "--json").stdout.splitlines()[-1])
    assert Path(report["path"]).exists()


@pytest.mark.parametrize("digest", ["zz", "0" * 63, "g" * 64])
def test_a_sha256_that_is_none(run: Run, packed: Path, digest: str) -> None:
    done = run("verify", packed, "--sha256", digest)
    assert done.returncode == 2
    assert "64 hexadecimal digits" in done.stderr


def test_ctrl_c_while_everything_is_imported(small: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "grok_local", "quantize", str(small), "-o", str(tmp_path / "x.gguf")]
    for wait in (0.15, 0.3, 0.5):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert process.returncode in (0, 130, -signal.SIGINT)  # the last where Python itself is not up yet
        assert "grok_local/" not in said  # no traceback of ours


@pytest.mark.parametrize("command", ["generate", "batch", "score", "perplexity", "bench"])
def test_idle_threads_sleep_whatever_the_command(
    run: Run, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """GNU's OpenMP says with which settings it was loaded."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_DISPLAY_ENV", "verbose")
    (tmp_path / "x.jsonl").write_text('{"prompt": "once upon a time", "max_tokens": 1, "continuation": "there was"}\n')
    every: dict[str, list[object]] = {
        "generate": ["x", "--max-tokens", 1],
        "batch": [tmp_path / "x.jsonl", "--dry-run"],
        "score": [tmp_path / "x.jsonl"],
        "perplexity": [tmp_path / "x.jsonl", "--window", 8],
        "bench": ["--prompt", 8, "--tokens", 1],
    }
    said = run(command, "-m", packed, *every[command]).stderr
    spins = set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", said))
    if not spins:
        pytest.skip("llama.cpp is compiled with another OpenMP")
    assert spins == {"100000"}

"""`grok-local batch` as people run it: results, kills, changes, and what is refused."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run

WIDTHS = (1, 3, 8, 17)
KILLS = int(os.environ.get("GROK_LOCAL_KILLS", "4"))


def written(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def results(path: Path) -> dict[Any, dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    keyed = {value.get("custom_id", value.get("id")): value for value in found}
    assert len(keyed) == len(found)
    return keyed


def many(tmp_path: Path, count: int) -> Path:
    rng = random.Random(3)
    shared = [rng.randrange(3, 400) for _ in range(20)]
    lengths = [1, 2, 3, 9, 40]
    prompts = [(shared if i % 2 else []) + [rng.randrange(3, 400) for _ in range(lengths[i % 5])] for i in range(count)]
    return written(tmp_path / "in.jsonl", [{"id": f"p{i}", "prompt": ids} for i, ids in enumerate(prompts)])


def test_lines_fail_alone(run: Run, packed: Path, tmp_path: Path) -> None:
    lines = ["Once upon a time", {"prompt": "word " * 400, "id": "long"}, {"prompt": 5}, {"id": "b", "prompt": "two"}]
    source, output = written(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    command = ("batch", "-m", packed, source, "-o", output, "--max-tokens", 4, "--context", 256, "--in-order")
    done = run(*command)
    assert done.returncode == 3, done.stderr
    assert "2 of 4 lines" in done.stderr
    found = results(output)
    assert list(found) == [1, "long", 3, "b"]
    assert found["long"]["error"]["code"] == "context"
    assert found["b"]["tokens"]["completion"] <= 4
    again = run(*command)
    assert again.returncode == 3
    assert "4 of 4 lines have their results already" in again.stderr
    assert results(output) == found


def test_without_output_results_go_to_stdout(run: Run, packed: Path) -> None:
    done = run("batch", "-m", packed, "-", "--max-tokens", 2, "--in-order", stdin="one\n\ntwo\r\nthree")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == [1, 3, 4]


def test_results_in_order_are_told_whatever_happens(run: Run, packed: Path, tmp_path: Path) -> None:
    lines = [{"prompt": "x", "id": "z"}, {"prompt": "y", "id": ""}, {"prompt": 5, "id": "bad"}]
    source = written(tmp_path / "in.jsonl", lines)
    done = run("batch", "-m", packed, source, "--max-tokens", 2, "--in-order")
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == ["z", "", "bad"]
    lines += [{"prompt": "Once", "id": number, "max_tokens": 200} for number in range(400)]
    trace = tmp_path / "trace"  # has a second line when the model has computed: what is refused is known by then
    command = ("batch", "-m", packed, written(source, lines), "--in-order", "--trace-experts", trace, "--context", 256)
    process = subprocess.Popen(
        [sys.executable, "-m", "grok_local", *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while process.poll() is None and not (trace.exists() and trace.read_bytes().count(b"\n") > 1):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "bad" in [json.loads(line)["id"] for line in stdout.splitlines()]


def test_what_no_line_could_be_answered_with_comes_before_the_output(run: Run, packed: Path, tmp_path: Path) -> None:
    source, output = written(tmp_path / "in.jsonl", ["Once", {"prompt": "x", "regex": "a"}]), tmp_path / "out.jsonl"
    (tmp_path / "bad.json").write_text('{"type": "nonsense"}')
    for options in (
        ("--logprobs", 500),
        ("--regex", "("),
        ("--min-p", 1.5),
        ("--top-p", 0),
        ("--stop", "X", "--regex", "Y"),
        ("--json-schema", tmp_path / "bad.json"),
        ("--template", tmp_path / "missing.jinja"),
    ):
        done = run("batch", "-m", packed, source, "-o", output, *options)
        assert (done.returncode, list(tmp_path.glob("out*"))) == (2, []), done.stderr


def test_where_nothing_can_be_answered_no_model_is_loaded(run: Run, packed: Path, tmp_path: Path) -> None:
    source, trace = written(tmp_path / "in.jsonl", [{"prompt": 5}, {"messages": None}]), tmp_path / "trace"
    done = run("batch", "-m", packed, source, "-o", tmp_path / "out.jsonl", "--trace-experts", trace)
    assert (done.returncode, len(results(tmp_path / "out.jsonl"))) == (3, 2), done.stderr
    assert not trace.exists()


def test_files_of_others_are_left_alone(run: Run, packed: Path, tmp_path: Path) -> None:
    source, notes = tmp_path / "in.jsonl", tmp_path / "notes.txt"
    source.write_text('{"prompt": "a"}\n{"prompt": "b"}')
    notes.write_text("one line, and no newline")
    same = run("batch", "-m", packed, source, "-o", source)
    assert (same.returncode, "is the input" in same.stderr) == (2, True)
    other = run("batch", "-m", packed, source, "-o", notes)
    assert (other.returncode, "no output to go on with" in other.stderr) == (1, True)
    assert source.read_text() == '{"prompt": "a"}\n{"prompt": "b"}'
    assert notes.read_text() == "one line, and no newline"
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["in.jsonl", "notes.txt"]


@pytest.mark.parametrize("command", ["batch", "score"])
def test_arrays_and_tables_are_no_lines(run: Run, packed: Path, tmp_path: Path, command: str) -> None:
    array = '[{"prompt": "a"}]'
    table = written(tmp_path / "in.CSV", ["prompt,max_tokens", "a,1"])
    for source, stdin in ((written(tmp_path / "in.json", [array]), ""), ("-", array), (table, "")):
        done = run(command, "-m", packed, source, "-o", tmp_path / "out.jsonl", stdin=stdin)
        assert (done.returncode, list(tmp_path.glob("out*"))) == (2, []), done.stderr
        assert f"error: {source}: " in done.stderr
        assert "an object a line" in " ".join(done.stderr.split())
    done = run("batch", "-m", packed, written(tmp_path / "in.txt", [array]), "--max-tokens", 1)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stderr


def test_another_text_of_the_template_is_another_job(run: Run, packed: Path, tmp_path: Path) -> None:
    source, output, template = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "t.jinja"
    written(source, [{"messages": [{"role": "user", "content": "Hi"}]}])
    template.write_text("A{{ messages[0].content }}")
    command = ("batch", "-m", packed, source, "-o", output, "--max-tokens", 2, "--template", template)
    assert run(*command).returncode == 0
    assert run(*command).returncode == 0
    template.write_text("B{{ messages[0].content }}")
    refused = run(*command)
    assert (refused.returncode, "template_text was" in refused.stderr) == (2, True)


def test_what_changed_is_computed_anew(run: Run, packed: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.txt", tmp_path / "out.jsonl"
    command = ("batch", "-m", packed, source, "-o", output, "--max-tokens", 2)
    source.write_text("one\ntwo\nthree\n")
    assert run(*command).returncode == 0
    before = results(output)
    source.write_text("one\nTWO\nthree\n")
    assert run(*command).returncode == 0
    after = results(output)
    assert after[1] == before[1]
    assert after[2]["tokens"] != before[2]["tokens"] or after[2]["text"] != before[2]["text"]
    refused = run(*command, "--temperature", 1.5)
    assert refused.returncode == 2
    assert "temperature was" in refused.stderr
    assert results(output) == after


def test_a_dry_run_loads_nothing(run: Run, packed: Path, tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", ["a question", {"prompt": "x", "bad": 1}])
    done = run("batch", "-m", packed, source, "-o", tmp_path / "out.jsonl", "--dry-run", "--max-tokens", 30)
    assert done.returncode == 0, done.stderr
    assert "30 at most" in done.stdout
    assert "line 2: unknown field 'bad'" in done.stdout
    assert list(tmp_path.glob("out*")) == []
    (tmp_path / "out.jsonl").touch()
    again = run("batch", "-m", packed, source, "-o", tmp_path / "out.jsonl", "--dry-run")
    assert "already are counted too" in " ".join(again.stderr.split())


def test_what_failed_before_is_in_an_output(run: Run, packed: Path, tmp_path: Path) -> None:
    done = run("batch", "-m", packed, written(tmp_path / "in.jsonl", ["a question"]), "--retry-errors")
    assert done.returncode == 2
    assert "--retry-errors belongs to --output" in done.stderr


def test_equal_seeds_and_ids_are_equal_answers(run: Run, packed: Path, tmp_path: Path) -> None:
    lines = [{"id": id_, "prompt": "Once"} for id_ in "abcdef"]
    options = ("-m", packed, "--max-tokens", 12, "--temperature", 1.2, "--seed", 5)
    texts = []
    for order in (lines, lines[::-1]):
        done = run("batch", written(tmp_path / "in.jsonl", order), *options)
        found = [json.loads(line) for line in done.stdout.splitlines()]
        texts.append({value["id"]: value["text"] for value in found})
    assert texts[0] == texts[1]
    assert len(set(texts[0].values())) > 1


def test_ctrl_c_says_how_to_go_on(packed: Path, tmp_path: Path) -> None:
    process = started(packed, many(tmp_path, 400), tmp_path / "out.jsonl")
    wait_for(process, tmp_path / "out.jsonl")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "the same command goes on" in stderr
    assert results(tmp_path / "out.jsonl")


@pytest.mark.parametrize("reproducible", [False, True])
def test_kills_at_any_moment(packed: Path, tmp_path: Path, reproducible: bool) -> None:
    source, output, rng = many(tmp_path, 60), tmp_path / "out.jsonl", random.Random(7)
    options = ("--reproducible",) if reproducible else ()
    for number in range(KILLS):
        process = started(packed, source, output, "--parallel", WIDTHS[number % 4], *options)
        if wait_for(process, output, seconds=rng.uniform(0, 0.4)):
            process.kill()
        process.communicate()
    for path, width in ((output, 8), (tmp_path / "whole.jsonl", 3)):
        process = started(packed, source, path, "--parallel", width, *options)
        process.communicate(timeout=120)
        assert process.returncode == 0
    killed, whole = results(output), results(tmp_path / "whole.jsonl")
    assert set(killed) == set(whole) == {f"p{i}" for i in range(60)}
    if reproducible:
        assert {id_: bits(value) for id_, value in killed.items()} == {id_: bits(value) for id_, value in whole.items()}
        assert len({value["fingerprint"] for value in killed.values()}) == 1


def bits(result: dict[str, Any]) -> tuple[str, list[Any]]:
    return result["text"], result["logprobs"]


def started(model: Path, source: Path, output: Path, *more: object) -> subprocess.Popen[str]:
    command = ["batch", "-m", model, source, "-o", output, "--max-tokens", 20, "--logprobs", 2, "--context", 256, *more]
    return subprocess.Popen(
        [sys.executable, "-m", "grok_local", *map(str, command)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], output: Path, *, seconds: float = 0.0) -> bool:
    """Until there is a result more than there was, and so long then. Says whether the process is still there."""
    before = output.stat().st_size if output.exists() else 0
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        if output.exists() and output.stat().st_size > before:
            time.sleep(seconds)
            break
        time.sleep(0.005)
    return process.poll() is None

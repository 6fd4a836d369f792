"""Scores against the logits they come from, by formulas of their own; lines that are scored, and those that are not."""

from __future__ import annotations

import json
import math
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

import grok_local
from grok_local.errors import ContextError, GrokLocalError, ModelError, OptionError, OutputError, WorkerLost
from grok_local.runtime.jobs.lines import read_lines, require_lines
from grok_local.runtime.jobs.score_lines import FIELDS, scored
from grok_local.runtime.text.scoring import Estimate, divergence, perplexity
from tests.conftest import Run

IDS = random.Random(3).choices(range(5, 2000), k=400)
TEXT = "The router chooses two of eight experts for every token of a layer."


def log_probabilities(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """By the definition, in float64."""
    powers = np.exp(logits.astype(np.float64))
    found: npt.NDArray[np.float64] = np.log(powers / powers.sum(1, keepdims=True))
    return found


@pytest.fixture(scope="module")
def scorer(packed: Path) -> Iterator[grok_local.Model]:
    with grok_local.load(packed, context=512, threads=2, kv_type="f32") as loaded:
        yield loaded


def test_scores_are_the_logarithms_of_the_tokens_probabilities(scorer: grok_local.Model) -> None:
    texts: list[Any] = [TEXT, IDS[:200], "x", [7]]
    for text, score in zip(texts, scorer.score(texts), strict=True):
        ids = scorer.tokenize(text) if isinstance(text, str) else text
        rows = log_probabilities(scorer.logits(ids))
        expected = [rows[at, token] for at, token in enumerate(ids[1:])]
        assert (score.tokens, score.logprobs[0], len(score.logprobs)) == (ids, None, len(ids))
        assert score.logprobs[1:] == pytest.approx(expected, abs=2e-4)
        assert score.total == pytest.approx(sum(expected), abs=2e-3)
    assert scorer.score([""]) == [grok_local.Score([], [])]


def test_choices_are_scored_after_the_text_which_is_evaluated_once(packed: Path, tmp_path: Path) -> None:
    choices = [" an expert", " a router", ", or two of them"]
    trace = tmp_path / "trace.jsonl"
    with grok_local.load(packed, context=512, threads=2, trace_experts=trace) as model:
        scores = model.score([IDS[:300]], choices=choices)[0]
        tokens = [model.engine.continue_ids(choice) for choice in choices]
        evaluated = len(trace.read_text().splitlines()) - 1
        assert [score.tokens for score in scores] == tokens
        # The last token of the text once for each choice, since its logits are not kept; the last of a choice never.
        assert evaluated == 299 + sum(map(len, tokens))
        for ids, score in zip(tokens, scores, strict=True):
            whole = model.score([[*IDS[:300], *ids]])[0]
            assert score.logprobs == pytest.approx(whole.logprobs[300:], abs=2e-3)


def test_what_cannot_be_scored_is_an_error(packed: Path, scorer: grok_local.Model) -> None:
    with pytest.raises(ContextError, match="do not fit the context of 512"):
        scorer.score([IDS + IDS])
    with pytest.raises(OptionError, match="list of texts"):
        scorer.score("text")
    for wrong in (5, None):
        with pytest.raises(OptionError, match="list of texts"):
            scorer.score(wrong)  # type: ignore[call-overload]
    for choices in ("bc", [], [1], 5):
        with pytest.raises(OptionError, match="a list of texts is wanted"):
            scorer.score(["a"], choices=choices)  # type: ignore[arg-type]
    assert [len(scores) for scores in scorer.score(["x", "x"], choices=iter(["a", "b"]))] == [2, 2]  # type: ignore[call-overload]
    with pytest.raises(OptionError, match="it is empty"):
        scorer.score(["text"], choices=["a", ""])
    with pytest.raises(OptionError, match="this one is empty"):
        scorer.score([""], choices=["a"])
    with pytest.raises(OptionError):
        scorer.score([[10**6]])
    with grok_local.load(packed, context=256) as closed:
        pass
    for method in (lambda: closed.score(["x"]), lambda: closed.logits([5])):
        with pytest.raises(ModelError, match="closed"):
            method()


def test_perplexity_counts_the_second_half_of_each_window(scorer: grok_local.Model) -> None:
    told: list[tuple[int, int]] = []
    found = perplexity(scorer.engine, IDS, window=128, done=lambda *pair: told.append(pair))
    losses = []
    for start in (0, 128, 256):
        window = IDS[start : start + 128]
        rows = log_probabilities(scorer.logits(window))
        losses += [-rows[at, window[at + 1]] for at in range(64, 127)]
    assert found.count == len(losses) == 3 * 63
    assert found.mean == pytest.approx(np.mean(losses), abs=1e-4)
    assert found.margin == pytest.approx(1.96 * np.std(losses, ddof=1) / math.sqrt(len(losses)), rel=1e-3)
    assert found.exponentials[0] == pytest.approx(math.exp(np.mean(losses)), rel=1e-3)
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    with pytest.raises(ContextError, match="at least 500 are needed"):
        perplexity(scorer.engine, IDS, window=500)
    with pytest.raises(OptionError, match="between 4 and the context of 512"):
        perplexity(scorer.engine, IDS, window=600)


def test_divergence_is_what_its_definition_says(scorer: grok_local.Model, small: Path, tmp_path: Path) -> None:
    assert divergence(scorer.engine, scorer.engine, IDS, window=200).nats.mean == pytest.approx(0, abs=1e-6)
    other = grok_local.quantize_checkpoint(small, tmp_path / "other.gguf", type="q8_0").path
    with grok_local.load(other, context=512, threads=2, kv_type="f32") as base:
        found = divergence(scorer.engine, base.engine, IDS, window=200)
        nats, same = [], []
        for start in (0, 200):
            p, q = (log_probabilities(side.logits(IDS[start : start + 200]))[100:199] for side in (base, scorer))
            nats += (np.exp(p) * (p - q)).sum(1).tolist()
            same += (p.argmax(1) == q.argmax(1)).tolist()
    assert found.nats.count == 198
    assert found.nats.mean == pytest.approx(np.mean(nats), rel=1e-2)
    assert found.largest == pytest.approx(max(nats), rel=1e-2)
    assert found.same_top == pytest.approx(np.mean(same), abs=0.02)


def test_an_estimate_of_one_value_knows_nothing() -> None:
    assert Estimate.of([1.0]) == Estimate(1.0, math.inf, 1)
    assert Estimate.of([1.0]).exponentials == (math.e, 0.0, math.inf)


# -- lines -------------------------------------------------------------------------------------------------------------


@given(st.text(), st.booleans())
def test_any_text_is_lines(text: str, as_text: bool) -> None:
    lines = read_lines(text, known=("id", "text"), as_text=as_text)
    assert len(lines) == sum(bool(line.lstrip("\ufeff").strip()) for line in re.split("\r\n|\n|\r", text))
    assert len({line.id for line in lines}) == len(lines)
    assert all(line.error or line.fields is not None for line in lines)


def test_what_lines_say() -> None:
    text = '{"id": "a", "text": "x"}\r\n\n plain\n{"txt": 1}\n{"id": "a", "text": "y"}\n{"id": [1]}\n{1}\n' + "[" * 9
    lines = read_lines(text, known=("id", "text"), as_text=False)
    assert [line.number for line in lines] == [1, 3, 4, 5, 6, 7, 8]
    assert [line.id for line in lines] == [1, 3, 4, 5, 6, 7, 8]
    assert [dict(line.fields) for line in lines[1:2]] == [{"text": " plain"}]
    assert lines[2].error == "unknown field 'txt': did you mean 'text'?"
    assert lines[0].error == lines[3].error == "id 'a' is another line's too"
    numbered = read_lines('{"id": 3, "text": "x"}\n\ny\nz', known=("text",), as_text=False)
    assert [line.id for line in numbered] == [3, "line 3", 4]
    assert lines[4].error == "id: one text or whole number is wanted"
    assert (lines[5].error or "").startswith("no JSON: ")
    assert lines[6].fields == {"text": "[" * 9}


def test_files_that_were_joined_have_marks_inside() -> None:
    text = '\ufeff{"text": "a"}\n\ufeff{"text": "b"}\n\ufeffplain\n\ufeff\n'
    lines = read_lines(text, known=("text",), as_text=False)
    assert [line.fields for line in lines] == [{"text": "a"}, {"text": "b"}, {"text": "plain"}]
    assert read_lines(text, known=("text",), as_text=True)[1].fields == {"text": '{"text": "b"}'}


@pytest.mark.parametrize("begin", ["", "\ufeff", "\n "])
@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ('[{"prompt": "a", "max_tokens": 1}]', "jq -c '.[]'"),
        ('[{"prompt": "a"},\r{"prompt": ', "jq -c '.[]'"),
        ('[\n  "a",\n  "b"\n]\n', "jq -c '.[]'"),
        ('["a", "b"]\n', "jq -c '.[]'"),
        ('{\n  "prompt": "a"\n}\n', "jq -c .)"),
        ('{"prompt": "a",\r\n "seed": 1}\r\n{"prompt": "b"}', "jq -c .)"),
    ],
)
def test_json_over_several_lines_is_no_lines(begin: str, text: str, remedy: str) -> None:
    with pytest.raises(OptionError) as refused:
        require_lines(begin + text, "in.json")
    assert str(refused.value).startswith("in.json: ")
    assert remedy in str(refused.value)


@pytest.mark.parametrize(
    "text", ["", "[1] Smith, J.\nx", "[INST] x", "[", '{"text": "a"}\n{"text": "b"}', "{\nx", "5\n6", "[" * 10**5]
)
def test_what_else_begins_like_json_is_lines(text: str) -> None:
    require_lines(text, "in.jsonl")


def test_an_id_of_null_is_none(scorer: grok_local.Model) -> None:
    (line,) = read_lines('{"id": null, "text": "hello you", "tokens": null}', known=FIELDS, as_text=False)
    assert line.id == 1
    assert scored(scorer, line)["sum"] < 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "a", "continuation": ""}, "line 1: continuation: it is empty"),
        ({"prompt": "", "continuation": "b"}, "line 1: prompt: it is empty"),
        ({"prompt": "", "choices": ["b"]}, "line 1: prompt: it is empty"),
        ({"prompt": "a", "choices": ["b", ""]}, "line 1: choice '': it is empty"),
    ],
)
def test_an_empty_field_is_named_as_it_was_given(scorer: grok_local.Model, fields: Any, message: str) -> None:
    (line,) = read_lines(json.dumps(fields), known=FIELDS, as_text=False)
    assert scored(scorer, line)["error"] == {"code": "option", "message": message}


@pytest.mark.parametrize("error", [WorkerLost("gone"), OutputError("the trace: no space"), ModelError("dead")])
def test_what_is_no_lines_fault_ends_all(error: GrokLocalError) -> None:
    class Failing:
        def score(self, *_: object, **__: object) -> None:
            raise error

    (line,) = read_lines("a text", known=FIELDS, as_text=False)
    with pytest.raises(type(error)):
        scored(Failing(), line)  # type: ignore[arg-type]


def test_a_stopped_score_goes_on(run: Run, packed: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("".join(f"{number} experts of a layer that has a router\n" for number in range(3000)))
    command = ("score", "-m", packed, source, "-o", output, "--context", 256)
    process = subprocess.Popen([sys.executable, "-m", "grok_local", *map(str, command)], stderr=subprocess.PIPE)
    while process.poll() is None and not (output.exists() and output.read_bytes().count(b"\n") > 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, b"the same command goes on" in stderr) == (130, True)
    before = output.read_bytes()
    assert before.count(b"\n") < 3000
    source.write_text("".join(source.read_text().splitlines(keepends=True)[: before.count(b"\n") + 5]))
    output.write_bytes(before[before.index(b"\n") + 1 :])  # as if the first had never been scored
    done = run(*command)
    assert (done.returncode, "have their results already" in done.stderr) == (0, True)
    ids = [json.loads(line)["id"] for line in output.read_text().splitlines()]
    assert ids == list(range(1, before.count(b"\n") + 6))
    again = run("score", "-m", packed, source, "-o", output, "--context", 128)
    assert (again.returncode, "context was 256, is 128" in again.stderr) == (2, True)
    same = run("score", "-m", packed, source, "-o", source)
    assert (same.returncode, "is the input" in same.stderr) == (2, True)
    assert source.read_text().count("\n") == len(ids)


def test_a_file_is_scored_line_by_line(run: Run, packed: Path, tmp_path: Path) -> None:
    lines = [
        '{"id": "t", "text": "The router chooses."}',
        '{"prompt": "The router", "continuation": " chooses."}',
        '{"prompt": "The router", "choices": [" chooses", " sings loudly and long"]}',
        '{"tokens": [5, 6, 7]}',
        "",
        "plain text",
        '{"text": 5}',
        '{"text": "x", "choises": ["y"]}',
        f'{{"id": "long", "text": "{"word " * 900}"}}',
        '{"id": "nothing", "text": ""}',
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    done = run("score", "-m", packed, source, "-o", output, "--context", 256)
    assert (done.returncode, done.stdout) == (3, "")
    assert "4 of 9 lines could not be scored" in done.stderr
    results = {result["id"]: result for result in map(json.loads, output.read_text().splitlines())}
    assert list(results) == ["t", 2, 3, 4, 6, 7, 8, "long", "nothing"]
    with grok_local.load(packed, context=256) as model:
        expected = model.score(["The router chooses."])[0]
    assert results["t"]["tokens"] == expected.tokens
    assert results["t"]["logprobs"][1:] == pytest.approx(expected.logprobs[1:], abs=1e-5)
    assert results["t"]["sum"] == pytest.approx(expected.total, abs=1e-4)
    assert results[3]["choices"][0]["text"] == " chooses"
    assert results[3]["best"] == max((0, 1), key=lambda number: results[3]["choices"][number]["sum"])
    assert results[7]["error"] == {"code": "option", "message": "line 7: text: a text is wanted"}
    assert "did you mean 'choices'" in results[8]["error"]["message"]
    assert results["long"]["error"]["code"] == "context"


def test_where_scores_go(run: Run, packed: Path, tmp_path: Path) -> None:
    done = run("score", "-m", packed, "-", "-o", tmp_path / "no folder" / "out.jsonl", stdin="x\n")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}/no folder/out.jsonl: there is no folder ")
    assert run("score", "-m", packed, tmp_path / "missing").stderr.startswith("error: ")
    # A link leads on, others' files stay, and a device stays one.
    target, link = tmp_path / "target.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(target)
    target.write_text("before")
    assert run("score", "-m", packed, "-", "-o", link, stdin="The router\n").returncode == 1
    assert target.read_text() == "before"
    target.write_text("")
    target.chmod(0o600)
    assert run("score", "-m", packed, "-", "-o", link, stdin="The router\n").returncode == 0
    assert link.is_symlink()
    assert json.loads(target.read_text())["id"] == 1
    assert target.stat().st_mode & 0o777 == 0o600
    assert run("score", "-m", packed, "-", "-o", "/dev/stdout", stdin="The router\n").stdout.startswith('{"id": 1')
    plain = run("score", "-m", packed, "-", stdin="The router\n")
    assert json.loads(plain.stdout)["logprobs"][0] is None


def test_perplexity_and_divergence_of_a_file(run: Run, packed: Path, small: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"token {number} of {number * 7 % 13} experts" for number in range(300)))
    done = run("perplexity", "-m", packed, text, "--window", 128)
    with grok_local.load(packed, context=256) as model:
        expected = perplexity(model.engine, model.tokenize(text.read_text()), window=128)
    value = expected.exponentials[0]
    assert done.stdout.startswith(f"perplexity {value:.2f}"[:-1])
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    base = grok_local.quantize_checkpoint(small, tmp_path / "base.gguf", type="q8_0").path
    trace = ("--trace-experts", tmp_path / "trace")
    compared = run("perplexity", "-m", packed, text, "--window", 128, "--kl-base", base, "--json", *trace)
    found = json.loads(compared.stdout)
    empty = run(
        "perplexity", "-m", packed, text, "--kl-base", "", *trace
    )  # a trace that is there is an error of loading
    assert (empty.returncode, empty.stderr) == (2, "error: --kl-base names no model: its value is empty\n")
    assert "no such file" in run("perplexity", "-m", packed, text, "--kl-base", "nowhere", *trace).stderr
    assert found["perplexity"] == pytest.approx(value, rel=1e-3)
    assert found["interval"][0] < found["perplexity"] < found["interval"][1]
    assert 0 < found["kl_divergence"]["mean"] < found["kl_divergence"]["largest"]
    one = json.loads(run("perplexity", "-m", packed, "-", "--window", 4, "--json", stdin="one two three four").stdout)
    assert one["interval"] is None
    text.write_text("too short")
    record = tmp_path / "loaded"  # is there when the model is
    short = run("perplexity", "-m", packed, text, "--trace-experts", record)
    assert (short.returncode, short.stderr.count(f"{text}: has ")) == (1, 1)
    assert "at least 512 are needed for one window, and with --window N" in " ".join(short.stderr.split())
    assert not record.exists()


def test_errors_are_in_the_tree() -> None:
    assert issubclass(grok_local.errors.LinesFailed, GrokLocalError)
    assert grok_local.errors.LinesFailed.exit_code == 3

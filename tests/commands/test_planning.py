"""plan, bench, doctor and worker as commands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import grok_local
from grok_local.placement.forecast import forecast
from grok_local.views.plans import describe_plan
from tests.conftest import Run
from tests.workers import Worker


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home that remembers what was measured of this machine."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def home(measured: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GROK_LOCAL_HOME", str(measured))
    return measured


DESCRIBED = ("--ram", "128G", "--vram", "24G", "--ram-speed", "60G", "--vram-speed", "600G", "--disk-speed", "7G")


def test_plan_before_a_download(run: Run) -> None:
    shown = run("plan", "--like", "grok-1", *DESCRIBED)
    assert shown.returncode == 0
    assert "Grok-1: 181 GB, 8192 tokens of context" in shown.stdout
    for line in (r"GPU0 .* 65 .* 4 layers", r"RAM .* 60 layers .* 122 GB", r"disk .* 44 GB"):
        assert re.search(line, shown.stdout)


def test_the_plan_in_the_documents_is_what_is_shown(run: Run) -> None:
    page = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
    example = re.search(r"```\n\$ grok-local (plan .*)\n((?:.*\n)*?)```", page)
    assert example
    shown = run(*example[1].split()).stdout
    assert [line.rstrip() for line in shown.splitlines()] == example[2].splitlines()


def test_a_usual_model_does_not_stand_against_like(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROK_LOCAL_MODEL", "tiny")
    assert run("plan", "--like", "grok-1", *DESCRIBED).stdout.startswith("Grok-1: 181 GB")
    both = run("plan", "--like", "grok-1", "--model", "tiny", *DESCRIBED)
    assert (both.returncode, both.stderr) == (2, "error: --model and --like: give one of them\n")


def test_plan_for_scripts(run: Run) -> None:
    found = json.loads(run("plan", "--like", "Grok-2", *DESCRIBED, "--type", "q4_0", "--json").stdout)
    assert found["model"] == "Grok-2"
    assert [place["place"] for place in found["places"]] == ["GPU0", "RAM"]
    assert found["tokens_per_second"] == pytest.approx(1 / sum(part["seconds"] for part in found["token"]), rel=1e-2)
    assert found["llama"][:4] == ["-c", "8192", "-ngl", "24"]
    assert found["llama"][4] == "-ot"
    assert re.fullmatch(r"blk\\\.\([\d|]+\)\\\.ffn_\(.*\)_exps=CPU", found["llama"][5])


def test_plan_of_a_file_on_this_machine(run: Run, packed: Path) -> None:
    found = json.loads(run("plan", "-m", packed, "--context", 512, "--json").stdout)
    assert found["bytes"] < packed.stat().st_size
    assert found["disk"] == 0
    assert found["assumptions"] == []
    assert 10 < found["tokens_per_second"] < 1e6
    with_worker = run("plan", "-m", packed, "--worker", "127.0.0.1:9")
    assert with_worker.returncode == 1
    assert with_worker.stderr.count("error: ") == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"context": 300, "kv_type": "f32"},
        {"memory": "700M", "stream": "on"},
        {"memory": "40M", "context": 64},
        {"repack": "on"},
        {"repack": "off"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["tiny", "small"])
def test_what_is_planned_is_what_is_loaded(run: Run, packed: Path, name: str, options: dict[str, Any]) -> None:
    model = name if name == "tiny" else str(packed)
    given = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", value)]
    planned = json.loads(run("plan", "-m", model, *given, "--json").stdout)
    with grok_local.load(model, **options) as loaded:
        plan = loaded.placement.plan
    del planned["together"]  # what would be if several were asked
    carried_out = json.loads(json.dumps(describe_plan(plan, forecast(plan))))
    for described in (planned, carried_out):
        for place in described["places"]:
            del place["capacity"]  # what others use meanwhile
        for measured in ("token", "tokens_per_second", "tokens_per_second_full_context", "assumptions"):
            del described[measured]
    assert carried_out == planned


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--like", "grok-3"], 2, "choose one of grok-1, grok-2"),
        (["--like", "grok-1", "-m", "tiny"], 2, "give one of them"),
        (["--like", "grok-1", "--ram", "much"], 2, "not a size"),
        (["--like", "grok-1", "--ram", "0"], 2, "must be more than 0"),
        (["--like", "grok-1", "--type", "q3"], 2, "no type 'q3'"),
        (["--like", "grok-1", "--ram", "4G"], 1, "no smaller context fits either"),
        (["--like", "grok-1", *DESCRIBED, "--experts-on", "9"], 1, "say --experts-on 4"),
        (["--like", "grok-1", *DESCRIBED, "--experts-on", "some"], 2, "cpu, gpu, or a number of layers"),
        (["--like", "grok-1", *DESCRIBED, "--override", "x=GPU9"], 2, "there are RAM, GPU0"),
        (["-m", "tiny", "--type", "q8_0"], 2, "--type belongs to --like"),
        (["-m", "nowhere.gguf"], 1, "no such file"),
        (["--override", "a"], 2, r"for example 'blk\.0\.ffn_.*_exps=RAM'"),
    ],
)
def test_plans_that_cannot_be(run: Run, arguments: list[str], code: int, words: str) -> None:
    result = run("plan", *arguments, "--threads", "1")
    assert result.returncode == code
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_bench(run: Run, packed: Path) -> None:
    sizes = ("--prompt", 32, "--tokens", 8, "--repeats", 2, "--context", 64)
    shown = run("bench", "-m", packed, *sizes)
    assert shown.returncode == 0
    assert re.search(r"generation +8 +[\d.]+ ± [\d.]+", shown.stdout)
    assert "predicted generation" in shown.stdout
    found = json.loads(run("bench", "-m", packed, *sizes, "--json").stdout)
    assert len(found["prompt"]["speeds"]) == 2
    assert min(found["prompt"]["mean"], found["generation"]["mean"], found["predicted"], found["limit"]) > 0
    assert run("bench", "-m", packed, "--context", 64).returncode == 1


def test_doctor(run: Run, packed: Path) -> None:
    findings = json.loads(run("doctor", "--json").stdout)
    statuses = {finding["status"] for finding in findings}
    assert statuses <= {"ok", "note", "problem"}
    shown = run("doctor", "-m", packed)
    assert shown.returncode == ("problem" in statuses)  # a build that breaks with this machine's AMX is one
    assert "llama-cpp-python" in shown.stdout
    assert all(finding["remedy"] for finding in findings if finding["status"] == "problem")


def test_generating_with_a_worker(run: Run, packed: Path) -> None:
    options = ("-m", packed, "Hello", "--max-tokens", 8, "--temperature", 0, "--context", 64, "--repack", "off")
    alone = run("generate", *options)
    with Worker() as worker:
        together = run("generate", *options, "--worker", worker.endpoint)
        assert (
            json.loads(run("plan", "-m", packed, "--worker", worker.endpoint, "--json").stdout)["places"][0]["layers"]
            == 3
        )
    assert together.returncode == 0
    assert together.stdout == alone.stdout
    gone = run("generate", *options, "--worker", worker.endpoint)
    assert gone.returncode == 1
    assert gone.stderr.count("\n") == 1
    assert worker.endpoint in gone.stderr

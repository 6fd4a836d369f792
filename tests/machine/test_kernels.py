"""What children find out about the kernels, what is made of it, and what is remembered."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grok_local import folders
from grok_local.ggml.devices import extra_buffer_types
from grok_local.machine import kernels
from grok_local.machine.facts import Device, Speeds
from grok_local.machine.kept import keep, kept
from grok_local.machine.kernels import with_speeds
from grok_local.machine.limits import last_cache, memory_limits
from grok_local.machine.trials import NOT_HELD, REPACK, RIGHT, Item, Outcome, is_broken, run_items, working_set

HAS_REPACK = pytest.mark.skipif(REPACK not in extra_buffer_types(), reason="this build rearranges nothing")


class Canned:
    """Answers items without a child; counts how often it was asked, and for what."""

    def __init__(self) -> None:
        self.tried: list[Item] = []
        self.answers: dict[Item, Outcome] = {}

    def __call__(self, items: Sequence[Item], **_: Any) -> dict[Item, Outcome]:
        self.tried += items
        return {item: self.answers.get(item, self.usual(item)) for item in items}

    @staticmethod
    def usual(item: Item) -> Outcome:
        if item.kind in ("speed", "prompt"):
            return Outcome(2e9 if item.buffer else 1e9)
        return Outcome(1e-7) if item.type.startswith("Q4") else Outcome(None)


@pytest.fixture
def canned() -> Canned:
    return Canned()


def speeds(canned: Canned, *types: str, threads: int = 2) -> Speeds:
    return kernels.speeds(types, threads=threads, trial=canned, buffers=["AMX", REPACK])


def no_trial(*_: Any, **__: Any) -> dict[Item, Outcome]:
    raise AssertionError("something was measured that is known")


# -- children ----------------------------------------------------------------------------------------------------------


@HAS_REPACK
def test_a_crash_is_reported_and_the_rest_goes_on() -> None:
    crash, fine = Item("force", "IQ4_XS", REPACK), Item("check", "IQ4_XS", REPACK)
    outcomes = run_items([crash, fine], threads=2)
    assert outcomes[crash].verdict.startswith("crashed (SIG")
    assert not outcomes[crash].fleeting
    assert outcomes[fine].verdict == NOT_HELD


@HAS_REPACK
def test_repacked_products_are_right() -> None:
    item = Item("check", "Q4_0", REPACK)
    outcome = run_items([item], threads=2)[item]
    assert outcome.verdict == RIGHT
    assert outcome.value is not None


def test_failures_have_their_reasons() -> None:
    abort, mistake = Item("check", "I32"), Item("check", "Q4_0", "no buffer type")
    outcomes = run_items([abort, mistake], threads=1)
    assert re.fullmatch(r"crashed \(SIGABRT, ggml.c:\d+: GGML_ASSERT\(.*\) failed\)", outcomes[abort].failure)
    assert outcomes[mistake].failure == "failed (KeyError: 'no buffer type')"
    assert outcomes[mistake].fleeting


def test_a_child_that_takes_too_long_is_killed() -> None:
    items = [Item("check", "Q4_0"), Item("check", "Q8_0")]
    outcomes = run_items(items, threads=1, timeout=0.001)
    assert [outcomes[item].failure for item in items] == ["not finished after 0.001 s"] * 2


def test_a_child_that_does_not_start_fails_every_item(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    items = [Item("check", "Q4_0"), Item("check", "Q8_0")]
    outcomes = run_items(items, threads=1)
    assert [outcomes[item].failure for item in items] == ["failed (exit code 1)"] * 2


def test_the_first_run_measures_and_the_second_starts_no_child() -> None:
    said: list[str] = []
    small = partial(run_items, size=1)
    first = kernels.speeds(["Q8_0", "I32", "no type"], threads=1, say=said.append, trial=small)
    assert set(first.plain) == {"Q8_0"}
    assert 1e8 < first.plain["Q8_0"] <= first.memory
    assert "measuring this machine, once: speed of Q8_0" in said
    assert kernels.speeds(["Q8_0"], threads=1, trial=no_trial) == first


def test_a_device_is_measured_like_any_other_and_once() -> None:
    # The CPU stands in for a GPU: ggml has both behind the same functions.
    given = [Device("CPU", "stand-in", "gpu", 1, 1), Device("RPC0", "", "worker", 1, 1)]
    first = with_speeds(given, ["Q8_0"], trial=partial(run_items, size=1))
    assert 1e8 < first[0].speed < 1e13
    assert first[1:] == given[1:]
    assert with_speeds(given, ["Q8_0"], trial=no_trial) == first


def test_a_device_is_measured_again_after_a_bad_moment(canned: Canned) -> None:
    gpu, item = Device("GPU0", "", "gpu", 1, 1), Item("device", "Q8_0", "GPU0")
    canned.answers[item] = Outcome(failure="failed (out of memory)", fleeting=True)
    assert with_speeds([gpu], ["Q8_0"], trial=canned) == [gpu]
    canned.answers[item] = Outcome(4e11)
    assert [device.speed for device in with_speeds([gpu], ["Q8_0"], trial=canned)] == [4e11]
    assert [device.speed for device in with_speeds([gpu], ["Q8_0"], trial=no_trial)] == [4e11]


def test_a_device_that_crashes_is_left_alone(canned: Canned) -> None:
    gpu = Device("GPU0", "", "gpu", 1, 1)
    canned.answers[Item("device", "Q8_0", "GPU0")] = Outcome(failure="crashed (SIGSEGV)")
    assert with_speeds([gpu], ["Q8_0"], trial=canned) == [gpu]
    assert with_speeds([gpu], ["Q8_0"], trial=no_trial) == [gpu]


def test_a_device_is_measured_again_with_another_build_of_its_library(canned: Canned, tmp_path: Path) -> None:
    gpu, library = Device("GPU0", "", "gpu", 1, 1), tmp_path / "libggml-vulkan.so.0"
    library.write_bytes(b"one build")
    canned.answers[Item("device", "Q8_0", "GPU0")] = Outcome(1e11)
    with_speeds([gpu], ["Q8_0"], trial=canned, libraries=[library])
    library.write_bytes(b"another, with better kernels")
    canned.answers[Item("device", "Q8_0", "GPU0")] = Outcome(2e11)
    (measured,) = with_speeds([gpu], ["Q8_0"], trial=canned, libraries=[library])
    assert measured.speed == 2e11
    assert with_speeds([gpu], ["Q8_0"], trial=no_trial, libraries=[library]) == [measured]


def test_a_broken_buffer_type_is_given_up_within_a_run() -> None:
    wrong, after = Item("check", "Q4_0", "no buffer type"), Item("check", "Q8_0", "no buffer type")
    outcomes = run_items([wrong, after, Item("check", "Q8_0")], threads=1)
    assert set(outcomes) == {wrong, Item("check", "Q8_0")}
    assert not is_broken(REPACK, ["crashed"])  # it has kernels of its own for each type


# -- what is made of it ------------------------------------------------------------------------------------------------


def test_only_what_is_right_counts_as_repacked(canned: Canned) -> None:
    canned.answers[Item("check", "Q4_0", REPACK)] = Outcome(0.5)
    found = speeds(canned, "Q4_K", "Q4_0", "Q8_0")
    plain = dict.fromkeys(["Q4_K", "Q4_0", "Q8_0"], 1e9)
    assert found == Speeds(plain, {"Q4_K": 2e9}, False, 2e9, {"Q4_K": 1e9}, {"Q4_K": 2e9})
    assert Item("speed", "Q4_0", REPACK) not in canned.tried
    verdicts = kernels.verdicts(["Q4_K", "Q4_0", "Q8_0"], threads=2, trial=no_trial, buffers=["AMX", REPACK])
    assert verdicts[REPACK, "Q4_0"] == "wrong numbers (relative error 0.5)"
    assert verdicts[REPACK, "Q8_0"] == NOT_HELD


def test_llama_may_choose_where_everything_is_right_or_left_alone(canned: Canned) -> None:
    assert speeds(canned, "Q4_K", "F32").all_extra
    assert not speeds(canned, "F32").all_extra


@pytest.mark.parametrize("outcome", [Outcome(failure="crashed (SIGSEGV)"), Outcome(float("nan")), Outcome(1.0)])
def test_one_failure_of_amx_and_llama_may_not_choose(canned: Canned, outcome: Outcome) -> None:
    canned.answers[Item("check", "Q8_0", "AMX")] = outcome
    assert not speeds(canned, "Q4_K", "Q8_0").all_extra
    canned.tried.clear()
    speeds(canned, "Q6_K")
    assert Item("check", "Q6_K", REPACK) in canned.tried
    assert not any(item.buffer == "AMX" for item in canned.tried)


def test_rows_that_eight_does_not_divide_are_never_repacked() -> None:
    known = Speeds(repacked={"Q4_K": 1e9})
    assert known.can_repack("Q4_K", 6144)
    assert not known.can_repack("Q4_K", 6145)
    assert not known.can_repack("Q8_0", 6144)


def test_repacking_gains_only_where_prompts_do_not_lose_more() -> None:
    # Per GB: 1/10 + 3/40 plain; repacked 1/20 + 3/30 is less, 1/20 + 3/16 is more.
    quick, slow = {"Q4_K": 30e9}, {"Q4_K": 16e9}
    known = Speeds({"Q4_K": 10e9}, {"Q4_K": 20e9}, False, 40e9, {"Q4_K": 40e9}, quick)
    assert known.gains("Q4_K", experts=True)
    assert not replace(known, prompt_repacked=slow).gains("Q4_K", experts=True)
    assert replace(known, prompt_repacked=slow).gains("Q4_K", experts=False)
    assert not replace(known, repacked={"Q4_K": 9e9}).gains("Q4_K", experts=False)
    assert not known.gains("Q8_0", experts=True)


def test_the_working_set_does_not_fit_the_caches() -> None:
    assert 64 << 20 <= working_set() <= 1 << 30
    assert working_set() >= min(last_cache(), memory_limits()[1] // 4, 1 << 30)


# -- what is remembered ------------------------------------------------------------------------------------------------


def _cache() -> Path:
    return folders.cache_folder() / "speeds.json"


def test_missing_types_are_added(canned: Canned) -> None:
    speeds(canned, "Q4_K")
    before = len(canned.tried)
    assert set(speeds(canned, "Q4_K", "Q8_0").plain) == {"Q4_K", "Q8_0"}
    assert {item.type for item in canned.tried[before:]} == {"Q8_0"}


def test_other_threads_are_another_measurement(canned: Canned) -> None:
    speeds(canned, "Q4_K", threads=1)
    before = len(canned.tried)
    speeds(canned, "Q4_K")
    assert len(canned.tried) == 2 * before


def test_what_was_disturbed_is_not_believed_for_long(canned: Canned, monkeypatch: pytest.MonkeyPatch) -> None:
    canned.answers[Item("speed", "Q4_K")] = Outcome(1e8, fleeting=True)
    speeds(canned, "Q4_K")
    before = len(canned.tried)
    speeds(canned, "Q4_K")
    assert len(canned.tried) == before
    later = time.time() + 3600
    monkeypatch.setattr(time, "time", lambda: later)
    canned.answers.clear()
    assert speeds(canned, "Q4_K").plain == {"Q4_K": 1e9}


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"a": 1}', "\x00\xff", "null"])
def test_a_damaged_cache_is_measured_anew(canned: Canned, text: str) -> None:
    _cache().parent.mkdir(parents=True)
    _cache().write_text(text)
    assert speeds(canned, "Q4_K").plain == {"Q4_K": 1e9}
    assert kernels.speeds(["Q4_K"], threads=2, trial=no_trial, buffers=["AMX", REPACK]).plain == {"Q4_K": 1e9}


def test_a_cache_that_cannot_be_written_is_no_error(canned: Canned, home: Path) -> None:
    home.write_text("no folder")
    for _ in range(2):
        assert speeds(canned, "Q4_K").plain == {"Q4_K": 1e9}


_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
_TABLE = st.dictionaries(st.text(), st.floats() | st.integers() | st.text()) | _JSON
_TABLES = dict.fromkeys(("plain", "repacked", "prompt_plain", "prompt_repacked"), _TABLE)
_RECORD = st.fixed_dictionaries({**_TABLES, "verdicts": _JSON, "expires": _JSON})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=_JSON | _RECORD)
def test_whatever_was_kept_speeds_are_numbers(data: Any) -> None:
    canned = Canned()
    speeds(canned, "Q4_K")
    marks = list(json.loads(_cache().read_text()))
    _cache().write_text(json.dumps(dict.fromkeys(marks, data)))
    found = speeds(canned, "Q4_K")
    assert all(0 < speed < float("inf") for speed in (*found.plain.values(), *found.repacked.values()))


def test_several_that_keep_at_once_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    threads = [threading.Thread(target=keep, args=(path, str(i), [i])) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kept(path)
    assert all(value == [int(mark)] for mark, value in kept(path).items())
    assert list(tmp_path.iterdir()) == [path]

"""What an earlier run has done is neither lost nor done again; what changed is."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest

from grok_local.errors import InUseError, OptionError, OutputError
from grok_local.runtime.jobs.ledger import Ledger, manifest_of

LINES: dict[str | int, str] = {1: "h1", "b": "h2", 3: "h3"}
MADE: dict[str, Any] = {"model": "m", "temperature": 0.0}


def opened(
    path: Path, lines: dict[str | int, str] = LINES, *, made: dict[str, Any] = MADE, retry: bool = False
) -> Ledger:
    return Ledger(path, made, lines, key=lambda value: value.get("id"), retry=retry)


def ids(path: Path) -> list[Any]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


def begun(path: Path) -> Path:
    with opened(path) as ledger:
        ledger.write({"id": 3, "text": "c"})
        ledger.write({"id": 1, "error": {"code": "option", "message": "no"}})
    return path


def test_what_is_done_stays(tmp_path: Path) -> None:
    path = begun(tmp_path / "out.jsonl")
    with opened(path) as ledger:
        assert ledger.done == {3: False, 1: True}
        ledger.write({"id": "b", "text": "b"})
        ledger.sort({1: 0, "b": 1, 3: 2})
        ledger.write({"id": 4})
    assert ids(path) == [1, "b", 3, 4]


def test_a_torn_end_is_done_again(tmp_path: Path) -> None:
    path = begun(tmp_path / "out.jsonl")
    path.write_bytes(path.read_bytes()[:-5])
    with opened(path) as ledger:
        assert ledger.done == {3: False}
    assert ids(path) == [3]


def test_failures_are_tried_again_on_request(tmp_path: Path) -> None:
    path = begun(tmp_path / "out.jsonl")
    with opened(path, retry=True) as ledger:
        assert ledger.done == {3: False}
    assert ids(path) == [3]


def test_results_of_other_lines_are_moved_aside(tmp_path: Path) -> None:
    path = begun(tmp_path / "out.jsonl")
    with opened(path, {1: "h1", 3: "other"}) as ledger:
        assert ledger.done == {1: True}
        assert ledger.set_aside == 1
    assert ids(path) == [1]
    assert ids(tmp_path / "out.jsonl.replaced") == [3]


def test_twice_is_once(tmp_path: Path) -> None:
    path = begun(tmp_path / "out.jsonl")
    path.write_text(path.read_text() * 2)
    with opened(path) as ledger:
        assert ledger.done == {3: False, 1: True}
    assert ids(path) == [3, 1]


def test_another_job_is_refused(tmp_path: Path) -> None:
    path = begun(tmp_path / "out.jsonl")
    before = path.read_bytes()
    with pytest.raises(OptionError, match=r"temperature was 0\.0, is 0\.5"):
        opened(path, made={"model": "m", "temperature": 0.5})
    assert path.read_bytes() == before
    with opened(path) as ledger:
        assert ledger.done


@pytest.mark.parametrize("begun_before", [False, True])
@pytest.mark.parametrize(
    "data", [b"mine\n", b"a note without a newline", b'{"prompt": "a"}\n{"prompt": "b"}', b"GGUF\0"]
)
def test_files_of_others_are_left_alone(tmp_path: Path, data: bytes, begun_before: bool) -> None:
    """Also where there was an output of that name once, and where a line looks like one of a batch."""
    path = tmp_path / "out.jsonl"
    if begun_before and data[:1] != b"{":
        opened(path).__exit__()
    path.write_bytes(data)
    with pytest.raises(OutputError, match="no output to go on with"):
        opened(path)
    assert path.read_bytes() == data
    assert manifest_of(path).exists() == (begun_before and data[:1] != b"{")


def test_what_lies_beside_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    manifest_of(path).write_text("packing list\n")
    with pytest.raises(OutputError, match="no manifest that can be used"):
        opened(path)
    assert manifest_of(path).read_text() == "packing list\n"
    manifest_of(path).unlink()
    partial = tmp_path / "out.jsonl.partial"
    partial.write_text("precious")
    with opened(begun(path)) as ledger:
        ledger.sort({1: 0, 3: 1})
    assert ids(path) == [1, 3]
    assert partial.read_text() == "precious"


def test_two_at_once(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with opened(path), pytest.raises(InUseError):
        opened(path)


def test_an_option_that_the_manifest_does_not_have(tmp_path: Path) -> None:
    path = begun(tmp_path / "out.jsonl")
    with pytest.raises(OptionError, match='routing was null, is "llama'):
        opened(path, made={**MADE, "routing": "llama.cpp"})


def test_a_result_without_an_id_is_no_lines(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with opened(path, {"": "h"}) as ledger:
        ledger.write({"text": "whose?"})
    with opened(path, {"": "h"}) as ledger:
        assert ledger.done == {}
        ledger.write({"id": "", "text": "mine"})
        ledger.sort({"": 0})
    assert ids(path) == [""]


def test_nowhere_to_write(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=f"^{tmp_path}/missing/out.jsonl: there is no folder {tmp_path}/missing$"):
        opened(tmp_path / "missing" / "out.jsonl")
    with pytest.raises(OutputError, match=r"cannot be written \([^()]*\)$"):  # nothing is done yet
        opened(tmp_path / ("x" * 300))


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no file"):
        opened(tmp_path)
    with pytest.raises(OutputError, match="no file"):
        opened(Path("/dev/null"))


def test_a_link_leads_to_the_file(tmp_path: Path) -> None:
    link = tmp_path / "link.jsonl"
    link.symlink_to(tmp_path / "out.jsonl")
    begun(link)
    with opened(link, retry=True) as ledger:
        assert ledger.done == {3: False}
    assert link.is_symlink()
    assert ids(tmp_path / "out.jsonl") == [3]


def test_no_room_for_a_line(tmp_path: Path) -> None:
    path, before = begun(tmp_path / "out.jsonl"), resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(path) as ledger:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, before[1]))
        try:
            with pytest.raises(OutputError, match="what is done is kept"):
                ledger.write({"id": "b", "text": "a long one"})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with opened(path) as ledger:
        assert ledger.done == {3: False, 1: True}

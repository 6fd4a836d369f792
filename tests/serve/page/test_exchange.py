"""Lines out of the tree and into it."""

from __future__ import annotations

import json
from typing import Any

from tests.serve.page.desk import Desk

_MODULES = """
    const [{ Manuscript }, { linesOf, takeIn }] =
        await Promise.all([load("write/manuscript.js"), load("write/exchange.js")]);
    const manuscript = new Manuscript(() => {});
    const texts = () => manuscript.tree.nodes.filter(({ id }) => manuscript.tree.isShown(id))
        .map(({ id }) => manuscript.textAt(id)).filter(Boolean).sort();
"""


def _lines(*lines: Any) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_what_was_thrown_away_stays_out_of_lines(desk: Desk) -> None:
    found = desk.computes(
        _MODULES
        + """
        const typed = manuscript.add(0, { at: 0, text: "One day", kind: "typed" });
        const written = manuscript.add(typed.id, { at: 7, text: " a king", kind: "written", tokens: [] });
        const later = manuscript.add(written.id, { at: 14, text: " rose", kind: "typed" });
        const names = () => linesOf(manuscript, {}).map(({ id }) => id);
        const before = names();
        manuscript.throwAway(written.id);
        const prompts = linesOf(manuscript, {}).map(({ prompt }) => prompt);
        const { prompts: taken } = takeIn(manuscript, given[0]);
        const { answers, left } = takeIn(manuscript, given[1].replace("before", before[0]));
        return { prompts, taken, answers, left, texts: texts() };
        """,
        _lines({"prompt": "One day a king rose early", "id": 1}),
        _lines({"id": "before", "text": " again"}, {"id": 1, "text": " again"}),
    )
    assert found["prompts"] == ["One day"]
    assert (found["taken"], found["answers"], found["left"]) == (1, 1, 1)
    assert found["texts"] == ["One day", "One day a king rose early", "One day a king rose early again"]


def test_a_text_answers_to_every_name_that_lines_gave_it(desk: Desk) -> None:
    found = desk.computes(
        _MODULES
        + """
        takeIn(manuscript, given[0]);
        const [{ id }] = linesOf(manuscript, {});
        return [id, takeIn(manuscript, given[1]).answers];
        """,
        _lines({"prompt": "One", "id": 0}, {"prompt": "One"}, {"prompt": "One", "id": "b"}),
        _lines({"id": 0, "text": " a"}, {"id": "b", "text": " b"}),
    )
    assert found == [0, 2]


def test_lines_with_carriage_returns_go_on_at_their_ends(desk: Desk) -> None:
    logprobs = [{"token": "one\r\n", "logprob": -1}, {"token": "two", "logprob": -2}]
    found = desk.computes(
        _MODULES
        + """
        takeIn(manuscript, given[0]);
        takeIn(manuscript, given[1]);
        return [texts(), manuscript.tree.nodes.at(-1).tokens.map(([start]) => start)];
        """,
        _lines({"prompt": "A\r\nB\r\n", "id": 0}),
        _lines({"id": 0, "text": "one\r\ntwo", "logprobs": logprobs}),
    )
    assert found == [["A\nB\n", "A\nB\none\ntwo"], [0, 4]]

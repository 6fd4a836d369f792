"""What the page's modules compute of texts, against strings that are spliced plainly."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.page.desk import Desk

_RANDOM = """
    let state = 7;
    const drawn = (below) => (state = (state * 48271) % 2147483647) % below;
"""


def test_a_text_is_what_its_changes_make_of_it(desk: Desk) -> None:
    found: Any = desk.computes(
        _RANDOM
        + """
        const [{ Tree }, { piecesOf, textOf }] = await Promise.all([load("write/tree.js"), load("write/pieces.js")]);
        const tree = new Tree();
        const texts = new Map([[0, ""]]);
        for (let step = 0; step < 300; step++) {
            const ids = [...texts.keys()];
            const parent = ids[drawn(ids.length)];
            const before = texts.get(parent);
            const at = drawn(before.length + 1);
            const change = { at, cut: drawn(before.length - at + 1), text: "aé文😀".slice(drawn(3)), kind: "typed" };
            texts.set(tree.add(parent, change).id, before.slice(0, at) + change.text + before.slice(at + change.cut));
        }
        const again = new Tree(JSON.parse(JSON.stringify(tree.nodes)).reverse());
        return [...texts].filter(([id, text]) => textOf(piecesOf(again.path(id))) !== text).length;
        """
    )
    assert found == 0


def test_a_change_is_found_by_comparing(desk: Desk) -> None:
    found: Any = desk.computes(
        _RANDOM
        + """
        const { changeOf } = await load("write/changes.js");
        const wrong = [];
        for (let step = 0; step < 500; step++) {
            const before = Array.from({ length: drawn(8) }, () => "ab"[drawn(2)]).join("");
            const at = drawn(before.length + 1);
            const cut = drawn(before.length - at + 1);
            const text = "ab".repeat(2).slice(drawn(5));
            const now = before.slice(0, at) + text + before.slice(at + cut);
            const found = changeOf(before, now, at + text.length);
            if (before.slice(0, found.at) + found.text + before.slice(found.at + found.cut) !== now) wrong.push(before);
            if (found.at + found.text.length > at + text.length) wrong.push([before, now]);
        }
        return wrong;
        """
    )
    assert found == []


def test_tokens_lie_along_the_text_that_comes(desk: Desk) -> None:
    """Also those that are parts of a character, and those whose text comes later."""
    found: Any = desk.computes(
        r"""
        const { Choice } = await load("write/completion.js");
        const choice = new Choice();
        const part = (text, tokens) => ({
            text,
            logprobs: {
                tokens,
                token_logprobs: tokens.map(() => -1),
                top_logprobs: tokens.map((token) => ({ [token]: -1, x: -2 })),
            },
        });
        choice.take(part("Ab", ["Ab"]));
        choice.take(part("", ["bytes:\\xf0\\x9f", "bytes:\\x98"]));
        choice.take(part("😀", ["bytes:\\x80"]));
        choice.take(part(" é", [" é", ""]));
        choice.take({ text: "", finish_reason: "stop" });
        const starts = choice.tokens.map(([start]) => start);
        return { text: choice.text, starts, end: choice.end, first: choice.tokens[0] };
        """
    )
    assert found["text"] == "Ab😀 é"
    assert found["starts"] == [0, 2, 2, 2, 4]
    assert found["first"] == [0, -1, [["x", -2]]]
    assert found["end"] == "stop"


def test_tokens_lie_along_the_lines_of_a_text_area(desk: Desk) -> None:
    """That has no carriage returns, however they come: whole, in halves, alone."""
    found: Any = desk.computes(
        r"""
        const { Choice } = await load("write/completion.js");
        const choice = new Choice();
        const area = document.createElement("textarea");
        let all = "";
        for (const token of ["a", "\r\n", "b", "\r", "\n", "é\r", "c", "\r"]) {
            all += token;
            choice.take({ text: token, logprobs: { tokens: [token], token_logprobs: [-1], top_logprobs: [{}] } });
        }
        area.value = all;
        return { same: choice.text === area.value, text: choice.text, starts: choice.tokens.map(([start]) => start) };
        """
    )
    assert found == {"same": True, "text": "a\nb\né\nc\n", "starts": [0, 1, 2, 3, 4, 4, 6, 7]}


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        pytest.param([], ["Say: one", "."], id="nothing"),
        pytest.param([{"at": 12, "cut": 0, "text": " and three"}], ["Say: one", "."], id="after it: goes"),
        pytest.param([{"at": 0, "cut": 3, "text": "Tell"}], ["Tell: one", "."], id="before it: stays"),
        pytest.param([{"at": 13, "cut": 0, "text": "!"}], ["Say: one", ".!"], id="behind it: stays"),
        pytest.param([{"at": 10, "cut": 2, "text": ""}], ["Say: one", "."], id="in what came after: goes"),
    ],
)
def test_a_branch_cuts_what_came_after_a_token_alone(
    desk: Desk, edits: list[dict[str, Any]], expected: list[str]
) -> None:
    """The model wrote " one two" between "Say:" and "."; another word is put in place of " two"."""
    found: Any = desk.computes(
        """
        const [{ Tree }, { piecesOf, textOf }, { forkAt }] =
            await Promise.all([load("write/tree.js"), load("write/pieces.js"), load("write/changes.js")]);
        const [edits] = given;
        const tree = new Tree();
        const typed = tree.add(0, { at: 0, text: "Say:.", kind: "typed" });
        const tokens = [[0, -1, []], [4, -1, []]];
        const node = tree.add(typed.id, { at: 4, text: " one two", kind: "written", tokens });
        const last = edits.reduce((parent, edit) => tree.add(parent.id, { ...edit, kind: "typed" }), node);
        const { parent, at, cut, text } = forkAt(tree.path(last.id), { node, index: 1 });
        const state = textOf(piecesOf(tree.path(parent)));
        return [state.slice(0, at) + text, state.slice(at + cut)];
        """,
        edits,
    )
    assert found == expected


def test_events_are_read_however_they_are_cut(desk: Desk) -> None:
    found: Any = desk.computes(
        r"""
        const { eventsOf } = await load("shared/events.js");
        const text = ': hello\n\nevent: progress\ndata: {"é": 1}\n\n'
            + "data: a\r\ndata: b\r\n\r\n: bye\n\ndata: [DONE]\n\n";
        const bytes = new TextEncoder().encode(text);
        const all = [];
        for (const size of [1, 2, 3, 5, 200]) {
            const pieces = [];
            for (let at = 0; at < bytes.length; at += size) pieces.push(bytes.slice(at, at + size));
            const start = (stream) => (pieces.forEach((piece) => stream.enqueue(piece)), stream.close());
            const found = [];
            for await (const event of eventsOf({ body: new ReadableStream({ start }) })) found.push(event);
            all.push(JSON.stringify(found));
        }
        return { same: new Set(all).size, first: JSON.parse(all[0]) };
        """
    )
    assert found["same"] == 1
    assert found["first"] == [
        {"event": "progress", "data": '{"é": 1}'},
        {"event": "message", "data": "a\nb"},
        {"event": "message", "data": "[DONE]"},
    ]

"""Undo, and typing after it: it loses nothing but the typing that it undid."""

from __future__ import annotations

import time

from tests.serve.page.desk import Desk

BEGINNING = "Grok-1 has"
_CONTROL = "\ue009"


def _undo(desk: Desk, text: str) -> None:
    """Undoes a step, which leads to a text."""
    desk.press(_CONTROL, "z")
    desk.until(lambda: desk.text == text)


def _type_as_a_step(desk: Desk, text: str) -> None:
    time.sleep(1.3)  # then typing is a step of its own
    desk.write(text)


def _throw_away(desk: Desk) -> None:
    desk.browser.execute_script("document.querySelector('#branches .written .away').click()")  # seen when pointed at
    desk.until(lambda: desk.text == BEGINNING)
    desk.click("#text")


def test_what_was_thrown_away_is_undone_and_typed_on(desk: Desk) -> None:
    desk.write(BEGINNING)
    desk.go_on(8)
    written = desk.text
    _throw_away(desk)
    _undo(desk, written)
    desk.write("!?")
    assert desk.text == f"{written}!?"
    desk.reload()
    assert desk.text == f"{written}!?"


def test_typing_beside_what_was_thrown_away_leaves_that_to_be_brought_back(desk: Desk) -> None:
    desk.write(BEGINNING)
    desk.go_on(8)
    written = desk.text
    _throw_away(desk)
    _undo(desk, written)
    _undo(desk, BEGINNING)
    _undo(desk, "")
    desk.write("Else")
    desk.click("#bring-back")
    desk.until(lambda: desk.branches == ["Grok-1 has", written.removeprefix(BEGINNING).strip()[:90], "Else"])


def test_a_branch_that_was_visited_is_still_there(desk: Desk) -> None:
    desk.write(BEGINNING)
    desk.go_on(8)
    written = desk.text
    desk.write(" one")
    desk.click("#branches .written")
    desk.until(lambda: desk.text == written)
    desk.write(" two")
    desk.until(lambda: desk.branches[2:] == ["one", "two"])
    desk.click("#branches .typed:nth-child(3)")
    desk.until(lambda: desk.text == f"{written} one")
    desk.click("#text")
    _undo(desk, f"{written} two")
    desk.write("!")
    desk.until(lambda: desk.branches[2:] == ["one", "two!"])


def test_typing_that_is_undone_and_replaced_is_no_branch(desk: Desk) -> None:
    desk.write("One")
    for text in (" two", " three"):
        _type_as_a_step(desk, text)
    _undo(desk, "One two")
    _undo(desk, "One")
    desk.write(" else")
    desk.until(lambda: desk.branches == ["One else"])
    desk.reload()
    assert desk.branches == ["One else"]

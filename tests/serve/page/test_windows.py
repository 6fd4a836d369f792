"""Two windows have one text and one conversation: neither loses what the other wrote."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serve.page.desk import Desk

BEGINNING = "Grok-1 has"


class Windows:
    """Two windows of one browser, of which one is looked at."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.first = desk.browser.current_window_handle
        desk.browser.switch_to.new_window("window")
        self.second = desk.browser.current_window_handle
        desk.browser.get("about:blank")

    def look_at(self, window: str) -> None:
        self.desk.browser.switch_to.window(window)

    def open_second(self, tab: str = "") -> None:
        self.look_at(self.second)
        self.desk.browser.get(f"{self.desk.address}/#{tab}")
        self.desk.until(lambda: self.desk.find("#model").text)

    def close_second(self) -> None:
        self.look_at(self.second)
        self.desk.browser.get("about:blank")
        self.look_at(self.first)


@pytest.fixture
def windows(desk: Desk) -> Iterator[Windows]:
    found = Windows(desk)
    found.look_at(found.first)
    yield found
    found.look_at(found.second)
    desk.browser.close()
    found.look_at(found.first)


def test_a_window_that_closes_leaves_the_others_conversation(desk: Desk, windows: Windows) -> None:
    desk.visit("chat")
    windows.open_second("chat")
    windows.look_at(windows.first)
    desk.ask("Who made Grok-1?")
    said = desk.said
    assert len(said) == 2
    windows.look_at(windows.second)
    desk.until(lambda: desk.said == said)  # it sees what was said there
    windows.close_second()
    desk.reload()
    assert desk.said == said


def test_what_both_windows_say_at_once_comes_together(desk: Desk) -> None:
    found = desk.computes(
        """
        const { joined } = await load("chat/meeting.js");
        const turn = (role, ...versions) => ({ role, versions, shown: 0 });
        const before = () => [turn("user", "One"), turn("assistant", "1")];
        const answered = [...before(), turn("user", "Two"), turn("assistant", "2")];
        const other = [turn("user", "One"), turn("assistant", "1", "uno"), turn("user", "Three")];
        const plain = (turns) => turns.map(({ versions }) => versions.join());
        return [plain(joined(answered, other)), plain(joined(before(), []))];
        """
    )
    assert found == [["One", "1,uno", "Two", "2", "Three"], ["One", "1"]]


def test_a_first_answer_is_kept_while_another_is_awaited(desk: Desk) -> None:
    found = desk.computes(
        """
        const { Conversation } = await load("chat/conversation.js");
        const conversation = new Conversation(() => {});
        conversation.say("Who?");
        conversation.grow(conversation.awaitAnswer(), "I");
        conversation.settle(conversation.turns.at(-1));
        conversation.awaitAnswer();
        return new Conversation(() => {}).turns;
        """
    )
    assert found == [
        {"role": "user", "versions": ["Who?"], "shown": 0},
        {"role": "assistant", "versions": ["I"], "shown": 0},
    ]


_MANUSCRIPT = """
    const [{ Manuscript }] = await Promise.all([load("write/manuscript.js")]);
    window.own ??= new Manuscript(() => {}, (old) => (window.old = old));
    const { own } = window;
"""


def _in_a_manuscript(desk: Desk, script: str) -> object:
    """What a script says of `own`, a manuscript as a window has it, the same each time."""
    found: object = desk.computes(_MANUSCRIPT + script)
    return found


def test_a_window_sees_what_is_written_in_another_and_goes_on_from_it(desk: Desk, windows: Windows) -> None:
    windows.open_second()
    windows.look_at(windows.first)
    desk.write(BEGINNING)
    desk.go_on(8)
    written = desk.text
    windows.look_at(windows.second)
    desk.until(lambda: len(desk.branches) == 2)
    desk.click("#branches .written")
    desk.until(lambda: desk.text == written)


def _begin_a_continuation(desk: Desk, windows: Windows) -> None:
    """In the first window; the second sees what has come of it."""
    _in_a_manuscript(
        desk,
        """
        own.type("Once", 4);
        window.node = own.add(own.current.id, { at: 4, kind: "written", tokens: [] });
        own.go(node.id);
        own.grow(node, { text: " upon", tokens: [[0, -1, []]] });
        own.save(node);
        """,
    )
    windows.open_second()


def test_a_window_that_saw_half_of_a_continuation_keeps_none_of_it_back(desk: Desk, windows: Windows) -> None:
    _begin_a_continuation(desk, windows)
    assert desk.text == "Once upon"
    windows.look_at(windows.first)
    _in_a_manuscript(desk, 'own.grow(node, { text: " upon a time", tokens: [[0, -1, []]] }); own.settle(node)')
    windows.look_at(windows.second)
    desk.until(lambda: desk.text == "Once upon a time")
    desk.write("!")
    windows.close_second()
    desk.reload()
    assert sorted(desk.branches) == ["!", "Once", "upon a time"]


def test_what_is_typed_below_a_continuation_that_still_comes_stays_as_it_is(desk: Desk, windows: Windows) -> None:
    _begin_a_continuation(desk, windows)
    desk.put_cursor(9)
    desk.write(" it was")
    windows.look_at(windows.first)
    desk.until(lambda: _in_a_manuscript(desk, "return own.tree.nodes.length === 5"))
    _in_a_manuscript(desk, 'own.grow(node, { text: " upon a time", tokens: [[0, -1, []]] }); own.settle(node)')
    texts = "return own.tree.nodes.map(({ id }) => own.textAt(id)).sort()"
    expected = ["", "Once", "Once upon", "Once upon a time", "Once upon it was"]
    assert _in_a_manuscript(desk, texts) == expected
    windows.look_at(windows.second)
    assert desk.text == "Once upon it was"
    desk.write("!")
    windows.close_second()
    desk.reload()
    assert _in_a_manuscript(desk, texts) == [*expected[:-1], "Once upon it was!"]


def test_a_new_text_is_a_new_text_in_both_windows(desk: Desk, windows: Windows) -> None:
    desk.write("One")
    windows.open_second()
    assert desk.text == "One"
    windows.look_at(windows.first)
    desk.click("#new-text")
    windows.look_at(windows.second)
    desk.until(lambda: not desk.text)
    desk.find("#text").click()
    desk.write("Two")
    windows.look_at(windows.first)
    desk.until(lambda: desk.branches == ["Two"])
    windows.look_at(windows.second)
    desk.click("#notice button")  # "Bring the old one back"
    desk.until(lambda: desk.text == "One")
    windows.look_at(windows.first)
    desk.until(lambda: desk.branches == ["One"])
    windows.close_second()
    desk.reload()
    assert desk.text == "One"


def test_undone_typing_that_another_window_went_on_from_is_kept(desk: Desk, windows: Windows) -> None:
    desk.write(BEGINNING)
    windows.open_second()
    desk.put_cursor(len(BEGINNING))
    desk.go_on(8)
    written = desk.text.removeprefix(BEGINNING).strip()[:90]
    windows.look_at(windows.first)
    desk.until(lambda: len(desk.branches) == 2)
    desk.click("#undo")
    desk.until(lambda: not desk.text)
    desk.write("Else")
    desk.until(lambda: desk.branches == [BEGINNING, written, "Else"])
    windows.close_second()
    desk.reload()
    assert desk.branches == [BEGINNING, written, "Else"]


def test_what_one_window_forgets_and_another_needs_comes_back(desk: Desk, windows: Windows) -> None:
    """As where neither had heard of the other yet."""
    desk.write(BEGINNING)
    windows.open_second()
    windows.look_at(windows.first)
    script = "const at = Object.keys(localStorage).find((name) => name.startsWith('grok-local:write/'));"
    desk.browser.execute_script(f"{script} localStorage.removeItem(at)")
    desk.until(lambda: desk.browser.execute_script(f"{script} return at"))
    windows.close_second()
    desk.reload()
    assert desk.text == BEGINNING

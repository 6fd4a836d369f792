"""Two windows have one text and one conversation: neither loses what the other wrote."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serve.page.desk import Desk

BEGINNING = "Grok-1 has"
_CONTROL, _ENTER = "\ue009", "\ue007"


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


def _said(desk: Desk) -> list[str]:
    return desk.texts("#turns .said")


def _ask(desk: Desk, text: str) -> None:
    desk.find("#message").send_keys(text)
    desk.press(_CONTROL, _ENTER)
    desk.wait()


def test_a_window_that_closes_leaves_the_others_conversation(desk: Desk, windows: Windows) -> None:
    desk.visit("chat")
    windows.open_second("chat")
    windows.look_at(windows.first)
    _ask(desk, "Who made Grok-1?")
    said = _said(desk)
    assert len(said) == 2
    windows.look_at(windows.second)
    desk.until(lambda: _said(desk) == said)  # it sees what was said there
    windows.close_second()
    desk.reload()
    assert _said(desk) == said


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

"""The second tab with the real model."""

from __future__ import annotations

import time

from tests.serve.page.desk import Desk

_CONTROL, _ENTER = "\ue009", "\ue007"


def test_a_conversation_goes_on_and_stays(desk: Desk) -> None:
    desk.visit("chat")
    desk.fill("#chat-sampling-temperature", 0)
    desk.ask("How many layers has Grok-1?")
    desk.ask("And how many experts?")
    said = desk.said
    messages = [{"role": "user", "content": "How many layers has Grok-1?"}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 128}
    assert said[1] == desk.posts("/v1/chat/completions", body)["choices"][0]["message"]["content"]
    assert len(said) == 4
    desk.reload()
    assert desk.said == said


def test_another_answer_stands_beside_the_first(desk: Desk) -> None:
    desk.visit("chat")
    desk.fill("#chat-sampling-temperature", 1.5)
    desk.fill("#chat-sampling-seed", "")
    desk.ask("Who made Grok-1?")
    first = desk.said[1]
    desk.click(".turn:last-child footer button:last-child")
    desk.wait()
    assert "2 of 2" in desk.find(".turn:last-child footer").text
    desk.click("[aria-label='The answer before']")
    desk.until(lambda: desk.said[1] == first)


def test_a_message_is_edited_and_sent_again_and_that_undone(desk: Desk) -> None:
    desk.visit("chat")
    desk.ask("Who made Grok-1?")
    desk.ask("When?")
    before = desk.said
    desk.click(".turn:first-child footer button")
    area = desk.focused
    area.clear()
    area.send_keys("What is Grok-1?")
    desk.press(_CONTROL, _ENTER)
    desk.until(lambda: len(desk.said) == 2)
    desk.wait()
    assert desk.said[0] == "What is Grok-1?"
    desk.click("#chat-undo")  # the answer
    desk.click("#chat-undo")  # the other message
    desk.until(lambda: desk.said == before)


def test_the_system_text_goes_first(desk: Desk) -> None:
    desk.visit("chat")
    desk.click("#chat details summary")
    desk.find("#system").send_keys("Answers are numbers.")
    found = desk.computes(
        """
        const { Conversation } = await load("chat/conversation.js");
        const conversation = new Conversation(() => {});
        conversation.say("How many?");
        return conversation.messages;
        """
    )
    assert found == [
        {"role": "system", "content": "Answers are numbers."},
        {"role": "user", "content": "How many?"},
    ]


def test_escape_stops_an_answer_and_what_came_stays(desk: Desk) -> None:
    desk.visit("chat")
    desk.fill("#chat-sampling-temperature", 2)
    desk.fill("#chat-sampling-min_p", 0)
    desk.choose("#chat-length", 256)
    desk.find("#message").send_keys("Tell me everything.")
    desk.press(_CONTROL, _ENTER)
    desk.until(lambda: len(desk.said) == 2 and desk.said[1])
    began = time.monotonic()
    desk.press("\ue00c")
    desk.until(lambda: not desk.find_all(".dock.working") and desk.is_idle())
    assert time.monotonic() - began < 3  # of which the driver takes its part on a busy machine
    desk.reload()
    assert len(desk.said) == 2


def test_a_message_is_edited_while_an_answer_comes_and_goes(desk: Desk) -> None:
    desk.visit("chat")
    desk.choose("#chat-length", 32)
    desk.ask("Who made Grok-1?")
    desk.find("#message").send_keys("When?")
    desk.press(_CONTROL, _ENTER)
    desk.click(".turn:first-child footer button")
    area = desk.focused
    area.clear()
    area.send_keys("What is it?")
    desk.wait()
    assert desk.focused == area
    assert area.get_property("value") == "What is it?"
    desk.press("\ue00c")
    assert desk.said[0] == "Who made Grok-1?"
    assert desk.focus("text") == "Edit"


def test_the_focus_stays_with_the_answers_it_was_at(desk: Desk) -> None:
    desk.visit("chat")
    desk.choose("#chat-length", 32)
    desk.fill("#chat-sampling-temperature", 1.5)
    desk.fill("#chat-sampling-seed", "")
    desk.ask("Who made Grok-1?")
    for _ in range(2):
        desk.browser.execute_script("document.querySelector('.turn:last-child footer button:last-child').focus()")
        desk.press(_ENTER)
        desk.wait()
        assert desk.focus("text") == "Another answer"
    desk.browser.execute_script("document.querySelector('[aria-label=\"The answer before\"]').focus()")
    for name in ("The answer before", "The next answer"):  # at the first there is none before
        desk.press(_ENTER)
        desk.wait_for_picture()
        assert desk.focus("aria-label") == name


def test_an_answer_is_copied_over_plain_http_too(desk: Desk) -> None:
    desk.visit("chat")
    desk.browser.execute_script("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    desk.ask("Who made Grok-1?")
    desk.browser.execute_script("document.querySelector('.turn:last-child footer button').focus()")
    desk.press(_ENTER)
    desk.until(lambda: desk.focus("text") == "Copied")
    desk.click("#message")
    desk.press(_CONTROL, "v")
    said = desk.said[1]
    desk.until(lambda: desk.find("#message").get_property("value") == said)


def test_a_full_context_is_said_with_what_helps_in_a_conversation(desk: Desk) -> None:
    desk.visit("chat")
    desk.fill("#message", "word " * 9000)
    desk.click("#send")
    desk.until(lambda: "Begin a new conversation" in desk.find("#chat-dock .problem").text)
    desk.read_logs()
    desk.complaints = [line for line in desk.complaints if "status of 400" not in line]  # the browser's own note

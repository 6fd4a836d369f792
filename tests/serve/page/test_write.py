"""The first tab with the real model: text, alternatives, other words, branches, and what stays."""

from __future__ import annotations

import json
import math
import time

from tests.conftest import Run
from tests.serve.page.desk import Desk

BEGINNING = "Grok-1 has"


def test_a_text_is_continued_where_the_cursor_stands(desk: Desk) -> None:
    desk.write(f"{BEGINNING}\n\nThe end.")
    desk.put_cursor(len(BEGINNING))
    desk.go_on(8)
    assert desk.text.startswith(BEGINNING)
    assert desk.text.endswith("\n\nThe end.")
    assert len(desk.text) > len(BEGINNING) + 10
    assert desk.cursor == len(desk.text) - len("\n\nThe end.")


def test_what_the_model_wrote_is_coloured_by_how_likely_it_was(desk: Desk) -> None:
    desk.write(BEGINNING)
    desk.fill("#write-sampling-temperature", 0)
    desk.go_on(8)
    assert desk.coloured == desk.text.removeprefix(BEGINNING)
    body = {"prompt": BEGINNING, "max_tokens": 8, "temperature": 0, "logprobs": 1}
    likely = desk.posts("/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"]
    bands = [sum(math.exp(value) < least for least in (0.9, 0.6, 0.3, 0.1)) for value in likely]
    assert [desk.band_at(token) for token in desk.tokens_of_last()] == bands


def test_alternatives_stand_side_by_side_to_be_taken_or_thrown_away(desk: Desk) -> None:
    desk.write(BEGINNING)
    desk.go_on(8, alternatives=3)
    cards = desk.texts(".card .continuation")
    tops = {card.rect["y"] for card in desk.find_all(".card")}
    assert len(cards) == 3
    assert len(tops) == 1
    assert desk.text == BEGINNING
    desk.click(".card:nth-child(3) .quiet")
    assert len(desk.find_all(".card")) == 2
    desk.click(".card:nth-child(2) .take")
    desk.until(lambda: desk.text == BEGINNING + cards[1])
    assert not desk.find_all(".card")
    assert len(desk.until(lambda: desk.branches)) == 3  # what was written, and two that go on from there
    desk.click("#bring-back")
    desk.until(lambda: len(desk.branches) == 4)


def test_one_taken_early_goes_on_alone(desk: Desk) -> None:
    desk.write(BEGINNING)
    desk.choose("#length", 32)
    desk.choose("#count", 3)
    early = desk.computes(
        """
        document.getElementById("continue").click();
        const card = () => document.querySelector(".card:nth-child(2)");
        while (!card()?.querySelector(".continuation").textContent) await new Promise(requestAnimationFrame);
        card().querySelector(".take").click();
        return card().querySelector(".continuation").textContent;
        """
    )
    desk.until(lambda: desk.text.startswith(BEGINNING + early))
    desk.until(lambda: len(desk.text) > len(BEGINNING + early))
    desk.wait()
    assert desk.is_idle()


def test_another_word_is_put_and_the_text_goes_on_from_there(desk: Desk) -> None:
    desk.write(BEGINNING)
    desk.go_on(8)
    before, rows = desk.text, desk.branches
    start, end = next(token for token in desk.tokens_of_last()[2:] if before[slice(*token)].strip())
    desk.click_on(start, end)
    rivals = desk.find_all("#rivals button:enabled")
    chosen = desk.find("#rivals .chosen .word").text
    assert chosen.replace("·", " ") == before[start:end]
    assert all(rival.text.endswith("%") for rival in rivals)
    other = next(rival for rival in rivals if "chosen" not in (rival.get_attribute("class") or ""))
    word = other.find_element("class name", "word").text.replace("·", " ").replace("↵", "\n")
    other.click()
    desk.wait()
    assert desk.text.startswith(before[:start] + word)
    assert desk.text != before
    assert len(desk.branches) == len(rows) + 1
    desk.click("#undo")
    desk.until(lambda: desk.text == before)


def test_another_attempt_is_a_branch_beside(desk: Desk) -> None:
    desk.write(BEGINNING)
    desk.go_on(8)
    first = desk.text
    desk.fill("#write-sampling-seed", 4)
    desk.press("\ue009", "\ue008", "\ue007")
    desk.wait()
    second = desk.text
    assert second.startswith(BEGINNING)
    assert second != first
    assert len(desk.branches) == 3
    desk.click("#text")
    desk.press("\ue00a", "\ue00e")
    desk.until(lambda: desk.text == first)


def test_undo_and_redo_lead_through_all_that_was(desk: Desk) -> None:
    desk.write(BEGINNING)
    desk.go_on(8)
    written = desk.text
    desk.write(" and")
    desk.press("\ue009", "z")
    desk.until(lambda: desk.text == written)
    desk.press("\ue009", "z")
    desk.until(lambda: desk.text == BEGINNING)
    desk.press("\ue009", "y")
    desk.press("\ue009", "y")
    desk.until(lambda: desk.text == f"{written} and")


def test_stop_ends_it_at_once_and_what_came_stays(desk: Desk) -> None:
    desk.write(BEGINNING)
    desk.set_long(alternatives=8)
    # Within the page: a driver's round trips are slower than the answer may be.
    took = desk.computes(
        """
        const seen = async (found) => { while (!found()) await new Promise(requestAnimationFrame); };
        const go = document.getElementById("continue");
        go.click();
        await seen(() => document.querySelector(".card [class^='band']"));
        const began = performance.now();
        document.getElementById("stop").click();
        await seen(() => !go.hidden);
        return performance.now() - began;
        """
    )
    assert took < 1000  # milliseconds
    desk.until(desk.is_idle)
    assert "Stopped" in desk.find("#write-dock .status").text
    came = desk.texts(".card .continuation")
    assert came
    assert all(came)  # also where only a new line came yet


def test_the_stop_button_takes_the_place_of_continue(desk: Desk) -> None:
    shown = desk.computes(
        """
        text.value = "Grok-1 has";
        text.dispatchEvent(new Event("input"));
        const [go, stop] = ["continue", "stop"].map((id) => document.getElementById(id));
        const seen = () => [go, stop].map((button) => button.offsetWidth > 0);
        const before = seen();
        go.click();
        await new Promise(requestAnimationFrame);
        const during = seen();
        stop.click();
        return [before, during];
        """
    )
    assert shown == [[True, False], [False, True]]
    desk.until(desk.is_idle)


def test_a_reload_loses_nothing(desk: Desk) -> None:
    desk.write(BEGINNING)
    desk.go_on(8, alternatives=2)
    desk.click(".card:nth-child(1) .take")
    desk.until(lambda: desk.text != BEGINNING)
    desk.write(" So")
    desk.put_cursor(4)
    before = (desk.text, desk.cursor, desk.branches, desk.coloured)
    desk.reload()
    desk.until(lambda: desk.branches)
    assert (desk.text, desk.cursor, desk.branches, desk.coloured) == before
    desk.click("#undo")
    desk.until(lambda: desk.text + " So" == before[0])


def test_a_reload_while_the_model_writes_keeps_what_came(desk: Desk) -> None:
    desk.write(BEGINNING)
    desk.set_long()
    desk.click("#continue")
    desk.until(lambda: len(desk.text) > len(BEGINNING) + 20)
    before = desk.text
    desk.reload()
    assert desk.text.startswith(before)
    desk.until(desk.is_idle)


def test_the_tree_goes_to_a_batch_and_its_answers_come_back(desk: Desk, run: Run) -> None:
    desk.write(BEGINNING)
    desk.go_on(8, alternatives=2)
    desk.click("#alternatives-close")
    desk.click("#export")
    lines = desk.downloaded("prompts.jsonl")
    ids = [json.loads(line)["id"] for line in lines.read_text("utf-8").splitlines()]
    assert len(set(ids)) == 2
    said = run("batch", lines, "--dry-run")
    assert said.returncode == 0, said.stderr
    answers = desk.folder / "answers.jsonl"
    run("batch", lines, "-o", answers, "--max-tokens", 4)
    desk.bring(answers)
    desk.until(lambda: len(desk.branches) == 5)  # typed, two written, and an answer to each
    assert "2 answers" in desk.find("#write-dock .problem").text


def test_a_tree_that_was_exported_comes_back_elsewhere(desk: Desk) -> None:
    prompts = ["One day a king rose", "One day a queen rose", "One day a king rose early"]
    lines = desk.folder / "prompts.jsonl"
    lines.write_text("".join(json.dumps({"id": n, "prompt": text}) + "\n" for n, text in enumerate(prompts)), "utf-8")
    desk.bring(lines)
    desk.until(lambda: desk.branches)
    assert desk.branches == ["One day a", "king rose early", "queen rose"]


def test_an_error_says_what_helps_where_one_looks(desk: Desk) -> None:
    desk.click("#continue")
    assert "Write a beginning first" in desk.find("#write-dock .problem").text
    desk.fill("#text", "word " * 9000)
    desk.browser.execute_script("text.dispatchEvent(new Event('input'))")
    desk.click("#continue")
    desk.until(lambda: "Shorten what stands before the cursor" in desk.find("#write-dock .problem").text)
    desk.read_logs()
    desk.complaints = [line for line in desk.complaints if "status of 400" not in line]  # the browser's own note


def test_a_text_of_50000_characters_stays_quick(desk: Desk) -> None:
    """A key costs little more than in a plain field of the same looks."""
    long = "The quick brown fox jumps over the lazy dog.\n" * 1112
    desk.browser.execute_script("text.value = arguments[0]; text.dispatchEvent(new Event('input'))", long)
    plain, page = desk.computes(
        """
        const plain = text.cloneNode();
        plain.id = "plain";
        document.querySelector("main").append(plain);
        Object.assign(plain.style, { position: "static", width: `${text.offsetWidth}px` });
        plain.value = text.value;
        const took = (area, below) => {
            area.setSelectionRange(25000, 25000);
            const all = Array.from({ length: 30 }, () => {
                const began = performance.now();
                area.setRangeText("x", area.selectionEnd, area.selectionEnd, "end");
                area.dispatchEvent(new Event("input"));
                below.scrollHeight;
                return performance.now() - began;
            });
            return all.sort((one, other) => one - other)[15];
        };
        const found = [took(plain, plain), took(text, document.getElementById("mirror"))];
        plain.remove();
        return found;
        """
    )
    assert page < 4 * plain + 5, (plain, page)  # milliseconds
    assert desk.text[25000:25030] == "x" * 30
    over = desk.browser.execute_script("return text.scrollHeight - document.getElementById('mirror').offsetHeight")
    assert abs(over) < 2  # the colours lie behind their words


def test_no_other_window_loses_what_this_one_wrote(desk: Desk) -> None:
    desk.write("One")
    first = desk.browser.current_window_handle
    desk.browser.switch_to.new_window("tab")
    desk.browser.get(desk.address)
    desk.until(lambda: desk.text == "One")
    time.sleep(1.3)  # then typing is a step of its own
    desk.put_cursor(3)
    desk.write(" two")
    desk.browser.close()
    desk.browser.switch_to.window(first)
    time.sleep(1.3)
    desk.write(" three")
    desk.reload()
    desk.until(lambda: {"two", "three"} <= set(desk.branches))


def test_a_part_without_text_before_any_progress_is_no_failure(desk: Desk) -> None:
    found = desk.computes(
        """
        const [{ Work }, { ServerError }] = await Promise.all([load("shared/work.js"), load("shared/server.js")]);
        const work = new Work(document.getElementById("write-dock"));
        const ended = await work.run(async (signal, told) => told.count(0), { wanted: 8, again: null });
        let kept;
        const failing = (signal) => { kept = signal; throw new ServerError("no", { status: 500 }); };
        return [ended, await work.run(failing, { wanted: 8, again: null }), kept.aborted];
        """
    )
    assert found == ["done", "failed", True]


def test_a_new_text_ends_what_is_written_in_the_old_one(desk: Desk) -> None:
    desk.write(BEGINNING)
    desk.set_long(alternatives=2)
    desk.click("#continue")
    desk.until(lambda: any(desk.texts(".card .continuation")))
    desk.click("#new-text")
    desk.until(lambda: "new text" in desk.find("#notice").text)
    desk.until(desk.is_idle)
    assert (desk.text, desk.texts(".card"), desk.branches) == ("", [], [])
    desk.reload()
    assert (desk.text, desk.branches) == ("", [])

"""What holds for the whole page: keys, looks, widths, whom it lets in, and the third tab."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.serve.page.conftest import serving
from tests.serve.page.desk import Desk

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

_TAB, _ENTER, _CONTROL, _ALT = "\ue004", "\ue007", "\ue009", "\ue00a"
_RIGHT, _DOWN, _DELETE = "\ue014", "\ue015", "\ue017"
PAGE = Path(__file__).parents[3] / "grok_local" / "serve" / "page"


def test_all_of_it_works_without_a_mouse(desk: Desk) -> None:
    _tab_to(desk, "text")
    desk.press("Grok-1 has")
    desk.press(_CONTROL, _ENTER)
    desk.until(lambda: desk.coloured)
    desk.wait()
    written = desk.text
    _tab_to(desk, "text", back=True)
    desk.press(_ALT, _DOWN)
    desk.press(_DOWN)
    desk.press(_ENTER)
    desk.wait()
    assert desk.text != written
    assert desk.focus("id") == "text"
    desk.press(_CONTROL, "z")
    desk.until(lambda: desk.text == written)
    _tab_to(desk, "count")
    desk.press("2")
    _tab_to(desk, "text", back=True)
    desk.press(_CONTROL, _ENTER)
    desk.until(lambda: len(desk.find_all(".card")) == 2)
    desk.wait()
    desk.press(_TAB)
    desk.press(_TAB)
    desk.press(_RIGHT)
    desk.press(_DELETE)
    desk.until(lambda: len(desk.find_all(".card")) == 1)
    desk.press(_ENTER)
    desk.until(lambda: desk.text.startswith(written) and desk.text != written)


def _tab_to(desk: Desk, name: str, *, back: bool = False) -> None:
    for _ in range(40):
        if desk.focus("id") == name:
            return
        desk.press(*(["\ue008"] if back else []), _TAB)
    raise AssertionError(name)


def test_arrows_lead_through_the_tabs_and_the_branches(desk: Desk) -> None:
    desk.write("Grok-1 has")
    desk.go_on(8)
    desk.browser.execute_script("document.querySelector('#branches [tabindex=\"0\"]').focus()")
    desk.press("\ue013")
    desk.press(_ENTER)
    desk.until(lambda: desk.text == "Grok-1 has")
    _tab_to(desk, "tab-write", back=True)
    desk.press(_RIGHT)
    assert desk.find("#chat").is_displayed()
    desk.press(_RIGHT)
    assert desk.find("#machine").is_displayed()


def test_everything_that_can_be_used_has_a_name(desk: Desk) -> None:
    for tab in ("write", "chat", "machine"):
        desk.visit(tab)
        assert _nameless(desk) == []


def _nameless(desk: Desk) -> list[str]:
    tree = desk.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    used = {"button", "textbox", "combobox", "spinbutton", "checkbox", "tab", "treeitem", "image", "MenuListPopup"}
    return [
        node["role"]["value"]
        for node in tree
        if not node["ignored"] and node["role"]["value"] in used - {"MenuListPopup"} and not node["name"]["value"]
    ]


def test_the_machine_is_shown_while_it_works(desk: Desk) -> None:
    desk.visit("machine")
    desk.until(lambda: desk.find("#plan .verdict").text)
    plan = desk.asks("/local/machine")["plan"]
    assert desk.find("#plan .verdict").text == plan["verdict"]
    assert [row.text for row in desk.find_all("#plan h4")][-1] == "RAM"
    desk.posts("/v1/completions", {"prompt": "Grok-1 has", "max_tokens": 32})
    desk.until(lambda: float(desk.find("#machine-now").text) > 0)
    desk.until(lambda: f"{_choices(desk):,} choices" in desk.find("#heat-under").text)
    assert desk.find("#heat").is_displayed()


def _choices(desk: Desk) -> int:
    return sum(sum(layer) for layer in desk.asks("/local/routing")["counts"])


@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("look", ["light", "dark"])
def test_it_fits_any_width_in_light_and_dark(desk: Desk, width: int, look: str) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    media = {"features": [{"name": "prefers-color-scheme", "value": look}]}
    desk.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    desk.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    try:
        for tab in ("write", "chat", "machine"):
            desk.visit(tab)
            assert desk.browser.execute_script("return document.documentElement.scrollWidth") <= width
            assert _contrast(desk) >= 4.5
    finally:
        desk.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        desk.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def _contrast(desk: Desk) -> float:
    """The least contrast of words that can be read to the paper, as WCAG has it."""
    found: Any = desk.computes(
        """
        const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
        const light = (colour) => {
            canvas.fillStyle = colour;
            canvas.fillRect(0, 0, 1, 1);
            const parts = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((part) => part / 255);
            const linear = parts.map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
        };
        const paper = light(getComputedStyle(document.body).backgroundColor);
        const kinds = ["p", "h2", "h3", "summary", "label", "button.quiet:enabled"].map((kind) => `main ${kind}`);
        const read = document.querySelectorAll(kinds.join());
        const all = [...read].filter((each) => each.offsetParent && each.textContent);
        const values = all.map((each) => light(getComputedStyle(each).color));
        return Math.min(...values.map((value) => (Math.max(value, paper) + 0.05) / (Math.min(value, paper) + 0.05)));
        """
    )
    return float(found)


def test_light_and_dark_can_be_chosen_and_stay(desk: Desk) -> None:
    def look() -> str:
        return str(desk.browser.execute_script("return document.documentElement.dataset.look"))

    before = look()
    desk.click("#look")
    assert look() != before
    desk.reload()
    assert look() != before


def test_words_of_a_model_are_never_read_as_html() -> None:
    for path in PAGE.rglob("*.js"):
        assert not any(
            way in path.read_text("utf-8") for way in ("innerHTML", "insertAdjacentHTML", "outerHTML", "eval(")
        )


def test_a_file_is_short_and_names_no_other_server() -> None:
    for path in PAGE.rglob("*.*"):
        text = path.read_text("utf-8")
        assert len(text.splitlines()) < 400, path
        assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", ""), path


def test_a_key_is_asked_for_once(browser: Chrome, models: Path, tmp_path: Path) -> None:
    with serving(models, "--api-key", "sesame") as address:
        desk = Desk(browser, address, tmp_path)
        browser.get(address)
        desk.until(lambda: desk.find("#key-dialog").is_displayed())
        desk.find("#key").send_keys("open")
        desk.press(_ENTER)
        desk.until(lambda: desk.find("#key-trouble").text == "wrong API key")
        desk.find("#key").clear()
        desk.find("#key").send_keys("sesame")
        desk.press(_ENTER)
        desk.until(lambda: desk.find("#model").text)
        desk.write("Grok-1 has")
        desk.go_on(8)
        assert desk.coloured
        desk.reload()
        assert not desk.find("#key-dialog").is_displayed()
        desk.click("#tab-machine")
        desk.until(lambda: "--routing-map" in desk.find("#heat-under").text)


def test_a_key_that_was_not_given_is_asked_for_only_when_it_is_wanted(
    browser: Chrome, models: Path, tmp_path: Path
) -> None:
    with serving(models, "--api-key", "sesame") as address:
        desk = Desk(browser, address, tmp_path)
        browser.get(f"{address}/#machine")
        dialog = desk.find("#key-dialog")
        desk.until(dialog.is_displayed)
        desk.click("#key-dialog .quiet")
        desk.until(lambda: desk.find("#machine-problem").text)
        time.sleep(3)  # in which the machine is looked at twice
        assert not dialog.is_displayed()
        desk.click("#tab-machine")
        desk.until(dialog.is_displayed)
        desk.find("#key").send_keys("sesame")
        desk.press(_ENTER)
        desk.until(lambda: desk.texts("#plan .verdict"))
        browser.get("about:blank")
        desk.read_logs()


def test_a_server_that_went_away_is_said_with_what_helps(browser: Chrome, models: Path, tmp_path: Path) -> None:
    with serving(models) as address:
        desk = Desk(browser, address, tmp_path)
        browser.get(address)
        desk.until(lambda: desk.find("#model").text)
        desk.write("Grok-1 has")
    desk.click("#continue")
    desk.until(lambda: "still running?" in desk.find("#write-dock .problem").text)
    assert desk.text == "Grok-1 has"
    browser.get("about:blank")
    desk.read_logs()

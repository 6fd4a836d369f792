"""The page as a user has it: what is written, pressed and seen."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.request import Request, urlopen

if TYPE_CHECKING:
    from selenium.webdriver import Chrome
    from selenium.webdriver.remote.webelement import WebElement

_T = TypeVar("_T")
_PATIENCE = 20  # seconds


class Desk:
    """A browser on a server's page, which may save files in `folder`."""

    def __init__(self, browser: Chrome, address: str, folder: Path) -> None:
        self.browser, self.address, self.folder = browser, address, folder
        self.complaints: list[str] = []
        self.strangers: list[str] = []
        save = {"behavior": "allow", "downloadPath": str(folder)}
        browser.execute_cdp_cmd("Browser.setDownloadBehavior", save)

    def visit(self, tab: str = "") -> None:
        """As if for the first time, but that texts come out the same every time."""
        self.browser.get(f"{self.address}/page/icon.svg")
        self.browser.execute_script("localStorage.clear(); sessionStorage.clear()")
        for kept in ("write-sampling", "chat-sampling"):
            self.browser.execute_script("localStorage[arguments[0]] = '{\"seed\": 3}'", f"grok-local:{kept}")
        self.read_logs()
        self.complaints, self.strangers = [], []
        self.browser.get(f"{self.address}/#{tab}")
        self.until(lambda: self.find("#model").text)

    def reload(self) -> None:
        self.browser.refresh()
        self.until(lambda: self.find("#model").text)
        self.wait_for_picture()

    def leave(self) -> None:
        """Ends what goes on, and reads what the browser noted."""
        self.browser.get("about:blank")
        self.read_logs()

    def read_logs(self) -> None:
        """What the page complained of, and what it asked others for."""
        self.complaints += [entry["message"] for entry in self._log("browser")]
        for entry in self._log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self._note(message["params"]["request"]["url"])

    def _log(self, kind: str) -> list[dict[str, str]]:
        found: list[dict[str, str]] = self.browser.get_log(kind)  # type: ignore[no-untyped-call]
        return found

    def _note(self, url: str) -> None:
        if not url.startswith((f"{self.address}/", f"blob:{self.address}/", "data:", "about:")):
            self.strangers.append(url)

    # -- what a user does ----------------------------------------------------------------------------------------------

    def find(self, selector: str) -> WebElement:
        return self.browser.find_element("css selector", selector)

    def find_all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements("css selector", selector)

    def click(self, selector: str) -> None:
        self.find(selector).click()

    def press(self, *keys: str) -> None:
        """Keys go to what has the focus; those before the last are held down."""
        from selenium.webdriver import ActionChains

        *held, last = keys
        chain = ActionChains(self.browser)
        for key in held:
            chain.key_down(key)
        chain.send_keys(last)
        for key in held:
            chain.key_up(key)
        chain.perform()

    def choose(self, selector: str, value: int | str) -> None:
        self.click(f"{selector} option[value='{value}']")

    def fill(self, selector: str, value: float | str) -> None:
        """Fills in a field, folded or not."""
        script = "const [at, to] = arguments; at.value = to; at.dispatchEvent(new Event('change'))"
        self.browser.execute_script(script, self.find(selector), str(value))

    def write(self, text: str) -> None:
        self.find("#text").send_keys(text)

    def put_cursor(self, place: int) -> None:
        self.browser.execute_script("text.focus(); text.setSelectionRange(arguments[0], arguments[0])", place)
        self.wait_for_picture()

    def go_on(self, tokens: int = 8, *, alternatives: int = 1) -> None:
        """Continue, and wait until that has ended."""
        self.choose("#length", tokens)
        self.choose("#count", alternatives)
        self.click("#continue")
        self.wait()

    def ask(self, text: str) -> None:
        """Says something in Chat, and waits until it is answered."""
        self.find("#message").send_keys(text)
        self.press("\ue009", "\ue007")
        self.wait()

    def set_long(self, *, alternatives: int = 1) -> None:
        """Sets what does not end soon: long wild texts."""
        self.fill("#write-sampling-temperature", 2)
        self.fill("#write-sampling-min_p", 0)
        self.choose("#length", 256)
        self.choose("#count", alternatives)

    def wait(self) -> None:
        """Until nothing goes on any more."""
        self.until(lambda: not self.find_all(".dock.working"))
        self.wait_for_picture()

    def wait_for_picture(self) -> None:
        """Until everything that happened is drawn: the page draws with the next picture."""
        self.browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")

    # -- what a user sees ----------------------------------------------------------------------------------------------

    @property
    def text(self) -> str:
        value: str = self.browser.execute_script("return text.value")
        return value

    @property
    def cursor(self) -> int:
        place: int = self.browser.execute_script("return text.selectionEnd")
        return place

    @property
    def focused(self) -> WebElement:
        return self.browser.switch_to.active_element

    def focus(self, what: str) -> str | None:
        """An attribute, or the "text", of what has the focus: at one moment, since it may be drawn anew at the next."""
        script = """
            const at = document.activeElement;
            return arguments[0] === "text" ? at.innerText : at.getAttribute(arguments[0]);
        """
        found: str | None = self.browser.execute_script(script, what)
        return found

    @property
    def coloured(self) -> str:
        """The text that has a colour."""
        return "".join(self.texts("#mirror [class^='band']"))

    @property
    def branches(self) -> list[str]:
        return self.texts("#branches .snippet")

    @property
    def said(self) -> list[str]:
        """The turns of Chat."""
        return self.texts("#turns .said")

    def texts(self, selector: str) -> list[str]:
        """Of all elements of a kind, at one moment."""
        self.wait_for_picture()
        script = "return [...document.querySelectorAll(arguments[0])].map((element) => element.textContent)"
        found: list[str] = self.browser.execute_script(script, selector)
        return found

    def until(self, seen: Callable[[], _T]) -> _T:
        """What `seen` returns as soon as that is something."""
        end = time.monotonic() + _PATIENCE
        while not (found := seen()):
            assert time.monotonic() < end, "it did not come"
            time.sleep(0.02)
        return found

    def tokens_of_last(self) -> list[tuple[int, int]]:
        """Where the tokens that the model wrote last start and end in the text."""
        nodes = self.browser.execute_script(
            "return Object.entries(localStorage).filter(([k]) => k.startsWith('grok-local:write/')).map(([, v]) => v)"
        )
        last = max((json.loads(node) for node in nodes), key=lambda node: int(node["id"]) if node.get("tokens") else -1)
        starts = [last["at"] + start for start, *_ in last["tokens"]]
        return list(zip(starts, [*starts[1:], last["at"] + len(last["text"])], strict=True))

    def band_at(self, token: tuple[int, int]) -> int:
        """The number of a token's colour."""
        place = token[0]
        for span in self.find_all("#mirror span"):
            length = len(str(span.get_property("textContent")))
            if place < length:
                return int((span.get_attribute("class") or "band9").removeprefix("band"))
            place -= length
        raise AssertionError(token)

    def click_on(self, start: int, end: int) -> None:
        """With the mouse, into the middle of a part of the text."""
        from selenium.webdriver import ActionChains

        area, place = self.find("#text"), self._place_of(start, end)
        left, top = place["x"] - area.rect["x"], place["y"] - area.rect["y"]
        middle = (left - area.rect["width"] / 2, top - area.rect["height"] / 2)
        ActionChains(self.browser).move_to_element_with_offset(area, *map(round, middle)).click().perform()
        self.until(lambda: self.find("#rivals").is_displayed())

    def _place_of(self, start: int, end: int) -> dict[str, float]:
        """The middle of the last line of a part of the text, from the page's corner."""
        script = """
            const range = document.createRange();
            const points = [];
            for (let offset of arguments) {
                for (const { firstChild: node } of document.getElementById("mirror").children) {
                    if (offset <= node.length) { points.push([node, offset]); break; }
                    offset -= node.length;
                }
            }
            range.setStart(...points[0]);
            range.setEnd(...points[1]);
            const { left, top, width, height } = [...range.getClientRects()].at(-1);
            return { x: left + width / 2 + scrollX, y: top + height / 2 + scrollY };
        """
        found: dict[str, float] = self.browser.execute_script(script, start, end)
        return found

    def downloaded(self, name: str) -> Path:
        """A file that the page offered, as soon as it is whole."""
        path = self.folder / name
        self.until(path.exists)
        return path

    def bring(self, path: Path) -> None:
        """Gives the page a file."""
        self.find("#import-file").send_keys(str(path))

    # -- what is behind ------------------------------------------------------------------------------------------------

    def asks(self, path: str) -> Any:
        """What the server answers."""
        with urlopen(self.address + path, timeout=10) as answer:  # noqa: S310
            return json.load(answer)

    def posts(self, path: str, body: Any) -> Any:
        """What the server answers to a body."""
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        with urlopen(Request(self.address + path, data, headers), timeout=10) as answer:  # noqa: S310
            return json.load(answer)

    def is_idle(self) -> bool:
        """Whether the server computes nothing."""
        now = self.asks("/local/machine")["now"]
        return not now["running"] and not now["queued"]

    def computes(self, script: str, *arguments: Any) -> Any:
        """What a script of the page's modules returns; `load(path)` imports one."""
        wrapped = """
            const done = arguments[arguments.length - 1];
            const load = (path) => import(`/page/${path}`);
            (async (...given) => { %s })(...arguments).then(done, (error) => done({ error: String(error) }));
        """
        found = self.browser.execute_async_script(wrapped % script, *arguments)
        assert not (isinstance(found, dict) and "error" in found), found
        return found

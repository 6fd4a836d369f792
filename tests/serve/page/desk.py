"""The page as a user has it: what is written, pressed and seen."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.request import urlopen

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
        """As if for the first time."""
        self.browser.get(f"{self.address}/health")
        self.browser.execute_script("localStorage.clear(); sessionStorage.clear()")
        self.read_logs()
        self.complaints, self.strangers = [], []
        self.browser.get(f"{self.address}/#{tab}")
        self.until(lambda: self.find("#model").text)

    def reload(self) -> None:
        self.browser.refresh()
        self.until(lambda: self.find("#model").text)

    def leave(self) -> None:
        """Ends what goes on, and reads what the browser noted."""
        self.browser.get("about:blank")
        self.read_logs()

    def read_logs(self) -> None:
        """What the page complained of, and what it asked others for."""
        self.complaints += [entry["message"] for entry in self.browser.get_log("browser")]
        for entry in self.browser.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self._note(message["params"]["request"]["url"])

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
        time.sleep(0.05)  # the page hears of it with the next event

    def go_on(self, tokens: int = 8, *, alternatives: int = 1) -> None:
        """Continue, and wait until that has ended."""
        self.choose("#length", tokens)
        self.choose("#count", alternatives)
        self.click("#continue")
        self.wait()

    def wait(self) -> None:
        """Until nothing goes on any more."""
        self.until(lambda: not self.find_all(".dock.working"))
        time.sleep(0.1)  # it is drawn with the next picture

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

    @property
    def coloured(self) -> str:
        """The text that has a colour."""
        return "".join(str(span.get_property("textContent")) for span in self.find_all("#mirror [class^='band']"))

    @property
    def branches(self) -> list[str]:
        return [row.text for row in self.find_all("#branches .snippet")]

    def until(self, seen: Callable[[], _T]) -> _T:
        """What `seen` returns as soon as that is something."""
        end = time.monotonic() + _PATIENCE
        while not (found := seen()):
            assert time.monotonic() < end, "it did not come"
            time.sleep(0.02)
        return found

    # -- what is behind ------------------------------------------------------------------------------------------------

    def asks(self, path: str) -> Any:
        """What the server answers."""
        with urlopen(self.address + path, timeout=10) as answer:  # noqa: S310: its own address
            return json.load(answer)

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

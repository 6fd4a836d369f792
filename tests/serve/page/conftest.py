"""A real server with the built-in model, and a real browser that has its page."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.serve.page.desk import Desk

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[str]:
    """The address of a server with the built-in model."""
    command = [sys.executable, "-m", "grok_local", "serve", "--port", "0", *options]
    env = {**os.environ, "GROK_LOCAL_HOME": str(folder)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            yield _address(process)
        finally:
            process.terminate()


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stderr
    said = []
    for line in process.stderr:
        said.append(line)
        if found := re.search(r"http://[^\s/,]+", line):
            return found[0]
    raise AssertionError("".join(said))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The servers' folder, so that the built-in model is packed once."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def server(models: Path) -> Iterator[str]:
    with serving(models, "--parallel", "4", "--routing-map") as address:
        yield address


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser")
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no Chromium with its chromedriver here")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    folder = tmp_path_factory.mktemp("browser")
    for flag in (*_FLAGS, f"--user-data-dir={folder / 'profile'}", "--window-size=1280,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield chrome
    finally:
        chrome.quit()


@pytest.fixture
def desk(server: str, browser: Chrome, tmp_path: Path) -> Iterator[Desk]:
    """The page, as on a first visit. What it said on the console or asked of another origin fails the test."""
    desk = Desk(browser, server, tmp_path)
    desk.visit()
    yield desk
    desk.leave()
    assert desk.complaints == []
    assert desk.strangers == []

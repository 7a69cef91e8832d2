"""MLflow's UI over a project's runs, in a real browser: opened, read and photographed."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from tests.project import command, environment
from tests.servers import free_port

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page, Request, Response, Route

CHROMIUM: Final = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS: Final = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WINDOW: Final = {"width": 1440, "height": 900}
SECONDS_TO_START: Final = 90
SECONDS_TO_SHOW: Final = 30
# The UI asks for a user who has logged in; a server without users has no such page.
EXPECTED_FAULTS: Final = {"/ajax-api/2.0/mlflow/users/current"}
TROUBLE: Final = re.compile(r"something went wrong|unexpected error|failed to load|could ?n[o']t load", re.IGNORECASE)


def missing() -> str | None:
    """Why no browser can be driven here, or None."""
    if find_spec("playwright") is None:
        return "playwright is not installed (make test installs it)"
    if CHROMIUM is None:
        return "no Chromium is installed (Debian: the package chromium)"
    return None


@contextmanager
def served(project: Path, log: Path) -> Iterator[str]:
    """`agnews-lora ui` in a project's folder, until it answers; gives what it printed, which also stands in `log`."""
    arguments = command("ui", "--port", str(free_port()))
    with (
        log.open("w", encoding="utf-8") as output,
        # A session of its own: MLflow's server is a process below this one, and both are ended.
        subprocess.Popen(
            arguments, cwd=project, env=environment(), stdout=output, stderr=output, start_new_session=True
        ) as server,
    ):
        try:
            deadline = time.monotonic() + SECONDS_TO_START
            while "Ctrl-C ends it" not in log.read_text(encoding="utf-8"):
                assert server.poll() is None and time.monotonic() < deadline, log.read_text(encoding="utf-8")
                time.sleep(0.2)
            yield log.read_text(encoding="utf-8")
        finally:
            os.killpg(server.pid, signal.SIGTERM)


class Visitor:
    """Someone with a browser. strangers: addresses beyond this machine that a page asked for, and did not get.

    faults: what the server refused, and what went wrong in a page's program.
    """

    def __init__(self, context: "BrowserContext", pictures: Path) -> None:
        self.strangers: list[str] = []
        self.faults: list[str] = []
        self._context = context
        self._pictures = pictures
        context.route("**/*", self._let_through)
        context.on("response", self._judge)
        context.on("weberror", lambda error: self.faults.append(str(error.error)))

    def open(self, url: str, shows: Sequence[str] = ()) -> "Page":
        """A page in a tab of its own, once it shows every one of some texts."""
        page = self._context.new_page()
        page.goto(url)
        for text in shows:
            page.get_by_text(text).first.wait_for(timeout=1000 * SECONDS_TO_SHOW)
        assistant = page.locator('[data-component-id="mlflow.assistant.chat_panel.close"]')
        if assistant.count():  # it opens by itself at the first visit
            assistant.first.click()
        return page

    def photograph(self, page: "Page", name: str) -> Path:
        """The window as it is, once nothing moves in it any more."""
        settle(page)
        trouble = page.get_by_text(TROUBLE)
        assert trouble.count() == 0, trouble.first.inner_text()
        path = self._pictures / f"{name}.png"
        page.screenshot(path=path, animations="disabled")
        return path

    def _let_through(self, route: "Route", request: "Request") -> None:
        parts = urlsplit(request.url)
        if parts.scheme in ("http", "https", "ws", "wss") and parts.hostname != "127.0.0.1":
            self.strangers.append(request.url)
            route.abort()
        else:
            route.continue_()

    def _judge(self, response: "Response") -> None:
        if response.status >= 400 and urlsplit(response.url).path not in EXPECTED_FAULTS:
            self.faults.append(f"{response.status} {response.url}")


@contextmanager
def visiting(pictures: Path, zoom: float = 1) -> Iterator[Visitor]:
    """A visitor with a fresh browser. pictures: folder of the photographs. zoom: of all text, as with Ctrl and +."""
    from playwright.sync_api import sync_playwright

    pictures.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        try:
            window = WINDOW | {"width": round(WINDOW["width"] / zoom)}
            context = browser.new_context(viewport=window, device_scale_factor=zoom, locale="en-GB")  # type: ignore[arg-type]
            yield Visitor(context, pictures)
        finally:
            browser.close()


def settle(page: "Page") -> None:
    """Wait until the window looks the same for half a second."""
    deadline, last = time.monotonic() + SECONDS_TO_SHOW, b""
    while time.monotonic() < deadline:
        now = page.screenshot(animations="disabled")
        if now == last:
            return
        last = now
        page.wait_for_timeout(500)
    raise AssertionError(f"{page.url} does not come to rest")


def require(page: "Page", *texts: str | re.Pattern[str]) -> None:
    """Wait until the page shows every one of some texts; what comes late is asked for by the page's own program."""
    deadline = time.monotonic() + SECONDS_TO_SHOW
    while True:
        shown = page.inner_text("body")
        absent = [
            text for text in texts if not (text in shown if isinstance(text, str) else text.search(shown) is not None)
        ]
        if not absent:
            return
        assert time.monotonic() < deadline, f"{absent} in {page.url}, which shows:\n{shown}"
        page.wait_for_timeout(300)


def missing_pictures(page: "Page") -> list[str]:
    """Addresses of pictures in the page that could not be shown, once all have come or been given up."""
    page.wait_for_function("[...document.images].every(image => image.complete)", timeout=1000 * SECONDS_TO_SHOW)
    return page.evaluate("[...document.images].filter(image => !image.naturalWidth).map(image => image.src)")

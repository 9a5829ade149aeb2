"""A real Chromium, driven by the WebDriver protocol (W3C WebDriver 2) through chromedriver, by the standard library.

Only loopback is spoken to; each browser has a profile of its own that is thrown away.
"""

from __future__ import annotations

import base64
import http.client
import json
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.e2e.net import LOOPBACK, free_port, wait_until

CHROMIUM, CHROMEDRIVER = "/usr/bin/chromium", "chromedriver"  # of the packages chromium and chromium-driver

_ARGUMENTS = (
    "--headless",
    "--no-sandbox",  # tests may run as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1280,1000",
)
_ANSWER_S = 60
TAB, ENTER, SPACE = "\ue004", "\ue007", " "


class Browser:
    """One window."""

    def __init__(self, directory: Path) -> None:
        self._port = free_port()
        self._driver = subprocess.Popen(
            [CHROMEDRIVER, f"--port={self._port}", f"--log-path={directory / 'chromedriver.log'}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._session = ""
        try:
            wait_until(self._is_up, within_s=30, what="chromedriver answers")
            options = {
                "binary": CHROMIUM,
                "args": [*_ARGUMENTS, f"--user-data-dir={directory / 'profile'}"],
            }
            capabilities = {
                "browserName": "chrome",
                "goog:chromeOptions": options,
                "goog:loggingPrefs": {"browser": "ALL"},
            }
            answer = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
            self._session = f"/session/{answer['sessionId']}"
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the browser and its driver."""
        try:
            if self._session:
                self._ask("DELETE", self._session)
        finally:
            self._driver.terminate()
            self._driver.wait()

    def open(self, url: str) -> None:
        """Go there, and wait until it is loaded."""
        self._ask("POST", f"{self._session}/url", {"url": url})

    def run(self, script: str, *arguments: object) -> Any:
        """What the body of a function in the page returns; a promise is waited for."""
        return self._ask("POST", f"{self._session}/execute/sync", {"script": script, "args": list(arguments)})

    def text(self, selector: str) -> str:
        """The text that is shown in the first element of this CSS selector; "" where nothing is shown."""
        return str(
            self.run(
                "const e = document.querySelector(arguments[0]); return e?.checkVisibility() ? e.innerText : ''",
                selector,
            )
        )

    def press(self, *keys: str) -> None:
        """Keys of the keyboard, one after the other, wherever the focus is."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        body = {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]}
        self._ask("POST", f"{self._session}/actions", body)

    def write(self, text: str) -> None:
        """Type a text."""
        self.press(*text)

    def devtools(self, command: str, **parameters: object) -> Any:
        """A command of the Chrome DevTools Protocol."""
        body = {"cmd": command, "params": parameters}
        return self._ask("POST", f"{self._session}/goog/cdp/execute", body)

    def looks(self, *, scheme: str = "light", width: int = 1280, height: int = 1000) -> None:
        """Be a screen of this size, of a user who likes this colour scheme."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.devtools("Emulation.setEmulatedMedia", features=features)
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def screenshot(self, file: Path) -> None:
        """The whole page as a PNG."""
        shot = self.devtools("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def complaints(self) -> list[str]:
        """What the console says since the last call: errors of scripts, and violations of the content policy."""
        entries = self._ask("POST", f"{self._session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def _is_up(self) -> bool:
        try:
            return bool(self._ask("GET", "/status")["ready"])
        except OSError:
            return False

    def _ask(self, method: str, path: str, body: object = None) -> Any:
        connection = http.client.HTTPConnection(LOOPBACK, self._port, timeout=_ANSWER_S)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            value = json.loads(connection.getresponse().read())["value"]
        finally:
            connection.close()
        assert not (isinstance(value, dict) and "stacktrace" in value), value.get("message")
        return value

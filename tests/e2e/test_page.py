"""The admin page in a real Chromium: what it shows, who may see it, and who can use it.

Screenshots are left in $MXGATE_SCREENSHOTS where that is set, to be looked at.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.browser import ENTER, TAB, Browser
from tests.e2e.downstream import Downstream
from tests.e2e.gateway import Config, Gateway, StartGateway
from tests.e2e.net import LOOPBACK, free_port, wait_until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.full,
]

AXE = "axe-core@4.14.1"
SENDER = "sender@client.example.net"
CONTENT = b"From: <sender@client.example.net>\r\n\r\nHello\r\n"
MARKUP = "<img/src=x/onerror=window.hacked=1>"
# The page asks each two seconds, on a busy machine.
SHOWN_S = 30


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(os.environ.get("MXGATE_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    path.mkdir(parents=True, exist_ok=True)
    return path


class Page:
    """The page of one gateway."""

    def __init__(self, browser: Browser, gateway: Gateway) -> None:
        self.browser = browser
        host, port = gateway.admin_address
        self.url = f"http://{host}:{port}/"

    def open(self) -> None:
        self.browser.looks()
        self.browser.open(self.url)
        self.browser.run("sessionStorage.clear()")
        self.browser.complaints()
        self.browser.open(self.url)

    def wait(self, condition: str, *arguments: object) -> None:
        """Until an expression in the page is true."""
        wait_until(
            lambda: bool(self.browser.run(f"return {condition}", *arguments)),
            within_s=SHOWN_S,
            what=condition,
        )

    def wait_text(self, selector: str, text: str) -> None:
        try:
            wait_until(lambda: text in self.browser.text(selector), within_s=SHOWN_S, what=text)
        except AssertionError as exc:
            raise AssertionError(f"{exc}; there is: {self.browser.text(selector)}") from exc

    def fill(self, field: str, value: str) -> None:
        """By the keyboard, as a user does."""
        self.browser.run("const f = document.getElementById(arguments[0]); f.focus(); f.select?.()", field)
        self.browser.write(value)


@pytest.fixture
def gateway(start_gateway: StartGateway, sink: Downstream, rcpt: str) -> Gateway:
    """A gateway that has seen mail of all kinds, some of it hostile."""
    gateway = start_gateway(sink.address, {"policy": {"spf": {"mode": "observe"}}})
    with gateway.connect() as client:
        client.hello()
        assert client.submit(SENDER, [rcpt], CONTENT).code == 250
    for name, mail_from, to in (
        ("client.example.net", SENDER, "user@foreign.example"),
        (MARKUP, f'"{MARKUP}"@client.example.net', f'"{MARKUP}"@foreign.example'),
    ):
        with gateway.connect() as client:
            client.hello(name)
            assert client.submit(mail_from, [to], CONTENT).code == 550
    with gateway.connect() as client:
        client.hello()
        client.command(f"MAIL FROM:<{SENDER}>")
    return gateway


@pytest.fixture
def page(browser: Browser, gateway: Gateway) -> Page:
    page = Page(browser, gateway)
    page.open()
    page.wait("document.querySelectorAll('#records tbody tr').length >= 4")
    page.wait("document.querySelectorAll('#policies tbody tr').length > 0")
    return page


def rows(browser: Browser) -> list[str]:
    return list(
        browser.run("return [...document.querySelectorAll('#records tbody tr')].map(r => r.innerText)")
    )


def test_shows_how_the_gateway_is_and_what_it_decided(page: Page, rcpt: str, screenshots: Path) -> None:
    browser = page.browser
    page.wait_text("#ready", "ready")
    page.wait_text("#traffic", "rejected")
    for text in ("Workers", "Downstream", "up", "DNS", "Store", "Configuration", "in force"):
        page.wait_text("#health", text)
    page.wait_text("#policies", "relay_guard")
    page.wait_text("#policies", "observe")
    page.wait_text("#plan", "rcpt")
    shown = "\n".join(rows(browser))
    assert rcpt in shown
    assert "550 5.7.1 Relaying denied" in shown
    assert "our policy relay_guard refused it: relaying_denied" in shown
    for scheme in ("light", "dark"):
        for name, width in (("desktop", 1280), ("phone", 360)):
            browser.looks(scheme=scheme, width=width, height=900)
            browser.screenshot(screenshots / f"page-{name}-{scheme}.png")
            # RFC-less, but everybody's: nothing is wider than the screen
            assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.complaints() == []


def test_what_strangers_wrote_is_text_and_never_markup(page: Page) -> None:
    browser = page.browser
    page.wait("document.querySelectorAll('#records .open').length >= 4")
    browser.run("for (const each of document.querySelectorAll('#records .open')) each.click()")
    page.wait("document.querySelectorAll('.detail dl').length >= 4")
    shown = "\n".join(rows(browser))
    assert MARKUP in shown
    assert browser.run("return document.querySelectorAll('main img, main script, main iframe').length") == 0
    assert browser.run("return window.hacked ?? null") is None
    # and if there were markup, the content policy would not let it run
    assert (
        browser.run(
            "const made = document.createElement('div'); made.innerHTML = arguments[0];"
            "document.body.append(made);"
            "return new Promise(done => setTimeout(() => done(window.hacked ?? null), 300))",
            MARKUP.replace("/", " "),
        )
        is None
    )
    assert any("Content Security Policy" in each for each in browser.complaints())


def test_decisions_come_live_and_filters_choose_among_them(page: Page, gateway: Gateway, rcpt: str) -> None:
    browser = page.browser
    with gateway.connect() as client:
        client.hello()
        client.submit(SENDER, ["late@foreign.example"], CONTENT)
    page.wait_text("#records", "late@foreign.example")
    page.fill("f-rcpt", rcpt)
    browser.press(ENTER)
    page.wait("document.querySelectorAll('#records tbody tr').length === 1")
    assert rcpt in rows(browser)[0]
    page.fill("f-client", "nonsense")
    browser.press(ENTER)
    page.wait_text("#filter-error", "client 'nonsense' is no address and no network")
    browser.run("document.querySelector('#filters button[type=reset]').click()")
    page.wait("document.querySelectorAll('#records tbody tr').length >= 5")
    assert browser.text("#filter-error") == ""


def test_the_keyboard_is_enough(page: Page, screenshots: Path) -> None:
    browser = page.browser
    browser.run("document.activeElement.blur(); window.scrollTo(0, 0)")
    browser.press(TAB)
    assert browser.run("return document.activeElement.textContent") == "Skip to decisions"
    browser.press(ENTER)
    seen = []
    for _ in range(20):
        browser.press(TAB)
        focused = browser.run(
            "const a = document.activeElement, s = getComputedStyle(a);"
            "return [a.id || a.className || a.textContent, s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) > 0]"
        )
        assert focused[1], f"the focus on {focused[0]} cannot be seen"
        seen.append(focused[0])
        if focused[0] == "open":
            break
    wanted = [
        "pause",
        "f-rcpt",
        "f-sender",
        "f-client",
        "f-action",
        "f-policy",
        "f-reason",
        "f-since",
        "f-tx",
    ]
    assert seen[: len(wanted)] == wanted
    assert seen[-1] == "open"
    browser.press(ENTER)
    page.wait("document.querySelector('.detail dl') !== null")
    assert browser.run("return document.activeElement.getAttribute('aria-expanded')") == "true"
    browser.run("document.querySelector('.detail').scrollIntoView()")
    browser.screenshot(screenshots / "page-detail.png")
    tx = browser.run("return document.activeElement.textContent")
    browser.press(ENTER)
    page.wait("document.querySelector('.detail') === null")
    # it stays where it is while decisions come
    assert browser.run("return document.activeElement.textContent") == tx


def test_axe_finds_nothing(page: Page, tmp_path: Path) -> None:
    source = axe(tmp_path)
    browser = page.browser
    browser.run("document.querySelector('#records .open').click()")
    page.wait("document.querySelector('.detail dl') !== null")
    for scheme in ("light", "dark"):
        for width in (1280, 360):
            browser.looks(scheme=scheme, width=width)
            browser.run(source)
            found = browser.run(
                "return axe.run(document, {resultTypes: ['violations'], runOnly:"
                " ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice']})"
            )
            told = [
                (each["id"], [node["html"] for node in each["nodes"]][:3]) for each in found["violations"]
            ]
            assert told == [], json.dumps(told, indent=1)


def axe(directory: Path) -> str:
    """axe-core, of npm where that is there and answers."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("no npm here")
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(
            [npm, "pack", AXE, "--silent", "--pack-destination", str(directory)],
            capture_output=True,
            timeout=60,
            check=False,
        )
        if done.returncode == 0:
            (packed,) = directory.glob("axe-core-*.tgz")
            with tarfile.open(packed) as archive:
                source = archive.extractfile("package/axe.min.js")
                assert source is not None
                return source.read().decode()
    pytest.skip(f"npm has no {AXE} now")


def test_names_roles_and_contrast(page: Page) -> None:
    """What axe would find first, without it."""
    browser = page.browser
    assert browser.run("return document.documentElement.lang") == "en"
    assert browser.run("return document.querySelectorAll('h1').length") == 1
    unnamed = browser.run(
        "return [...document.querySelectorAll('input, select, button, table, section')].filter(e =>"
        " !(e.labels?.length || e.textContent.trim() || e.getAttribute('aria-label')"
        " || e.getAttribute('aria-labelledby'))).map(e => e.outerHTML)"
    )
    assert unnamed == []
    assert browser.run("return document.querySelectorAll('th:not([scope])').length") == 0
    for scheme in ("light", "dark"):
        browser.looks(scheme=scheme)
        assert browser.run(CONTRAST) == []


# WCAG 2.2 1.4.3: 4.5 to 1 for text; of each element with text of its own, against the first background behind it.
CONTRAST = """
const parts = (c) => c.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, at) => sum + v * [.2126, .7152, .0722][at], 0);
const behind = (e) => { for (; e; e = e.parentElement) { const c = parts(getComputedStyle(e).backgroundColor);
  if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
return [...document.querySelectorAll('body *')].filter(e => e.checkVisibility()
  && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())).map(e => {
  const [a, b] = [light(parts(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
  return [(a + .05) / (b + .05), e.outerHTML.slice(0, 120)];
}).filter(([ratio]) => ratio < 4.5);
"""


def test_the_token_is_shown_in_a_header_and_stands_nowhere_else(
    browser: Browser, start_gateway: StartGateway, sink: Downstream, tmp_path: Path, screenshots: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("correct-horse-battery\n")
    overrides: Config = {"admin": {"token_file": str(token), "trust_loopback": False}}
    gateway = start_gateway(sink.address, overrides)
    page = Page(browser, gateway)
    page.open()
    page.wait("!document.getElementById('login').hidden")
    assert browser.run("return document.activeElement.id") == "token"
    assert browser.text("#content") == ""
    browser.screenshot(screenshots / "page-token.png")
    browser.write("wrong")
    browser.press(ENTER)
    page.wait_text("#login-error", "This is not the token.")
    browser.run("document.getElementById('token').focus()")
    browser.write("correct-horse-battery")
    browser.press(ENTER)
    page.wait("!document.getElementById('content').hidden")
    page.wait_text("#health", "Workers")
    browser.open(page.url)  # this tab remembers it
    page.wait("!document.getElementById('content').hidden")
    requested = browser.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert any("/api/v1/" in url for url in requested)
    assert not any(
        "horse" in text for text in [*requested, browser.run("return document.cookie"), gateway.log()]
    )
    assert browser.run("return localStorage.length") == 0
    browser.run("document.getElementById('forget').click()")
    page.wait("!document.getElementById('login').hidden")
    assert browser.run("return sessionStorage.length") == 0
    assert browser.text("#content") == ""
    for _ in range(10):
        browser.run("document.getElementById('token').focus()")
        browser.write("wrong")
        browser.press(ENTER)
        page.wait("document.getElementById('login-error').textContent !== ''")
        if "Too many" in browser.text("#login-error"):
            break
        browser.run("document.getElementById('login-error').textContent = ''")
    else:
        pytest.fail("nobody minded wrong tokens")


def test_says_what_is_wrong(
    browser: Browser, start_gateway: StartGateway, tmp_path: Path, rcpt: str, screenshots: Path
) -> None:
    with contextlib.closing(Downstream()) as sink:
        gateway = start_gateway(sink.address, {"dns": {"nameservers": [f"{LOOPBACK}:{free_port()}"]}})
        page = Page(browser, gateway)
        page.open()
        page.wait_text("#ready", "ready")
        sink.down()
        with gateway.connect() as client:
            client.hello()
            assert client.submit(SENDER, [rcpt], CONTENT).code == 451
        page.wait_text("#records", "yes, trouble")
        page.wait_text("#records", "no downstream of the route could be reached")
        page.wait_text("#health", "down")
        page.wait_text("#health", "unanswered in sequence")
        gateway.config_file.write_text(gateway.config_file.read_text() + "\n[nonsense]\nx = 1\n")
        gateway.reload()
        page.wait_text("#notices", "the configuration before it is in force")
        page.wait_text("#notices", "nonsense")
        browser.screenshot(screenshots / "page-trouble.png")
        status: dict[str, Any] = json.loads(gateway.admin("/readyz")[1])
        assert status["ready"]
        assert status["config"]["last_reload"]["ok"] is False
        gateway.stop()
        page.wait_text("#ready", "no answer")

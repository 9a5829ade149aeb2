"""Every dialogue of tests/dialogues, held with the gateway; those that aiosmtpd can hold, with aiosmtpd too.

With an aiosmtpd server that has our handler, all are held: what aiosmtpd cannot do is named, and seen to fail.
"""

from __future__ import annotations

import fnmatch
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.handlers import Sink

from tests.e2e.certificates import Tls
from tests.e2e.client import Reply
from tests.e2e.dialogue import Dialogue, DialogueError, Requirement, is_match, load, parse, run
from tests.e2e.downstream import Downstream
from tests.e2e.embedded import Embedded
from tests.e2e.gateway import HOSTNAME, Gateway, Value, shared_gateway
from tests.e2e.net import LOOPBACK, Address, free_port

pytestmark = pytest.mark.e2e

DIALOGUES = [load(file) for file in sorted(Path(__file__).parents[1].joinpath("dialogues").glob("*.txt"))]
# What the dialogues may rely on, whoever they are held with.
MAX_MESSAGE_BYTES = 20_000
MAX_RECIPIENTS = 5


# What aiosmtpd answers by itself, whatever its handler does; one that begins to hold has to be taken out here.
NOT_WITH_AIOSMTPD = {
    "no BDAT": ("bdat-*", "bdat"),
    "no PIPELINING, and DATA without recipients is 503": ("pipelining*", "data-before-rcpt"),
    "no DSN": ("dsn",),
    "input before its turn is no violation": (
        "data-with-input-behind",
        "ehlo-with-input-behind",
        "http-request",
    ),
    "its own parser of lines, paths and parameters": (
        "bad-parameters-more",
        "bare-lf-in-command",
        "helo-has-no-extensions",
        "long-command",
        "path-syntax",
        "source-route",
    ),
    "its own limits": ("long-line-in-content", "too-many-commands", "too-many-errors"),
    "its own words for other commands": ("help", "not-implemented", "starttls-*"),
}
NOT_FAILING_AT_ONCE = {"bare-cr-in-command"}  # it waits for the LF, and so would this test
HOLDING_IN_BOTH = {"starttls-with-argument"}


def having(requirement: Requirement) -> list[Dialogue]:
    return [dialogue for dialogue in DIALOGUES if requirement in dialogue.requires]


def lacking(requirement: Requirement) -> list[Dialogue]:
    return [dialogue for dialogue in DIALOGUES if requirement not in dialogue.requires]


def with_our_handler() -> Iterator[object]:
    """The dialogues, those that aiosmtpd does not hold marked with the reason."""
    for dialogue in lacking(Requirement.GREETING_DELAY):
        reasons = [
            why
            for why, patterns in NOT_WITH_AIOSMTPD.items()
            if any(fnmatch.fnmatchcase(dialogue.name, pattern) for pattern in patterns)
        ]
        if dialogue.name in NOT_FAILING_AT_ONCE:
            continue
        is_marked = reasons and dialogue.name not in HOLDING_IN_BOTH
        marks = [pytest.mark.xfail(reason=reasons[0], raises=AssertionError)] if is_marked else []
        yield pytest.param(dialogue, marks=marks, id=dialogue.name)


def server_section(tls: Tls) -> dict[str, Value]:
    return {
        **tls.server_section(),
        "max_message_bytes": MAX_MESSAGE_BYTES,
        "max_recipients": MAX_RECIPIENTS,
        "listen_tls": [],
    }


def server_context(tls: Tls) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tls.cert_file, tls.key_file)
    return context


@pytest.fixture(scope="module")
def talker(shared_sink: Downstream, tls: Tls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The gateway that all dialogues share, in front of a downstream that takes everything."""
    shared_sink.behave()
    directory = tmp_path_factory.mktemp("talker")
    for gateway in shared_gateway(shared_sink.address, {"server": server_section(tls)}, directory):
        gateway.wait_announces("SMTPUTF8")
        yield gateway


@pytest.fixture(scope="module")
def pausing_talker(
    shared_sink: Downstream, tls: Tls, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    """A gateway that pauses before its banner."""
    overrides: dict[str, Value] = {"server": {**server_section(tls), "greeting_delay_s": 0.5}}
    yield from shared_gateway(shared_sink.address, overrides, tmp_path_factory.mktemp("pausing"))


@pytest.fixture(scope="module")
def aiosmtpd(tls: Tls) -> Iterator[Address]:
    """A stock aiosmtpd server with the same limit of size and the same certificate."""
    controller = Controller(
        Sink(),
        hostname=LOOPBACK,
        port=free_port(),
        server_hostname=HOSTNAME,
        data_size_limit=MAX_MESSAGE_BYTES,
        enable_SMTPUTF8=True,
        tls_context=server_context(tls),
    )
    controller.start()
    yield LOOPBACK, controller.port
    controller.stop()


@pytest.fixture(scope="module")
def embedded(
    shared_sink: Downstream, tls: Tls, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Address]:
    """An aiosmtpd server with our handler."""
    shared_sink.behave()
    server = Embedded(
        shared_sink.address,
        tmp_path_factory.mktemp("embedded"),
        max_recipients=MAX_RECIPIENTS,
        data_size_limit=MAX_MESSAGE_BYTES,
        enable_SMTPUTF8=True,
        tls_context=server_context(tls),
    )
    yield server.address
    server.close()


@pytest.mark.parametrize("dialogue", lacking(Requirement.GREETING_DELAY), ids=lambda dialogue: dialogue.name)
def test_mxgate_holds(dialogue: Dialogue, talker: Gateway, tls: Tls) -> None:
    run(dialogue, talker.address, tls.trusting)


@pytest.mark.parametrize("dialogue", having(Requirement.GREETING_DELAY), ids=lambda dialogue: dialogue.name)
def test_mxgate_that_pauses_before_its_banner_holds(
    dialogue: Dialogue, pausing_talker: Gateway, tls: Tls
) -> None:
    run(dialogue, pausing_talker.address, tls.trusting)


@pytest.mark.parametrize("dialogue", having(Requirement.AIOSMTPD), ids=lambda dialogue: dialogue.name)
def test_aiosmtpd_holds(dialogue: Dialogue, aiosmtpd: Address, tls: Tls) -> None:
    # aiosmtpd gives few enhanced codes
    run(dialogue, aiosmtpd, tls.trusting, with_enhanced_codes=False)


@pytest.mark.parametrize("dialogue", list(with_our_handler()))
def test_aiosmtpd_with_our_handler_holds(dialogue: Dialogue, embedded: Address, tls: Tls) -> None:
    run(dialogue, embedded, tls.trusting, with_enhanced_codes=False)


# --- the runner itself: a dialogue that cannot fail would show nothing ----------------------------------


@pytest.mark.parametrize(
    ("text", "wrong_line"),
    [
        ("< 220 *\n> NOOP\n< 550 *\n", 3),
        ("< 220 *\n> NOOP\n< 250 9.9.9 *\n", 3),
        ("< 220-...\n< 221 *\n", 2),
        ("< 220 *\n> NOOP\n< EOF\n", 3),
        ("< 220 *\n> QUIT\n< 221 *\n< 250 *\n", 4),
    ],
    ids=["other-code", "other-enhanced-code", "other-last-line", "no-eof", "eof"],
)
def test_a_dialogue_that_does_not_hold_fails_at_its_line(
    text: str, wrong_line: int, talker: Gateway, tls: Tls
) -> None:
    with pytest.raises(AssertionError, match=rf"^wrong\.txt:{wrong_line}: "):
        run(parse("wrong", text), talker.address, tls.trusting)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        "NOOP\n",
        "< 250-first\n> NOOP\n",
        "> NOOP\n< 250-first\n",
        ">> \\q\n",
        "requires: luck\n> x\n",
    ],
)
def test_refuses_a_file_that_is_no_dialogue(text: str) -> None:
    with pytest.raises(DialogueError, match=r"^bad\.txt"):
        parse("bad", text)


@pytest.mark.parametrize(
    ("patterns", "lines", "expected"),
    [
        (["250 *"], ["250 ok"], True),
        (["250 *"], ["250-a", "250 b"], False),
        (["250-...", "250 *"], ["250 b"], True),
        (["250-...", "250 *"], ["250-a", "250-b", "250 c"], True),
        (["250-a*", "250-...", "250-c", "250 *"], ["250-a 1", "250-b", "250-c", "250 d"], True),
        (["250-a*", "250-...", "250-x", "250 *"], ["250-a 1", "250-b", "250-c", "250 d"], False),
        (["250 2.0.0 *"], ["250 Ok"], False),
    ],
)
def test_matches_replies_line_by_line(patterns: list[str], lines: list[str], expected: bool) -> None:
    assert is_match(patterns, Reply(250, tuple(lines))) is expected


def test_sends_raw_octets_with_escapes_and_repetitions() -> None:
    (step,) = parse("raw", r">> a{3*b\r\n}\x00é\\").steps
    assert getattr(step.action, "octets", None) == b"ab\r\nb\r\nb\r\n\x00\xc3\xa9\\"

"""The documents say what is true: links, tests, replies, metrics, events, keys, and commands to paste."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from gateway import demo
from gateway.config import Config, load
from gateway.smtp import reply
from gateway.smtp.reply import Reply
from policies import relay_guard, sender_login
from tests.e2e.net import LOOPBACK, wait_until
from tests.test_demo import Running

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
README = (ROOT / "README.md").read_text("utf-8")
OPERATE = (ROOT / "docs" / "operate.md").read_text("utf-8")
METRICS = (ROOT / "docs" / "metrics.md").read_text("utf-8")
RFC = (ROOT / "docs" / "rfc.md").read_text("utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language, without the indentation of a list that they stand in."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, flags=re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", body, flags=re.MULTILINE) for indent, body in found]


def anchors(text: str) -> set[str]:
    """The anchors of the headings, as the places that show Markdown make them."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text: str) -> Iterator[str]:
    """The commands of a document, continued lines joined."""
    for block in blocks(text, "sh"):
        yield from block.replace("\\\n", " ").splitlines()


@cache
def events() -> frozenset[str]:
    """Every event that is logged anywhere."""
    source = "\n".join(
        file.read_text("utf-8")
        for package in ("gateway", "policies")
        for file in (ROOT / package).rglob("*.py")
    )
    found = set(re.findall(r"(?:log|tell)(?:\.(?:info|warning|error))?\(\s*\"([a-z]+\.[a-z_]+)\"", source))
    found |= set(re.findall(r"_log\([^)\n]*\"([a-z]+\.[a-z_]+)\"", source))
    # what is logged at level debug is what an operator asked for (gateway/debugging.py)
    found |= set(re.findall(r"log\.debug\(\s*\"(debug\.[a-z_]+)\"", source))
    # the gatekeeper's, made of the outcome
    assert 'f"message.{' in source
    found |= {f"message.{outcome}" for outcome in ("accepted", "quarantined", "deferred", "rejected")}
    return frozenset(found)


# --- every document ----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(file: Path) -> None:
    text = file.read_text("utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        there = file.parent / name if name else file
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there.read_text("utf-8")), target


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_tests_that_are_named_exist(file: Path) -> None:
    text = file.read_text("utf-8")
    for module, name in re.findall(r"`([\w/]+)::(test_\w+)`", text):
        source = ROOT / "tests" / f"{module}.py"
        assert re.search(rf"^(?:async )?def {name}\(", source.read_text("utf-8"), flags=re.MULTILINE), name
    for name in re.findall(r"`dialogues/([\w-]+\.txt)`", text):
        assert (ROOT / "tests" / "dialogues" / name).is_file(), name


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_keys_that_are_named_exist(file: Path) -> None:
    text = file.read_text("utf-8")
    for section, key in re.findall(r"`(server|relay|admin|log|dns|state|auth|pipeline)\.([a-z_]+)`", text):
        if f"{section}.{key}" in events():
            continue
        model = Config.model_fields[section].annotation
        assert model is not None
        assert key in model.model_fields, f"{section}.{key}"


def test_every_row_of_the_rfc_table_says_yes_partial_or_no_and_names_its_module() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in RFC.splitlines()
        if re.match(r"\| \d", line)
    ]
    assert len(rows) > 40
    for row in rows:
        assert len(row) == 5, row
        assert re.match(r"yes|partial: |no: |no, ", row[2]), row
        assert bool(row[3]) == (not row[2].startswith("no") or "refused" in row[2]), row
        for module in re.findall(r"`((?:gateway|policies)[\w.]*)`", row[3]):
            path = ROOT / module.replace(".", "/")
            assert path.is_dir() or path.with_suffix(".py").is_file(), module


# --- docs/operate.md ---------------------------------------------------------------------------------


def table_cells(text: str, pattern: str) -> set[str]:
    """What the pattern finds in the first cells of tables."""
    first = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    return {found for cell in first for found in re.findall(pattern, cell)}


def test_every_reply_of_ours_is_explained_and_no_other() -> None:
    ours = {
        str(value)
        for module in (reply, relay_guard, sender_login)
        for value in vars(module).values()
        if isinstance(value, Reply)
    }
    assert table_cells(OPERATE, r"`(\d{3} [^`]+)`") == ours


def test_every_event_of_the_log_is_explained_and_no_other() -> None:
    section = OPERATE[OPERATE.index("## Log") : OPERATE.index("## What senders see")]
    assert table_cells(section, r"`([a-z]+\.[a-z_]+)`") == events()


def test_defaults_of_the_limits_are_those_of_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "mxgate.toml"
    file.write_text(demo.configuration(demo.PORTS), "utf-8")
    config = load(file, environ={})
    section = OPERATE[OPERATE.index("## Limits and timeouts") : OPERATE.index("## Memory and spool")]
    checked = 0
    for line in section.splitlines():
        keys = re.findall(r"`(\w+)\.(\w+)`", line)
        values = line.split(" | ")[1].removesuffix(" s").split(", ") if keys else []
        assert len(keys) == len(values)
        for (table, key), value in zip(keys, values, strict=True):
            assert getattr(getattr(config, table), key) == float(value), key
            checked += 1
    assert checked > 15


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A demo that took one message and refused one recipient."""
    started = Running(tmp_path_factory.mktemp("docs") / "mxgate-demo")
    try:
        started.wait_ready()
        started.greylist("allow", LOOPBACK)
        assert started.submit("ann@demo.test")[0] == 250
        assert started.submit("ann@example.org")[0] == 550
        wait_until(
            lambda: 'mxgate_replies_total{code="550"}' in started.page("/metrics"),
            within_s=10,
            what="the refusal in /metrics",
        )
        yield started
    finally:
        started.kill()


@pytest.mark.e2e
def test_every_metric_that_is_shown_is_explained_with_its_labels(running: Running) -> None:
    page = running.page("/metrics")
    shown = dict(re.findall(r"^# TYPE (\w+) (\w+)$", page, flags=re.MULTILINE))
    rows = re.findall(r"^\| `(mxgate_\w+)` \| (\w+) \|([^|]*)\|", METRICS, flags=re.MULTILINE)
    # which of them there are: tests/grafana; the demo has no certificate, and not all policies
    assert shown.items() <= {name: kind for name, kind, _ in rows}.items()
    for name, _, labels in rows:
        if name not in shown:
            continue
        sample = re.search(rf"^{name}(?:_sum)?(?:\{{(.*)\}})? ", page, flags=re.MULTILINE)
        assert sample, name
        told = set(re.findall(r"`(\w+)`:", labels))
        assert told == set(re.findall(r'(\w+)="', sample[1] or "")), name


@pytest.mark.e2e
def test_the_body_of_readyz_is_as_it_is_shown(running: Running) -> None:
    (shown,) = (json.loads(block) for block in blocks(OPERATE, "json") if '"ready"' in block)
    body = json.loads(running.page("/readyz"))
    for each in (shown, body):
        each["config"]["hash"] = ""
        for worker in each["workers"]:
            worker["pid"] = 0
            worker["detail"]["dns"]["nameservers"] = []  # this machine's
            for host in worker["detail"]["relay"]["routes"][0]["hosts"]:
                host |= {"host": "", "in_use": 0, "idle": 0}
    assert body == shown


@pytest.mark.e2e
def test_the_line_of_a_transaction_has_the_keys_that_are_shown(running: Running) -> None:
    (shown,) = (json.loads(block) for block in blocks(OPERATE, "json") if '"event"' in block)
    line = next(line for line in running.output().splitlines() if shown["event"] in line)
    unquoted = re.sub(r"='[^']*'", "=", line)
    assert [*re.findall(r" (\w+)=", unquoted)] == [*shown][3:]


# --- README.md ---------------------------------------------------------------------------------------


def test_the_commands_for_the_demo_are_those_that_it_prints() -> None:
    """And tests/test_demo.py runs those."""
    printed = demo.introduction(
        Path("mxgate-demo"), demo.PORTS, 1, has_swaks=True, program=".venv/bin/mxgate"
    ).splitlines()
    shown = [
        line for line in commands(README) if re.search(rf":?{demo.PORTS.gateway}\b|mxgate-demo|9464", line)
    ]
    shown = [line for line in shown if "mxgate serve" not in line]
    assert len(shown) == 13
    assert {f"    {line}" for line in shown} <= {*printed}


@pytest.mark.e2e
def test_the_example_is_good_but_for_what_has_to_be_changed(tmp_path: Path) -> None:
    """What README.md says about mxgate.example.toml, with the commands that stand there."""
    options = re.findall(r"--set '([^']*)'", README)
    assert len(options) == 3
    check = [sys.executable, "-m", "gateway", "check-config", "--config", str(ROOT / "mxgate.example.toml")]
    done = subprocess.run(check, capture_output=True, text=True, timeout=60, check=False)
    # what a machine cannot make up: the certificate, and the directory that the package makes for the state
    assert done.returncode == 78
    assert set(re.findall(r": (\S+): ", done.stderr)) == {
        "server.tls.cert_file",
        "server.tls.key_file",
        "state.url",
    }
    for option in (*options, f'state.url="sqlite://{tmp_path}/state.db"'):
        check += ["--set", option]
    done = subprocess.run(check, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout[:3]) == (0, "ok:"), done.stderr
    example = (ROOT / "mxgate.example.toml").read_text("utf-8").partition("\n[")[2]
    assert len(re.findall(r"# CHANGE\b", example)) == 4


def test_commands_of_mxgate_and_dev_exist() -> None:
    """Each `mxgate WORD` and `./dev WORD` of README.md."""
    dev = {"setup", "run", "test", "check", "bench", "fuzz", "dist", "lock", "clean"}
    assert set(re.findall(r"\./dev ([a-z]+)", README)) <= dev
    known = {
        "serve",
        "check-config",
        "config",
        "demo",
        "version",
        "decisions",
        "plan",
        "explain",
        "plugin",
        "replay",
        "spf",
        "dkim",
        "arc",
        "dmarc",
        "greylist",
    }
    found = set(re.findall(r"(?:`|bin/)mxgate ([a-z][a-z-]*)", README))
    assert found <= known

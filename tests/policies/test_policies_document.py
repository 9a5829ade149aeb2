"""docs/policies.md: its keys are those of the policies, and its examples are accepted."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from gateway.config import load
from gateway.plugins import plan
from gateway.policy import Policy
from policies.access import Access, AccessSettings, parse_entry
from policies.clamav import Clamav, ClamavSettings
from policies.dnsbl import Dnsbl, DnsblSettings, DnsList
from policies.headers import Headers, HeadersSettings
from policies.helo import Helo, HeloSettings
from policies.http_hook import HttpHook, HttpHookSettings
from policies.iprev import Iprev, IprevSettings
from policies.rate_limit import Limit, RateLimit, RateLimitSettings
from policies.rspamd import Rspamd, RspamdSettings

TEXT = (Path(__file__).parents[2] / "docs" / "policies.md").read_text("utf-8")
SECTIONS = dict(re.findall(r"^## ([a-z_]+)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
CONFIG = """\
server.hostname = "mx.example.org"
relay.domains = ["example.org"]
relay.routes = [{ downstream = ["192.0.2.5:25"] }]
"""


@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        (Access, (AccessSettings,)),
        (Iprev, (IprevSettings,)),
        (Dnsbl, (DnsblSettings, DnsList)),
        (Helo, (HeloSettings,)),
        (RateLimit, (RateLimitSettings, Limit)),
        (Headers, (HeadersSettings,)),
        (Rspamd, (RspamdSettings,)),
        (Clamav, (ClamavSettings,)),
        (HttpHook, (HttpHookSettings,)),
    ],
)
def test_each_key_is_explained_in_the_words_of_the_policy(
    policy: type[Policy[Any]], settings: tuple[type, ...]
) -> None:
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| (.*) \|$", SECTIONS[policy.name], re.MULTILINE)
    known = [(each.name, each.metadata["doc"]) for kind in settings for each in fields(kind)]
    assert rows == known


def test_its_configuration_is_accepted(tmp_path: Path) -> None:
    text = CONFIG + "".join(re.findall(r"^```toml\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))
    file = tmp_path / "mxgate.toml"
    file.write_text(text + "[policy.iprev]\n")
    planned = {each.name: each.settings for each in plan(load(file, environ={}))}
    assert isinstance(planned["access"], AccessSettings)
    dnsbl = planned["dnsbl"]
    assert isinstance(dnsbl, DnsblSettings)
    assert [each.weight for each in dnsbl.lists] == [2, -3]
    assert isinstance(planned["iprev"], IprevSettings)
    assert set(SECTIONS) <= set(planned)


def test_none_of_them_runs_unless_it_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "mxgate.toml"
    file.write_text(CONFIG)
    assert set(SECTIONS).isdisjoint({each.name for each in plan(load(file, environ={}))})


def test_the_lines_of_a_list_are_entries() -> None:
    (block,) = re.findall(r"^```text\n(.*?)^```$", SECTIONS["access"], re.MULTILINE | re.DOTALL)
    lines = [line.partition("#")[0].strip() for line in block.splitlines()]
    assert len({parse_entry(line) for line in lines}) == 5

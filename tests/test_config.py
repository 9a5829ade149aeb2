"""gateway.config: layers and their order, what each value may be, and how problems are told."""

import json
import os
import subprocess
import sys
import tomllib
from ipaddress import ip_network
from pathlib import Path

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import (
    Config,
    ConfigError,
    Dns,
    HostPort,
    Identity,
    LogFormat,
    Mode,
    Problem,
    Relay,
    Route,
    RouteTls,
    Server,
    check_files,
    load,
)
from gateway.config.render import toml_value
from gateway.config.sources import parse_value
from gateway.session import Trust

MINIMAL = """\
server.hostname = "mx.example.org"
relay.domains = ["example.org"]
relay.routes = [{ downstream = ["192.0.2.5:25"] }]
"""

# What lab/attack/targets/mxgate.sh writes.
ATTACK_LAB = """\
server.hostname = "mx.rcpt.test"
server.listen = ["127.0.0.1:2525"]
server.workers = 1
server.tls.cert_file = "/run/crt.pem"
server.tls.key_file = "/run/key.pem"
relay.domains = ["rcpt.test"]
relay.routes = [{ domains = ["*"], downstream = ["127.0.0.1:2526"] }]
relay.connect_timeout_s = 10
relay.reply_timeout_s = 30
relay.final_timeout_s = 30
relay.recipient_cache_negative_s = 0
dns.nameservers = ["127.0.0.1:5353"]
dns.total_timeout_s = 20
state.url = "memory:"
admin.listen = "127.0.0.1:9464"
policy.greylist.mode = "off"
policy.greylist.settings.delay_s = 300
"""

# lab/perf/conf/mxgate-bare.toml.in, filled in.
PERFORMANCE_LAB = """\
[server]
hostname = "gw.example"
listen = ["0.0.0.0:2525"]
workers = 1
max_connections = 10000
max_connections_per_client = 10000
[relay]
domains = ["rcpt.example"]
[[relay.routes]]
domains = ["*"]
downstream = ["127.0.0.1:2526"]
[dns]
nameservers = ["127.0.0.1:53"]
[state]
url = "memory:"
[admin]
listen = "127.0.0.1:9464"
[log]
format = "json"
[policy.spf]
mode = "off"
[policy.greylist]
mode = "off"
"""
MINIMAL_TABLES = """\
[server]
hostname = "mx.example.org"
[relay]
domains = ["example.org"]
[[relay.routes]]
downstream = ["192.0.2.5:25"]
"""


def written(directory: Path, text: str, name: str = "mxgate.toml") -> Path:
    path = directory / name
    path.write_text(text)
    return path


def loaded(directory: Path, more: str = "", **environ: str) -> Config:
    return load(written(directory, MINIMAL + more), environ=environ)


def problems(directory: Path, text: str, **environ: str) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as caught:
        load(written(directory, text), environ=environ)
    return caught.value.problems


def messages(directory: Path, more: str, **environ: str) -> dict[str, str]:
    return {problem.path: problem.message for problem in problems(directory, MINIMAL + more, **environ)}


# What loads


def test_a_minimal_file_gets_the_defaults_of_the_contract(tmp_path: Path) -> None:
    config = loaded(tmp_path)
    assert config.server.listen == (HostPort("0.0.0.0", 25),)
    assert config.server.max_message_bytes == 52_428_800
    assert config.server.drain_timeout_s == 300
    assert config.server.spool_dir is None
    assert config.relay.routes[0].domains == ("*",)
    assert config.relay.routes[0].tls is RouteTls.OPPORTUNISTIC
    assert config.relay.routes[0].identity is Identity.NONE
    assert config.state.url == "sqlite:///var/lib/mxgate/state.db"
    assert config.admin.listen == HostPort("127.0.0.1", 9464)
    assert config.pipeline.delay_reject


@pytest.mark.parametrize("text", [ATTACK_LAB, PERFORMANCE_LAB])
def test_the_labs_configurations_load(tmp_path: Path, text: str) -> None:
    config = load(written(tmp_path, text), environ={})
    assert config.policy["greylist"].mode is Mode.OFF


def test_the_example_loads_as_it_is() -> None:
    config = load(Path(__file__).parent.parent / "mxgate.example.toml", environ={})
    assert config.relay.domains == ("example.org", ".example.org")


@pytest.mark.parametrize("name", ["mxgate.json", "mxgate.conf"])
def test_json_with_the_same_schema_loads(tmp_path: Path, name: str) -> None:
    # Charts write large numbers as 5.24288e+07.
    text = json.dumps(tomllib.loads(MINIMAL)).replace("{", '{\n"log": {"format": "console"},', 1)
    text = text.replace('"hostname"', '"max_message_bytes": 5.24288e+07, "hostname"')
    config = load(written(tmp_path, text, name), environ={})
    assert config.log.format is LogFormat.CONSOLE
    assert config.server.max_message_bytes == 52_428_800


def test_the_host_name_is_the_machines_unless_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "mx1.example.net")
    config = load(written(tmp_path, MINIMAL.partition("\n")[2]), environ={})
    assert config.server.hostname == "mx1.example.net"
    monkeypatch.setattr("socket.gethostname", lambda: "my_laptop")
    with pytest.raises(ConfigError, match=r"server\.hostname: 'my_laptop' is no domain"):
        load(written(tmp_path, MINIMAL.partition("\n")[2]), environ={})


def test_the_authserv_id_is_the_host_name_unless_set(tmp_path: Path) -> None:
    assert loaded(tmp_path).authserv_id == "mx.example.org"
    assert loaded(tmp_path, 'auth.authserv_id = "filter.example.org"').authserv_id == "filter.example.org"


def test_a_configuration_can_be_made_in_code() -> None:
    """Embedders and tests write the types that `load` gives."""
    address = HostPort("192.0.2.5", 25)
    network = ip_network("192.0.2.0/24")
    config = Config(
        server=Server(
            hostname="mx.example.org", listen=(address,), spool_dir=Path("/x"), allow_bare_lf_from=(network,)
        ),
        relay=Relay(domains=("example.org",), routes=(Route(downstream=((address,),)),)),
        dns=Dns(nameservers=(address,)),
    )
    assert (
        config.server.listen == config.relay.routes[0].downstream[0] == config.dns.nameservers == (address,)
    )
    assert config.server.allow_bare_lf_from == (network,)
    assert str(config.origin(("server", "listen"))) == "default"
    assert config.written(("state", "url")) is None
    assert str(config.problem(("server", "listen"), "is taken")) == "server.listen: is taken"


def test_a_configuration_cannot_be_changed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        loaded(tmp_path).server.max_errors = 3  # type: ignore[misc]  # this is what is tested


def test_values_become_types_at_the_border(tmp_path: Path) -> None:
    more = """
    server.listen = ["[::]:25", "192.0.2.1:0"]
    server.allow_bare_lf_from = ["192.0.2.7", "2001:db8::/32"]
    server.spool_dir = "/var/spool/mxgate"
    dns.nameservers = ["192.0.2.53", "2001:db8::53", "[2001:db8::53]:5353"]
    """
    config = loaded(tmp_path, more)
    assert config.server.listen == (HostPort("::", 25), HostPort("192.0.2.1", 0))
    assert [str(address) for address in config.server.listen] == ["[::]:25", "192.0.2.1:0"]
    assert config.server.allow_bare_lf_from == (ip_network("192.0.2.7/32"), ip_network("2001:db8::/32"))
    assert config.server.spool_dir == Path("/var/spool/mxgate")
    ports = [(address.host, address.port) for address in config.dns.nameservers]
    assert ports == [("192.0.2.53", 53), ("2001:db8::53", 53), ("2001:db8::53", 5353)]


def test_domains_are_lower_case_a_labels(tmp_path: Path) -> None:
    text = MINIMAL.replace('["example.org"]', '["EXAMPLE.org", ".bücher.example"]')
    config = load(written(tmp_path, text), environ={})
    assert config.relay.domains == ("example.org", ".xn--bcher-kva.example")


@pytest.mark.parametrize("host", ["mta", "mta_1.internal", "Mail.Example.org", "localhost"])
def test_a_downstream_may_be_a_host_name(tmp_path: Path, host: str) -> None:
    config = load(written(tmp_path, MINIMAL.replace("192.0.2.5", host)), environ={})
    assert config.relay.routes[0].downstream == ((HostPort(host.lower(), 25),),)


A, B, C = (HostPort(f"192.0.2.{last}", 25) for last in (5, 6, 7))


@pytest.mark.parametrize(
    ("downstream", "groups"),
    [
        ('["192.0.2.5:25"]', ((A,),)),
        ('["192.0.2.5:25", "192.0.2.6:25"]', ((A, B),)),
        ('[["192.0.2.5:25", "192.0.2.6:25"]]', ((A, B),)),
        ('[["192.0.2.5:25", "192.0.2.6:25"], ["192.0.2.7:25"]]', ((A, B), (C,))),
        ('[["192.0.2.5:25"], ["192.0.2.6:25"], ["192.0.2.7:25"]]', ((A,), (B,), (C,))),
    ],
)
def test_downstreams_are_groups_in_order_of_preference(
    tmp_path: Path, downstream: str, groups: tuple[tuple[HostPort, ...], ...]
) -> None:
    config = load(written(tmp_path, MINIMAL.replace('["192.0.2.5:25"]', downstream)), environ={})
    assert config.relay.routes[0].downstream == groups


def with_routes(*routes: str) -> str:
    """The minimal file with these routes, each a line of its own, the first on line 3."""
    lines = ",\n  ".join(routes)
    return f"{MINIMAL.partition('relay.routes')[0]}relay.routes = [ {lines} ]"


HERE = 'downstream = ["192.0.2.5:25"]'


def test_routes_have_the_names_that_they_are_given_or_that_of_their_place(tmp_path: Path) -> None:
    text = with_routes(
        f'{{ domains = ["a.example"], {HERE} }}',
        f'{{ name = "mail_box-2", domains = [".b.example"], {HERE} }}',
        f'{{ name = "", {HERE} }}',
    )
    named = load(written(tmp_path, text), environ={}).relay.named_routes
    assert [(name, route.domains) for name, route in named] == [
        ("route1", ("a.example",)),
        ("mail_box-2", (".b.example",)),
        ("route3", ("*",)),
    ]


@pytest.mark.parametrize("identity", ["none", "xforward", "xclient", "proxy-v2"])
@pytest.mark.parametrize("protocol", ["smtp", "lmtp"])
@pytest.mark.parametrize("tls", ["tls = 'none'", "tls = 'encrypt', tls_implicit = true"])
def test_identity_protocol_and_tls_go_together_as_one_likes(
    tmp_path: Path, identity: str, protocol: str, tls: str
) -> None:
    text = with_routes(f"{{ {HERE}, identity = '{identity}', protocol = '{protocol}', {tls} }}")
    (route,) = load(written(tmp_path, text), environ={}).relay.routes
    assert (route.identity, route.protocol) == (identity, protocol)


# What is refused


@pytest.mark.parametrize(
    ("line", "path", "message"),
    [
        ("server.max_recipient = 1", "server.max_recipient", "unknown key; did you mean max_recipients?"),
        ("servre.hostname = 'x'", "servre", "unknown key; did you mean server?"),
        ("server.max_recipients = 0", "server.max_recipients", "must be greater than or equal to 1"),
        ("server.max_recipients = true", "server.max_recipients", "must be a number"),
        ("server.max_recipients = 1.5", "server.max_recipients", "must be a whole number"),
        ("server.max_recipients = 'many'", "server.max_recipients", "must be a whole number"),
        ("server.idle_timeout_s = nan", "server.idle_timeout_s", "must be a finite number"),
        ("server.greeting_delay_s = 2", "server.greeting_delay_s", "must be less than or equal to 1"),
        ("server.listen = '0.0.0.0:25'", "server.listen", "must be a list"),
        ("server.listen = ['0.0.0.0:65536']", "server.listen[0]", "port 65536 is outside 0..65535"),
        ("server.listen = []", "server.listen", "no address to listen on"),
        (
            "server.listen = ['0.0.0.0:25', '[::]:25', '[2001:db8::1]:25']",
            "server.listen[2]",
            "[2001:db8::1]:25 is listened on already by [::]:25",
        ),
        (
            "server.listen = ['0.0.0.0:9464']",
            "admin.listen",
            "127.0.0.1:9464 is listened on already by 0.0.0.0:9464",
        ),
        ("server.workers = 'all'", "server.workers", 'must be 1 to 256, or "auto"'),
        ("server.workers = true", "server.workers", 'must be 1 to 256, or "auto"'),
        ('server.spool_dir = "a\\u0000b"', "server.spool_dir", "a path cannot contain NUL"),
        ("server.spool_dir = 3", "server.spool_dir", "must be a string"),
        ("server.tls = 'yes'", "server.tls", "must be a table"),
        ("server.tls.cert_file = 'c.pem'", "server.tls.cert_file", "needs server.tls.key_file"),
        ("server.tls.key_file = 'k.pem'", "server.tls.key_file", "needs server.tls.cert_file"),
        (
            "server.listen_tls = ['0.0.0.0:465']",
            "server.listen_tls",
            "needs server.tls.cert_file and server.tls.key_file",
        ),
        (
            "relay.trusted_networks = ['192.0.2.1/24']",
            "relay.trusted_networks[0]",
            "'192.0.2.1/24' has bits set behind its prefix; did you mean 192.0.2.0/24?",
        ),
        (
            "server.allow_bare_lf_from = ['lan']",
            "server.allow_bare_lf_from[0]",
            "'lan' is not a network; write it as 192.0.2.0/24 or 2001:db8::/32",
        ),
        (
            "log.format = 'jsno'",
            "log.format",
            "must be one of json, logfmt, console, text; did you mean json?",
        ),
        ("log.format = 3", "log.format", "must be one of json, logfmt, console, text"),
        ("pipeline.delay_reject = 'no'", "pipeline.delay_reject", "must be true or false"),
        (
            "auth.authserv_id = 'a;b'",
            "auth.authserv_id",
            "'a;b' is not a token: letters, digits, '.', '-' and '_'",
        ),
        ("policy.Spf.mode = 'off'", "policy.Spf", "must match ^[a-z][a-z0-9_]*$"),
        ("policy.spf.mod = 'off'", "policy.spf.mod", "unknown key; did you mean mode?"),
        (
            "policy.spf.mode = 'of'",
            "policy.spf.mode",
            "must be one of enforce, observe, off; did you mean off?",
        ),
    ],
)
def test_a_bad_value_is_refused_in_an_operators_words(
    tmp_path: Path, line: str, path: str, message: str
) -> None:
    assert messages(tmp_path, line) == {path: message}


@pytest.mark.parametrize(
    "address",
    [
        "25",
        ":25",
        "x:25",
        "0.0.0.0",
        "::1",
        "::1:25",
        "[::1]",
        "[::1]:",
        "[1.2.3.4]:25",
        "1.2.3.4:-1",
        "1.2.3.4:٣",
    ],
)
def test_a_bad_listen_address_is_refused(tmp_path: Path, address: str) -> None:
    assert [*messages(tmp_path, f"server.listen = ['{address}']")] == ["server.listen[0]"]


@pytest.mark.parametrize(
    "address", ["mta", "mta:0", "-mta:25", "a..b:25", "1.2.3:25", "a b:25", "2001:db8::1"]
)
def test_a_bad_downstream_is_refused(tmp_path: Path, address: str) -> None:
    found = problems(tmp_path, MINIMAL.replace("192.0.2.5:25", address))
    assert [problem.path for problem in found] == ["relay.routes[0].downstream[0]"]


@pytest.mark.parametrize(
    ("downstream", "path", "message"),
    [
        ("[]", "", "must not be empty"),
        ("'mta:25'", "", "must be a list"),
        ("[25]", "[0]", "must be a string"),
        ("['mta:25',\n[]]", "[1]", "must not be empty"),
        ("['mta:25',\n['mta2:25']]", "", "must hold either addresses or groups of addresses, not both"),
        ("[['mta:25',\n'mta2:0']]", "[0][1]", "port 0 is outside 1..65535"),
        ("[['mta:0']]", "[0][0]", "port 0 is outside 1..65535"),
        ("[['mta:25'],\n['mta2:25', 25]]", "[1][1]", "must be a string"),
        ("[['mta:25'],\n[['mta2:25']]]", "[1][0]", "must be a string"),
        ("['mta:25',\n'MTA:25']", "[1]", "mta:25 is listed twice"),
        ("[['mta:25', 'mta2:25'],\n['mta:25']]", "[1][0]", "mta:25 is listed twice"),
    ],
)
def test_a_list_of_downstreams_that_is_none_is_refused_at_its_line(
    tmp_path: Path, downstream: str, path: str, message: str
) -> None:
    (problem,) = problems(tmp_path, MINIMAL.replace('["192.0.2.5:25"]', downstream))
    assert (problem.path, problem.message) == (f"relay.routes[0].downstream{path}", message)
    assert problem.origin.line == (4 if path in ("[1]", "[0][1]", "[1][0]", "[1][1]") else 3)


@pytest.mark.parametrize(
    ("routes", "path", "message", "line"),
    [
        ([f"{{ {HERE} }}", f"{{ {HERE} }}"], "relay.routes[1].domains[0]", "* is in route1 already", 4),
        (
            [f'{{ name = "in", domains = ["*", "example.net", "EXAMPLE.net"], {HERE} }}'],
            "relay.routes[0].domains[2]",
            "example.net is in in already",
            3,
        ),
        (
            [f"{{ {HERE} }}", f'{{ name = "route1", domains = ["example.net"], {HERE} }}'],
            "relay.routes[1].name",
            "another route has the name route1",
            4,
        ),
        (
            [f'{{ name = "Route 1", {HERE} }}'],
            "relay.routes[0].name",
            "must match ^[a-z0-9_-]{0,63}$",
            3,
        ),
        (
            [f"{{ {HERE}, tls_implicit = true }}"],
            "relay.routes[0].tls_implicit",
            'needs tls = "encrypt" or tls = "verify"',
            3,
        ),
        (
            [f"{{ {HERE}, tls = 'none', tls_implicit = true }}"],
            "relay.routes[0].tls_implicit",
            'needs tls = "encrypt" or tls = "verify"',
            3,
        ),
        (
            [f"{{ {HERE}, tls = 'encrypt', tls_ca_file = '/etc/ca.pem' }}"],
            "relay.routes[0].tls_ca_file",
            'checks nothing without tls = "verify"',
            3,
        ),
        (
            [f"{{ {HERE}, identity = 'proxy' }}"],
            "relay.routes[0].identity",
            "must be one of none, xclient, xforward, proxy-v2; did you mean proxy-v2?",
            3,
        ),
    ],
)
def test_a_route_that_contradicts_itself_or_another_is_refused_at_its_line(
    tmp_path: Path, routes: list[str], path: str, message: str, line: int
) -> None:
    (problem,) = problems(tmp_path, with_routes(*routes))
    assert (problem.path, problem.message, problem.origin.line) == (path, message, line)


@pytest.mark.parametrize(
    ("domain", "patterns", "is_routed"),
    [
        ("example.org", ["example.org"], True),
        ("example.org", [".org"], True),
        ("example.org", ["*"], True),
        ("mx.example.org", [".example.org"], True),
        (".example.org", [".example.org"], True),
        (".example.org", [".org"], True),
        ("example.org", [".example.org"], False),
        ("example.org", ["example.net"], False),
        (".example.org", ["example.org"], False),
        ("mx.example.org", ["example.org"], False),
    ],
)
def test_every_domain_has_a_route(tmp_path: Path, domain: str, patterns: list[str], is_routed: bool) -> None:
    text = with_routes(f"{{ domains = {patterns}, {HERE} }}").replace('["example.org"]', f"['{domain}']")
    path = written(tmp_path, text)
    if is_routed:
        assert load(path, environ={}).relay.domains == (domain,)
        return
    with pytest.raises(ConfigError) as caught:
        load(path, environ={})
    (problem,) = caught.value.problems
    assert (problem.path, problem.message, problem.origin.line) == (
        "relay.domains[0]",
        f"no route takes mail for {domain}",
        2,
    )


@pytest.mark.parametrize(
    "url",
    [
        "redis",
        "mysql://h/d",
        "memory:x",
        "sqlite:state.db",
        "sqlite:///",
        "sqlite:///d/",
        "redis:h",
        "redis://",
    ],
)
def test_a_bad_state_url_is_refused(tmp_path: Path, url: str) -> None:
    assert [*messages(tmp_path, f"state.url = '{url}'")] == ["state.url"]


@pytest.mark.parametrize(
    "url",
    [
        "memory:",
        "sqlite:///state.db",
        "redis://:pw@h:1/0",
        "rediss://h",
        "redis+sentinel://a:1,b:2/x",
        "redis+cluster://h",
    ],
)
def test_a_good_state_url_is_taken(tmp_path: Path, url: str) -> None:
    assert loaded(tmp_path, f"state.url = '{url}'").state.url == url


def test_every_domain_of_the_world_is_an_open_relay(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, MINIMAL.replace('["example.org"]', '["*"]'))
    assert "open relay" in problem.message


def test_mail_for_no_domain_and_mail_without_route_are_refused(tmp_path: Path) -> None:
    found = problems(tmp_path, 'server.hostname = "mx.example.org"')
    assert [problem.path for problem in found] == ["relay.domains", "relay.routes"]
    assert str(found[0].origin) == str(tmp_path / "mxgate.toml")


def test_a_domains_file_stands_for_domains(tmp_path: Path) -> None:
    text = MINIMAL.replace("domains = [", 'domains_file = "/etc/mxgate/domains"\nrelay.trusted_networks = [')
    assert load(written(tmp_path, text.replace('["example.org"]', "[]")), environ={}).relay.domains == ()


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ("mode = 'off'", "policy.relay_guard.mode"),
        ("mode = 'observe'", "policy.relay_guard.mode"),
        ("on_error = 'continue'", "policy.relay_guard.on_error"),
        ("exempt = ['trusted']", "policy.relay_guard.exempt"),
        ("file = 'guard.py'", "policy.relay_guard.file"),
        ("domains.'example.org'.mode = 'off'", "policy.relay_guard.domains"),
        ("settings.domains = ['example.org']", "policy.relay_guard.settings"),
    ],
)
def test_the_relay_guard_cannot_be_weakened(tmp_path: Path, line: str, path: str) -> None:
    (message,) = messages(tmp_path, f"policy.relay_guard.{line}").items()
    assert message[0] == path
    assert "relay guard" in message[1] or "[relay]" in message[1]


def test_all_problems_are_told_in_one_go_in_the_files_order(tmp_path: Path) -> None:
    more = """
    server.max_recipient = 1
    server.workers = 0
    log.format = "x"
    """
    found = problems(tmp_path, MINIMAL + more, MXGATE__SERVER__FOO="1")
    assert [(problem.path, problem.origin.line) for problem in found] == [
        ("server.max_recipient", 5),
        ("server.workers", 6),
        ("log.format", 7),
        ("server.foo", 0),
    ]


def test_a_fault_is_no_reason_to_tell_of_its_consequences(tmp_path: Path) -> None:
    found = problems(
        tmp_path, MINIMAL.replace('["192.0.2.5:25"]', '["x"]').replace('["example.org"]', '["-"]')
    )
    assert [problem.path for problem in found] == ["relay.domains[0]", "relay.routes[0].downstream[0]"]


# Files that cannot be read


def test_a_syntax_error_has_its_line_and_column(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, "[server]\nhostname = mx\n")
    assert (problem.origin.line, problem.origin.column) == (2, 12)
    assert problem.origin.excerpt == "hostname = mx"
    (problem,) = problems(tmp_path, "[server]\nlisten = [\n")
    assert problem.origin.line in {2, 3}


def test_a_json_syntax_error_has_its_line_and_column(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mxgate\.json:2:3: "):
        load(written(tmp_path, "{\n  server: 1}", "mxgate.json"), environ={})
    with pytest.raises(ConfigError, match="one object"):
        load(written(tmp_path, "[]", "mxgate.json"), environ={})


def test_a_file_that_is_missing_or_not_utf_8_is_a_problem(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load(tmp_path / "none.toml", environ={})
    path = tmp_path / "latin1.toml"
    path.write_bytes(b"[server]\n# \xe4\n")
    with pytest.raises(ConfigError, match=r"latin1\.toml:2:1: is not UTF-8"):
        load(path, environ={})


def test_a_file_that_is_nested_too_deeply_is_a_problem(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nested too deeply"):
        load(written(tmp_path, f"a = {'[' * 10_000}{']' * 10_000}"), environ={})


# Layers


def test_command_line_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    path = written(
        tmp_path, MINIMAL + "server.max_errors = 1\nserver.max_received = 11\nserver.max_recipients = 21"
    )
    environ = {"MXGATE__SERVER__MAX_ERRORS": "2", "MXGATE__SERVER__MAX_RECEIVED": "12", "OTHER": "x"}
    config = load(path, environ=environ, overrides=["server.max_errors=3"])
    assert (config.server.max_errors, config.server.max_received, config.server.max_recipients) == (3, 12, 21)
    assert str(config.origin(("server", "max_errors"))) == "--set server.max_errors"
    assert str(config.origin(("server", "max_received"))) == "environment MXGATE__SERVER__MAX_RECEIVED"
    assert str(config.origin(("server", "max_recipients"))) == f"{path}:6:1"
    assert str(config.origin(("server", "listen"))) == "default"


def test_the_environment_alone_can_configure_everything() -> None:
    environ = {
        "MXGATE__SERVER__HOSTNAME": "mx.example.org",
        "MXGATE__RELAY__DOMAINS": '["example.org"]',
        "MXGATE__RELAY__ROUTES": '[{ downstream = ["192.0.2.5:25"] }]',
        "MXGATE__POLICY__GREYLIST__MODE": "off",
        "MXGATE__SERVER": "{ max_errors = 3, tls = { cert_file = 'c', key_file = 'k' } }",
    }
    config = load(None, environ=environ)
    assert config.server.hostname == "mx.example.org"
    assert config.server.max_errors == 3
    assert config.server.tls.cert_file == Path("c")
    assert config.policy["greylist"].mode is Mode.OFF
    assert str(config.origin(("relay", "routes", 0, "downstream"))) == "environment MXGATE__RELAY__ROUTES"
    assert str(config.origin(("server", "tls", "key_file"))) == "environment MXGATE__SERVER"


def test_a_table_of_a_higher_layer_is_merged_and_a_list_replaces(tmp_path: Path) -> None:
    config = load(
        written(tmp_path, MINIMAL),
        environ={},
        overrides=["server={ max_errors = 3 }", "relay.domains=['example.net']"],
    )
    assert config.server.hostname == "mx.example.org"
    assert config.relay.domains == ("example.net",)


@pytest.mark.parametrize("override", ["x", "=1", "server.max_errors", "server..x=1", "server.x y=1"])
def test_an_override_that_names_no_key_is_a_problem(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"--set .*: write it as section\.key=value"):
        load(written(tmp_path, MINIMAL), environ={}, overrides=[override])


def test_an_override_below_a_value_is_a_problem(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"server\.hostname is not a table"):
        load(written(tmp_path, MINIMAL), environ={}, overrides=["server.hostname.x=1"])
    with pytest.raises(ConfigError, match="environment MXGATE__SERVER____X: names no key"):
        load(written(tmp_path, MINIMAL), environ={"MXGATE__SERVER____X": "1"})


def test_a_quoted_key_can_be_overridden(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, MINIMAL), environ={}, overrides=['policy.spf.domains."Example.org".mod=off'])
    assert caught.value.problems[0].path == 'policy.spf.domains."Example.org".mod'


def test_a_problem_is_shown_where_its_table_was_made(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, MINIMAL + "[policy.Spf]\nmode = 'off'")
    assert problem.origin.line == 4
    (problem,) = problems(tmp_path, MINIMAL, MXGATE__POLICY__SPF__TIMEOUT_S="-1")
    assert str(problem.origin) == "environment MXGATE__POLICY__SPF__TIMEOUT_S"
    (problem,) = problems(tmp_path, MINIMAL.replace("downstream", "domains").replace("192.0.2.5:25", "*"))
    assert (problem.path, problem.message, problem.origin.line) == (
        "relay.routes[0].downstream",
        "is required",
        3,
    )


def test_clients_are_exempt_by_network_and_by_trust(tmp_path: Path) -> None:
    exempt = loaded(
        tmp_path, "policy.spf.exempt = ['192.0.2.0/24', '2001:db8::1', 'trusted', 'authenticated']"
    ).policy["spf"]
    assert exempt.exempt == (
        ip_network("192.0.2.0/24"),
        ip_network("2001:db8::1"),
        Trust.TRUSTED,
        Trust.AUTHENTICATED,
    )


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("trustd", "'trustd' is neither a network nor one of trusted, authenticated; did you mean trusted?"),
        (
            "untrusted",
            "'untrusted' is neither a network nor one of trusted, authenticated; did you mean trusted?",
        ),
        ("192.0.2.1/24", "'192.0.2.1/24' has bits set behind its prefix; did you mean 192.0.2.0/24?"),
        ("a@example.org", "'a@example.org' is neither a network nor one of trusted, authenticated"),
    ],
)
def test_an_exemption_that_means_nothing_is_told_with_its_place(
    tmp_path: Path, entry: str, message: str
) -> None:
    found = messages(tmp_path, f"policy.spf.exempt = ['192.0.2.0/24', '{entry}']")
    assert found == {"policy.spf.exempt[1]": message}


JAIL = "[[relay.routes]]\nname = 'jail'\ndomains = []\ndownstream = ['192.0.2.6:25']\n"


def test_a_route_may_be_for_quarantine_and_nothing_else(tmp_path: Path) -> None:
    config = load(written(tmp_path, MINIMAL_TABLES + JAIL + "[quarantine]\nroute = 'jail'\n"), environ={})
    assert config.quarantine.route == "jail"
    assert [route.domains for route in config.relay.routes] == [("*",), ()]


@pytest.mark.parametrize(
    ("more", "path", "message"),
    [
        (JAIL, "relay.routes[1].domains", "must not be empty"),
        ("[quarantine]\nroute = 'jial'\n", "quarantine.route", "no route has the name jial"),
        (
            JAIL + "protocol = 'lmtp'\n[quarantine]\nroute = 'jail'\n",
            "quarantine.route",
            "jail speaks LMTP, which takes one recipient at a time",
        ),
        (
            "[quarantine]\nheader = 'Subject'\n",
            "quarantine.header",
            "Subject stands at most once in a message (RFC 5322 3.6); a second one means what each reader likes",
        ),
        ("[quarantine]\nheader = 'X:'\n", "quarantine.header", "'X:' is no field name"),
    ],
)
def test_a_quarantine_that_cannot_be_used_is_told(tmp_path: Path, more: str, path: str, message: str) -> None:
    found = {p.path: p.message for p in problems(tmp_path, MINIMAL_TABLES + more)}
    assert found == {path: message}


def test_a_route_for_quarantine_alone_takes_no_mail(tmp_path: Path) -> None:
    text = MINIMAL_TABLES.replace("downstream", "name = 'jail'\ndomains = []\ndownstream")
    found = {p.path: p.message for p in problems(tmp_path, text + "[quarantine]\nroute = 'jail'\n")}
    assert found["relay.routes"] == "no route has a domain"


def test_the_file_of_a_policy_must_be_there_where_it_is_run(tmp_path: Path) -> None:
    off = loaded(tmp_path, "policy.x = { file = '/nonexistent/x.py', mode = 'off' }")
    check_files(off)
    config = loaded(tmp_path, "policy.x = { file = '/nonexistent/x.py' }")
    with pytest.raises(ConfigError, match=r"policy\.x\.file: /nonexistent/x\.py cannot be read"):
        check_files(config)


@given(st.text())
def test_the_environment_gives_a_toml_value_or_the_text_itself(text: str) -> None:
    value = parse_value(text)
    try:
        expected: object = tomllib.loads(f"x = {text}")
    except tomllib.TOMLDecodeError:
        expected = {"x": text}
    assert value == text or {"x": value} == expected


@given(st.recursive(st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False), st.lists))
def test_what_toml_can_write_comes_back_from_the_environment(value: object) -> None:
    assert parse_value(toml_value(value)) == value


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_no_environment_makes_anything_but_a_config_or_its_problems(text: str) -> None:
    environ = {"MXGATE__SERVER__HOSTNAME": text, "MXGATE__SERVER__LISTEN": text, "MXGATE__POLICY": text}
    with pytest.raises(ConfigError):
        load(None, environ=environ)


# ${NAME}


def test_a_variable_is_filled_in_inside_strings(tmp_path: Path) -> None:
    config = loaded(tmp_path, 'state.url = "redis://:${PASS_1}@${HOST}/0"', PASS_1="a$b", HOST="redis")
    assert config.state.url == "redis://:a$b@redis/0"
    assert config.written(("state", "url")) == "redis://:${PASS_1}@${HOST}/0"
    assert loaded(tmp_path, "server.max_errors = '${N}'", N="7").server.max_errors == 7
    assert loaded(tmp_path, "server.workers = '${N}'", N="1").server.workers == 1
    assert loaded(tmp_path, "state.url = 'redis://:$${x}@h'").state.url == "redis://:${x}@h"


@pytest.mark.parametrize("value", ["${}", "${A B}", "${1}", "${OPEN"])
def test_a_reference_that_is_none_is_a_problem(tmp_path: Path, value: str) -> None:
    assert (
        "needs a variable's name" in messages(tmp_path, f"auth.authserv_id = 'x{value}'")["auth.authserv_id"]
    )


def test_a_variable_that_is_not_set_is_named(tmp_path: Path) -> None:
    found = problems(tmp_path, MINIMAL + "state.url = 'redis://:${REDIS_PASSWORD}@redis'")
    assert [str(problem) for problem in found] == [
        f"{tmp_path}/mxgate.toml:4:1: state.url: environment variable REDIS_PASSWORD is not set"
    ]


def test_a_variable_is_filled_in_inside_lists(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL.replace("192.0.2.5", "${MTA}"))
    assert load(path, environ={"MTA": "mta"}).relay.routes[0].downstream == ((HostPort("mta", 25),),)


# Secrets


def test_no_problem_shows_the_password_of_a_url(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, MINIMAL + "state.url = 'redi://:hunter2@host'"), environ={})
    (problem,) = caught.value.problems
    assert "hunter2" not in f"{problem!r}{problem}{caught.value!r}"
    assert "hunter2" not in repr(loaded(tmp_path, "state.url = 'redis://:hunter2@host'"))


def test_no_excerpt_shows_a_value_named_like_a_secret(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, MINIMAL + "policy.x = { api_key = 'hunter2' }")
    assert problem.path == "policy.x.api_key"
    assert "hunter2" not in problem.origin.excerpt


# Files on this machine


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    issued = trustme.CA().issue_cert("mx.example.org")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    return tmp_path / "cert.pem", tmp_path / "key.pem"


def with_tls(cert_file: Path, key_file: Path) -> str:
    return f"server.tls = {{ cert_file = '{cert_file}', key_file = '{key_file}' }}"


def test_files_that_can_be_used_pass(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    check_files(loaded(tmp_path, with_tls(*certificate)))


def test_files_that_cannot_be_used_are_all_told(tmp_path: Path) -> None:
    more = """
    server.tls = { cert_file = "/nonexistent/c.pem", key_file = "/nonexistent/k.pem" }
    server.spool_dir = "/nonexistent/spool"
    relay.domains_file = "/nonexistent/domains"
    relay.recipients_file = "/nonexistent/recipients"
    admin.token_file = "/nonexistent/token"
    """
    text = MINIMAL.replace("{ down", "{ tls = 'verify', tls_ca_file = '/nonexistent/ca', down")
    with pytest.raises(ConfigError) as caught:
        check_files(load(written(tmp_path, text + more), environ={}))
    assert [(problem.path, problem.origin.line) for problem in caught.value.problems] == [
        ("server.tls.cert_file", 5),
        ("server.tls.key_file", 5),
        ("relay.domains_file", 7),
        ("relay.recipients_file", 8),
        ("admin.token_file", 9),
        ("relay.routes[0].tls_ca_file", 3),
        ("server.spool_dir", 6),
    ]


def test_an_unreadable_file_is_told(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    certificate[1].chmod(0)
    file = written(tmp_path, MINIMAL + with_tls(*certificate))
    command = [sys.executable, "-m", "gateway", "check-config", "--config", str(file)]
    if os.geteuid() == 0:  # who may read everything but for these
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 78
    assert "Permission denied" in done.stdout + done.stderr
    assert "server.tls.key_file" in done.stdout + done.stderr


def test_a_key_of_another_certificate_is_told(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    other = tmp_path / "other.pem"
    trustme.CA().issue_cert("mx.example.org").private_key_pem.write_to_path(other)
    with pytest.raises(ConfigError, match="are no certificate and its key"):
        check_files(loaded(tmp_path, with_tls(certificate[0], other)))


def test_a_directory_is_no_certificate(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Is a directory"):
        check_files(loaded(tmp_path, with_tls(tmp_path, tmp_path)))

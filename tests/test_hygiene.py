"""Nothing from outside forges what operators read: a sample or a label, a line, a sequence that drives a terminal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from gateway.adapters.metrics import MergedMetrics, ProcessMetrics
from gateway.cli import cli

HOSTILE = st.text() | st.sampled_from(
    [
        '"} 1\nmxgate_forged_total 1',
        "\\",
        '\\"',
        "\n# TYPE x counter",
        "\r",
        "\x1b[2J",
        "\u2028",
        "{a='b'}",
        "\0",
    ]
)


@given(HOSTILE)
def test_no_label_value_breaks_the_page_of_metrics(value: str) -> None:
    metrics = ProcessMetrics()
    metrics.counters("mxgate_things_total", "Things", ("policy",)).labels(
        value.encode("utf-8", "replace").decode()
    ).inc()
    merged = MergedMetrics()
    merged.update(1, metrics.snapshot())
    page, _ = merged.render("text/plain")
    families = [*text_string_to_metric_families(page.decode())]
    assert {family.name for family in families} == {"mxgate_things"}
    (sample,) = (sample for family in families for sample in family.samples if sample.name.endswith("_total"))
    assert sample.value == 1
    assert len(sample.labels) == 1


SEQUENCES = "\x1b]0;owned\x07\x1b[31m\x9b2J\r\x08\x7f\u202e\u2066"


@pytest.mark.parametrize(
    "words",
    [
        ("explain", "{mail}"),
        ("explain", "--json", "{mail}"),
        ("dkim", "verify", "{mail}"),
        ("arc", "verify", "{mail}"),
        ("explain", "{mail}", "--helo", SEQUENCES),
        ("spf", "check", SEQUENCES),
        (SEQUENCES,),
        ("check-config", "--set", f"server.{SEQUENCES}=1"),
        ("check-config", "--set", f"server.hostname={SEQUENCES}"),
        ("plan", "--config", "{config}"),
        ("config", "show", "--config", "{config}"),
        ("check-config", "--config", "{config}"),
    ],
    ids=lambda words: re.sub(r"[^a-z {}-]+", "?", " ".join(words)),
)
def test_what_a_command_prints_of_strangers_drives_no_terminal(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    mail = tmp_path / "mail.eml"
    mail.write_bytes(
        f"From: {SEQUENCES}<a@{SEQUENCES}example.net>\r\nSubject: {SEQUENCES}\r\n"
        f"DKIM-Signature: v=1; a={SEQUENCES}; d={SEQUENCES}; s=x; h=from; bh=AA==; b=AA==\r\n"
        f"ARC-Seal: i=1; a=rsa-sha256; d={SEQUENCES}; s=x; cv=none; b=AA==\r\n"
        f"Authentication-Results: {SEQUENCES}; spf=pass\r\n{SEQUENCES}: x\r\n\r\n{SEQUENCES}\r\n".encode()
    )
    config = tmp_path / "mxgate.toml"
    config.write_text(
        'server.hostname = "mx.example.org"\nrelay.domains = ["example.org"]\n'
        'relay.recipients_file = "/nowhere/\\u001b[2J"\n'
        '[[relay.routes]]\ndownstream = ["192.0.2.5:25"]\nname = "\\u001b[31m"\n'
        '["policy"."\\u001b[2J"]\nmode = "\\u009b2J"\n'
    )
    filled = [word.replace("{mail}", str(mail)).replace("{config}", str(config)) for word in words]
    # no name server of this machine is asked
    done = CliRunner().invoke(cli, filled, env={"MXGATE__DNS__NAMESERVERS": '["127.0.0.1:9"]'})
    said = done.output
    assert said
    assert [char for char in said if not (char.isprintable() or char == "\n")] == []

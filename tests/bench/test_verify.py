"""`bench verify`: both sides check what they are given, and what must be reached is printed."""

import pytest

from bench import verify


def test_both_sides_pass_the_message_and_refuse_a_changed_one() -> None:
    world = verify.World()
    message = world.message(2048)
    assert 1500 < len(message) < 2500
    for check in (world.ours, world.theirs):
        assert check(message)
        assert not check(message + b"more\r\n")


def test_report_says_what_must_be_reached(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [verify.Row(label, (200.0, 210.0), (1000.0, 1000.0)) for label in ("2 KiB", "1 MiB")]
    linear = verify.Linear(
        dict.fromkeys(verify.LINEAR_MIB, 3000.0), 20_000.0, dict.fromkeys(verify.LINEAR_MIB, 1.0)
    )
    verify.print_report(rows, linear, 2)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:6].strip() for line in lines[-5:]] == ["ok", "MISSED", "ok", "ok", "MISSED"]

"""The command `mxgate`: thin; each command loads the configuration and asks one module to do the work.

Exit codes: 0 good, 1 a finding or a failure, 64 wrong usage, 78 the configuration cannot be used (sysexits.h).
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, NoReturn, ParamSpec

import click

from gateway import __version__
from gateway.config import (
    Config,
    ConfigError,
    Mode,
    Problem,
    check_files,
    check_state_file,
    dotted,
    load,
    print_problems,
)
from gateway.plugins import DEFAULT_PLAN, PlannedPolicy, PluginError, installed
from gateway.plugins import plan as make_plan

EX_USAGE = 64
EX_CONFIG = 78
DEFAULT_CONFIG = "/etc/mxgate/mxgate.toml"
# A trusted network of more public addresses than a /16 or a /48 holds is more than one organisation's.
_WIDEST = {4: 16, 6: 48}
# RFC 1918 3, RFC 4193 3.1: no private network is wider.
_WIDEST_PRIVATE = {4: 8, 6: 7}

P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class Given:
    """What the command line says about the configuration."""

    config: str | None = None
    overrides: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        name = self.config or os.environ.get("MXGATE_CONFIG") or DEFAULT_CONFIG
        return Path("/dev/stdin" if name == "-" else name)

    def load(self) -> Config:
        return load(self.path, environ=os.environ, overrides=self.overrides)


class _Command(click.Group):
    """Maps what ends a command to our exit codes, for the entry point and for tests alike."""

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        extra["standalone_mode"] = False
        try:
            code = super().main(*args, **extra) or 0
        except click.UsageError as exc:
            exc.show()
            code = EX_USAGE
        except click.ClickException as exc:
            exc.show()
            code = 1
        except click.Abort:
            code = 130  # 128 + SIGINT, as a shell counts
        except ConfigError as exc:
            print_problems(exc, sys.stderr)
            code = EX_CONFIG
        except BrokenPipeError:
            # The reader went away (`| head`); Python must not complain once more when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 1
        sys.exit(code)


_config_option = click.option(
    "--config",
    metavar="FILE",
    help=f"Configuration; else MXGATE_CONFIG, else {DEFAULT_CONFIG}. '-': standard input.",
)
_set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Override a key, as TOML has it. Repeatable.",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _configured(command: Callable[Concatenate[Given, P], int]) -> Callable[P, int]:
    """Give a command `--config` and `--set`, and what was given for the group where it has none."""

    @_config_option
    @_set_option
    @click.pass_obj
    @wraps(command)
    def wrapped(
        group: Given, /, config: str | None, overrides: tuple[str, ...], *args: P.args, **kwargs: P.kwargs
    ) -> int:
        given = Given(config or group.config, (*group.overrides, *overrides))
        return command(given, *args, **kwargs)

    return wrapped  # type: ignore[return-value]  # click fills in what P lacks


@click.group(cls=_Command, context_settings={"help_option_names": ["-h", "--help"]})
@_config_option
@_set_option
@click.pass_context
def cli(context: click.Context, config: str | None, overrides: tuple[str, ...]) -> None:
    """Inbound SMTP security gateway: checks mail on its way to your MTA."""
    context.obj = Given(config, overrides)


@cli.command()
@_configured
def serve(given: Given) -> int:
    """Run the gateway in the foreground.

    SIGTERM drains and ends; SIGHUP loads the configuration again.
    """
    config = given.load()
    check_files(config)
    from gateway import supervisor  # noqa: PLC0415 - the engine and aiohttp; no other command needs them

    return supervisor.run(config, config_path=str(given.path), overrides=given.overrides)


@cli.command("check-config")
@_json_option
@_configured
def check_config(given: Given, as_json: bool) -> int:  # noqa: FBT001 - click passes by name
    """Say what the configuration does, or everything that is wrong with it.

    Looks at the files that it names and loads its policies; opens no connection.
    """
    try:
        config = given.load()
        planned = _checked(config)
    except ConfigError as exc:
        if not as_json:
            raise
        click.echo(
            json.dumps({"ok": False, "problems": [_as_json(problem) for problem in exc.problems]}, indent=2)
        )
        return EX_CONFIG
    warnings = [*_warnings(config)]
    found = {
        "listen": [str(address) for address in config.server.listen],
        "listen_tls": [str(address) for address in config.server.listen_tls],
        "domains": [*config.relay.domains],
        "routes": [
            f"{', '.join(route.domains) or 'quarantine'} to "
            + ", else ".join(", ".join(map(str, group)) for group in route.downstream)
            for route in config.relay.routes
        ],
        "policies": [each.name for each in planned],
    }
    if as_json:
        shown = [_as_json(warning) for warning in warnings]
        click.echo(json.dumps({"ok": True, **found, "warnings": shown}, indent=2))
        return 0
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo("ok: " + "; ".join(f"{key} {', '.join(values)}" for key, values in found.items() if values))
    return 0


def _checked(config: Config) -> tuple[PlannedPolicy, ...]:
    """The plan, once the files and the policies were both looked at: one go shows the problems of both."""
    problems: list[Problem] = []
    planned: tuple[PlannedPolicy, ...] = ()
    try:
        check_files(config)
    except ConfigError as exc:
        problems += exc.problems
    try:
        planned = make_plan(config)
        if any(each.policy.needs_store for each in planned):
            check_state_file(config)
    except ConfigError as exc:
        problems += exc.problems
    if problems:
        raise ConfigError(problems)
    return planned


def _warnings(config: Config) -> Iterator[Problem]:
    known = installed()
    for name, section in config.policy.items():
        if name in known or section.file is not None:
            continue
        if name not in DEFAULT_PLAN and section.mode is Mode.OFF:
            yield config.problem(("policy", name), "no policy of this name is known; it is off")
        if name in DEFAULT_PLAN and section.mode is not Mode.OFF:
            yield config.problem(("policy", name), "this policy is not installed; its section has no effect")
    for index, network in enumerate(config.relay.trusted_networks):
        widest = _WIDEST_PRIVATE if network.is_private else _WIDEST
        if network.prefixlen < widest[network.version]:
            yield config.problem(
                ("relay", "trusted_networks", index),
                f"everybody in {network} may relay anywhere through this gateway",
            )
    if not config.server.tls.cert_file:
        yield config.problem(("server", "tls", "cert_file"), "no certificate: mail arrives unencrypted")
    if "." not in config.server.hostname:
        yield config.problem(
            ("server", "hostname"),
            f"{config.server.hostname} is not fully qualified; clients will see it in the banner",
        )


@cli.group()
def config() -> None:
    """Show the configuration, or what can be in it."""


@config.command()
@click.option("--origin", "with_origin", is_flag=True, help="Say where each value comes from.")
@_json_option
@_configured
def show(given: Given, with_origin: bool, as_json: bool) -> int:  # noqa: FBT001 - click passes by name
    """Print every key in force. Secrets are hidden."""
    from gateway.config import render  # noqa: PLC0415 - serve must not pay for it

    shown = [*render.show(given.load())]
    if as_json:
        values = {
            dotted(key.path): {"value": key.value, "origin": str(key.origin)} if with_origin else key.value
            for key in shown
        }
        click.echo(json.dumps(values, indent=2))
        return 0
    for key in shown:
        line = f"{dotted(key.path)} = {render.toml_value(key.value)}"
        click.echo(f"{line}  # {key.origin}" if with_origin else line)
    return 0


@config.command()
def schema() -> int:
    """Print the JSON schema of the configuration file."""
    from gateway.config import render  # noqa: PLC0415 - serve must not pay for it

    click.echo(json.dumps(render.json_schema(), indent=2))
    return 0


@config.command()
def docs() -> int:
    """Print the reference of all keys as Markdown."""
    from gateway.config import render  # noqa: PLC0415 - serve must not pay for it

    click.echo(render.docs_markdown(), nl=False)
    return 0


@cli.command()
@_json_option
@_configured
def plan(given: Given, as_json: bool) -> int:  # noqa: FBT001 - click passes by name
    """Say which policies run when, in which order, and with which keys.

    Policies between two `>` run at the same time. `recipient` is the downstream's own answer.
    """
    from gateway.show_plan import plan_lines, shown_plan  # noqa: PLC0415 - serve must not pay for it

    shown = shown_plan(make_plan(given.load()))
    click.echo(json.dumps(shown, indent=2) if as_json else "\n".join(plan_lines(shown)))
    return 0


@cli.command()
@_json_option
def version(as_json: bool) -> int:  # noqa: FBT001 - click passes by name
    """Print the version, and the policies that are installed."""
    try:
        policies = {name: str(source) for name, source in sorted(installed().items())}
    except PluginError as exc:
        raise click.ClickException(str(exc)) from exc
    python = platform.python_version()
    if as_json:
        click.echo(json.dumps({"version": __version__, "python": python, "policies": policies}, indent=2))
        return 0
    click.echo(f"mxgate {__version__} (Python {python})")
    for name, source in policies.items():
        click.echo(f"  {name}: {source}")
    return 0


@cli.command()
@click.option("--tx", metavar="ID", help="Of a transaction, or of a session for all of its transactions.")
@click.option("--rcpt", metavar="ADDRESS", help="One of its recipients, or their domain.")
@click.option("--sender", metavar="ADDRESS", help="The reverse-path or its domain; '<>' for the null one.")
@click.option("--client", metavar="ADDRESS", help="The client's address, or a network.")
@click.option("--action", metavar="WORD", help="accepted, quarantined, deferred, rejected or aborted.")
@click.option("--policy", metavar="NAME", help="What it decided, would have decided, or failed at.")
@click.option("--limit", metavar="N", help="At most so many, 1 to 1000.  [default: 20]")
@_json_option
@_configured
def decisions(given: Given, /, as_json: bool, **asked: str | None) -> int:  # noqa: FBT001 - click passes by name
    """Say why mail was refused or accepted, the newest first.

    Asks the gateway that runs with this configuration, by its admin port. It keeps the newest decisions in memory.
    """
    from gateway.adapters.admin_client import AdminError, ask_admin  # noqa: PLC0415 - serve must not pay for it
    from gateway.decision import FilterError, as_text, parse_query  # noqa: PLC0415 - as above

    query = {name: value for name, value in asked.items() if value is not None}
    try:
        parse_query(query)
    except FilterError as exc:
        raise click.UsageError(str(exc)) from exc
    admin = given.load().admin
    try:
        token = admin.token_file.read_bytes().strip() if admin.token_file else b""
    except OSError:
        token = b""  # loopback needs none, and elsewhere the port will say so
    try:
        status, answer = ask_admin(
            admin.listen.host, admin.listen.port, "/api/v1/decisions", query, token=token
        )
    except AdminError as exc:
        raise click.ClickException(str(exc)) from exc
    if status == 401:
        raise click.ClickException(f"the admin port {admin.listen} wants the token of admin.token_file")
    found = answer.get("decisions")
    if status != 200 or not isinstance(found, list):
        raise click.ClickException(f"the admin port {admin.listen} answered {status} {answer.get('error')!a}")
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    else:
        encoding = sys.stdout.encoding  # not every terminal's is UTF-8
        for record in found:
            if isinstance(record, dict):
                text = "\n".join(as_text(record))
                click.echo(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    return _told_of(answer, found, is_one_wanted="tx" in query)


def _told_of(answer: Mapping[str, object], found: list[object], *, is_one_wanted: bool) -> int:
    """Say on standard error what is missing in an answer of /api/v1/decisions; the exit code."""
    errors = answer.get("errors")
    for error in errors if isinstance(errors, list) else ():
        click.echo(f"warning: a worker's decisions are missing: {json.dumps(error)}", err=True)
    if answer.get("truncated"):
        click.echo("there are more; --limit N shows more of them, other options fewer", err=True)
    if not found:
        click.echo("no decision of this kind is kept (any more); the log has a line of each", err=True)
    return 1 if errors or (is_one_wanted and not found) else 0


@cli.command()
@click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("mxgate-demo"),
    show_default=True,
    help="Where mail and state of the demo go.",
)
def demo(directory: Path) -> int:
    """Run the gateway with a mailbox behind it, on this machine only."""
    from gateway import demo as first_hour  # noqa: PLC0415 - brings aiosmtpd; no other command needs it

    return first_hour.run(directory)


def main() -> NoReturn:
    """The entry point."""
    cli.main(prog_name="mxgate")


def _as_json(problem: Problem) -> dict[str, object]:
    return {
        "path": problem.path,
        "message": problem.message,
        "source": problem.origin.source,
        "line": problem.origin.line or None,
        "column": problem.origin.column or None,
    }

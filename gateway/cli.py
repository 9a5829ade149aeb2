"""The command `mxgate`: thin; each command loads the configuration and asks one module to do the work.

Exit codes: 0 good, 1 a finding or a failure, 64 wrong usage, 78 the configuration cannot be used (sysexits.h).
"""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, NoReturn, ParamSpec

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
from gateway.errors import GatewayError
from gateway.plugins import DEFAULT_PLAN, PlannedPolicy, PluginError, configurable, installed
from gateway.plugins import plan as make_plan
from gateway.smtp.address import AddressError, Domain

if TYPE_CHECKING:
    from gateway.explain.ask import Check
    from gateway.open_store import CommandStore
    from gateway.policy import Policy

EX_USAGE = 64
EX_CONFIG = 78
DEFAULT_CONFIG = "/etc/mxgate/mxgate.toml"
COMMANDS_GROUP = "gateway.commands"
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

    @property
    def is_there(self) -> bool:
        """Whether somebody named a configuration, or there is one where one is looked for."""
        return bool(self.config or os.environ.get("MXGATE_CONFIG")) or self.path.exists()

    def load(self) -> Config:
        return load(self.path, environ=os.environ, overrides=self.overrides)

    def load_or_default(self, domains: Iterable[str] = ()) -> Config:
        """The configuration; where there is none, the default plan for mail to these domains."""
        if self.is_there:
            return self.load()
        try:
            name = Domain(socket.gethostname())
        except AddressError:
            name = Domain("localhost")
        given = (
            f'server.hostname="{name}"',
            f"relay.domains={json.dumps(sorted({*domains} or {name}))}",
            'relay.routes=[{downstream=["127.0.0.1:25"]}]',
        )
        return load(None, environ=os.environ, overrides=(*given, *self.overrides))

    def check(self, zone: Path | None) -> Check:
        """For a command that makes one check; `zone` is a zone file that is all of DNS."""
        from gateway.explain.ask import Check, read_zone  # noqa: PLC0415 - only these commands need the engine

        return Check(self.load_or_default(), None if zone is None else read_zone(zone))

    def store(self, policy: str) -> CommandStore:
        """For a command that looks into what a policy remembers."""
        from gateway.open_store import CommandStore  # noqa: PLC0415 - as above

        return CommandStore(self.load(), policy)


class _Command(click.Group):
    """Maps what ends a command to our exit codes, for the entry point and for tests alike.

    Policies bring commands of their own by entry points of the group `gateway.commands`. One is imported when it is
    called, not to list it; the engine's own names are not theirs to take.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *self._theirs()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        if own is not None or (entry_point := self._theirs().get(cmd_name)) is None:
            return own
        try:
            command = entry_point.load()
        except (Exception, SystemExit) as exc:
            raise click.ClickException(
                f"{cmd_name} of {_origin(entry_point)} cannot be loaded: {exc!r}"
            ) from exc
        if not isinstance(command, click.Command):
            raise click.ClickException(f"{cmd_name} of {_origin(entry_point)} is no command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        own = {name: command for name, command in self.commands.items() if not command.hidden}
        width = formatter.width - 6 - max(map(len, own))
        with formatter.section("Commands"):
            formatter.write_dl([(name, own[name].get_short_help_str(width)) for name in sorted(own)])
        if theirs := self._theirs():
            with formatter.section("Commands of policies"):
                formatter.write_dl([(name, f"from {_origin(theirs[name])}") for name in theirs])

    def _theirs(self) -> dict[str, EntryPoint]:
        found = sorted(entry_points(group=COMMANDS_GROUP), key=lambda each: each.name)
        return {each.name: each for each in found if each.name not in self.commands}

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
        except GatewayError as exc:
            click.echo(f"Error: {exc}", err=True)
            code = 1
        except BrokenPipeError:
            # The reader went away (`| head`); Python must not complain once more when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 1
        sys.exit(code)


def _origin(entry_point: EntryPoint) -> str:
    return f"{entry_point.dist.name} {entry_point.dist.version}" if entry_point.dist else "?"


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
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
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
            f"{', '.join(route.domains) or ('submission' if name == config.submission.route else 'quarantine')} to "
            + ", else ".join(", ".join(map(str, group)) for group in route.downstream)
            for name, route in config.relay.named_routes
        ],
        "policies": [each.name for each in planned],
        "submission": [str(each) for each in (*config.submission.listen, *config.submission.listen_tls)],
        "submission policies": [each.name for each in make_plan_of_submission(config)],
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
        if config.submission.is_on or any(each.policy.needs_store for each in planned):
            check_state_file(config)
    except ConfigError as exc:
        problems += exc.problems
    try:
        make_plan_of_submission(config)
    except ConfigError as exc:
        problems += exc.problems
    if problems:
        raise ConfigError(problems)
    return planned


def make_plan_of_submission(config: Config) -> tuple[PlannedPolicy, ...]:
    """Its plan, empty where there is none. Raises ConfigError."""
    return make_plan(config.for_submission()) if config.submission.is_on else ()


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
    """Print the JSON schema of the configuration file, with the settings of every installed policy."""
    from gateway.config import render  # noqa: PLC0415 - serve must not pay for it

    click.echo(json.dumps(render.json_schema(_configurable()), indent=2))
    return 0


@config.command()
def docs() -> int:
    """Print the reference of all keys as Markdown, with the settings of every installed policy."""
    from gateway.config import render  # noqa: PLC0415 - serve must not pay for it

    click.echo(render.docs_markdown(_configurable()), nl=False)
    return 0


def _configurable() -> dict[str, type[Policy[Any]]]:
    """The installed policies; of those that cannot be loaded, why."""
    policies, errors = configurable()
    for error in errors:
        click.echo(f"left out: {error}", err=True)
    return policies


@cli.command()
@_json_option
@_configured
def plan(given: Given, as_json: bool) -> int:  # noqa: FBT001 - click passes by name
    """Say which policies run when, in which order, and with which keys.

    Policies between two `>` run at the same time. `recipient` is the downstream's own answer.
    """
    from gateway.show_plan import plan_lines, shown_plan  # noqa: PLC0415 - serve must not pay for it

    config = given.load()
    shown = shown_plan(make_plan(config))
    submission = shown_plan(own) if (own := make_plan_of_submission(config)) else None
    if as_json:
        click.echo(json.dumps({**shown, "submission": submission} if submission else shown, indent=2))
        return 0
    click.echo("\n".join(plan_lines(shown)))
    if submission:
        click.echo("\nsubmission:\n" + "\n".join(plan_lines(submission)))
    return 0


@cli.group()
def plugin() -> None:
    """Write, find and try policies of one's own; docs/write-a-policy.md."""


@plugin.command("new")
@click.argument("name")
@click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    help="Where.  [default: here]",
)
def plugin_new(name: str, directory: Path) -> int:
    """Make the package mxgate-NAME with a policy, settings, tests and documentation."""
    from gateway.authoring.new import new_package  # noqa: PLC0415 - serve must not pay for it

    for path in new_package(name, directory):
        click.echo(path)
    return 0


@plugin.command("list")
@_json_option
@_configured
def plugin_list(given: Given, as_json: bool) -> int:  # noqa: FBT001 - click passes by name
    """Say which policies are installed, from where, which of them run, at which hooks, and in which order."""
    from gateway.authoring.listing import listed, listing_lines  # noqa: PLC0415 - serve must not pay for it

    found = listed(make_plan(given.load_or_default()))
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        _echo_lines(listing_lines(found))
    return 1 if any(each["error"] for each in found) else 0


@plugin.command("api")
def plugin_api() -> int:
    """Print every public name, its signature and what it means, as Markdown."""
    from gateway.authoring.reference import reference  # noqa: PLC0415 - serve must not pay for it

    click.echo(reference(), nl=False)
    return 0


@plugin.command("test")
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--settings", type=_FILE, help="A TOML file with the settings to try it with.")
@_json_option
def plugin_test(path: Path, settings: Path | None, as_json: bool) -> int:  # noqa: FBT001 - click passes by name
    """Run the contract suite on the policies of PATH: a file, a source tree or a wheel."""
    from gateway.authoring.trial import read_settings, try_policies  # noqa: PLC0415 - serve must not pay for it

    tried = [*try_policies(path, {} if settings is None else read_settings(settings))]
    if as_json:
        shown = [{"policy": each.policy, "test": each.test, "failure": each.failure} for each in tried]
        click.echo(json.dumps(shown, indent=2))
    else:
        _echo_lines(each.line for each in tried)
    return 1 if any(each.failure for each in tried) else 0


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
@click.option(
    "--tx", "--id", metavar="ID", help="Of a transaction, or of a session for all of its transactions."
)
@click.option("--rcpt", metavar="ADDRESS", help="One of its recipients, or their domain.")
@click.option(
    "--sender",
    "--from",
    "sender",
    metavar="ADDRESS",
    help="The reverse-path or its domain; '<>' for the null one.",
)
@click.option("--domain", metavar="DOMAIN", help="The sender's or a recipient's, or one above it.")
@click.option(
    "--client", "--network", "client", metavar="ADDRESS", help="The client's address, or a network."
)
@click.option("--action", metavar="WORD", help="accepted, quarantined, deferred, rejected or aborted.")
@click.option("--reason", metavar="TOKEN", help="The reason of the whole, of a recipient, or of a policy.")
@click.option("--policy", metavar="NAME", help="What it decided, would have decided, or failed at.")
@click.option(
    "--since", metavar="TIME", help="2026-11-22T05:33:44Z (UTC), or how long ago: 90s, 15m, 2h, 1d."
)
@click.option("--limit", metavar="N", help="At most so many, 1 to 1000.  [default: 20]")
@click.option(
    "--follow", "-f", is_flag=True, help="Go on with one line for each that comes, until interrupted."
)
@_json_option
@_configured
def decisions(given: Given, /, as_json: bool, follow: bool, **asked: str | None) -> int:  # noqa: FBT001 - click passes by name
    """Say why mail was refused or accepted, and whether it is us; the newest first.

    Asks the gateway that runs with this configuration, by its admin port. It keeps the newest decisions in memory.
    With --follow the oldest comes first, and --json is one record a line.
    """
    from gateway.adapters.admin_client import AdminError, ask_admin  # noqa: PLC0415 - serve must not pay for it
    from gateway.decision import FilterError, as_line, as_text, parse_query  # noqa: PLC0415 - as above
    from gateway.decision.follow import follow_decisions  # noqa: PLC0415 - as above

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

    def ask(query: Mapping[str, str]) -> Mapping[str, object]:
        try:
            status, answer = ask_admin(
                admin.listen.host, admin.listen.port, "/api/v1/decisions", query, token=token
            )
        except AdminError as exc:
            raise click.ClickException(str(exc)) from exc
        if status == 401:
            raise click.ClickException(f"the admin port {admin.listen} wants the token of admin.token_file")
        if status != 200 or not isinstance(answer.get("decisions"), list):
            raise click.ClickException(
                f"the admin port {admin.listen} answered {status} {answer.get('error')!a}"
            )
        return answer

    if follow:
        with suppress(KeyboardInterrupt):  # the usual end
            for record in follow_decisions(ask, query):
                _echo_lines([json.dumps(record) if as_json else as_line(record)])
        return 0
    answer = ask(query)
    found = answer["decisions"]
    assert isinstance(found, list)
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    else:
        for record in found:
            if isinstance(record, dict):
                _echo_lines([*as_text(record), ""])
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
@click.argument("file", type=click.File("rb"), required=False)
@click.option("--ip", metavar="ADDRESS", help="The client's.")
@click.option("--helo", metavar="NAME", help="What it said in EHLO.  [default: its address literal]")
@click.option("--mail-from", metavar="ADDRESS", help="The reverse-path; '<>' for the null one.")
@click.option("--rcpt", "rcpts", metavar="ADDRESS", multiple=True, help="A recipient. Repeatable.")
@click.option("--zone", type=_FILE, help="A zone file (RFC 1035 5) that is all of DNS.")
@click.option("--record", type=click.File("rb"), metavar="ID.json", help="Judge this decision again instead.")
@_json_option
@_configured
def explain(given: Given, /, *, as_json: bool, **asked: Any) -> int:
    """Say what the gateway would make of the message in FILE, and why. '-': standard input.

    The message goes through all policies of the configuration, or of the default plan where there is none. Nothing is
    delivered and nothing remembered. A --record is a decision as `mxgate decisions --tx ID --json` prints it: it is
    judged again with the answers of DNS that it holds; exit code 1: it came to something else, or was not all there.
    """
    # serve must not pay for them
    from gateway.explain.command import explain_message, replay_record  # noqa: PLC0415
    from gateway.explain.given import GivenError  # noqa: PLC0415

    record = asked.pop("record")
    if record is not None:
        if any(asked.values()):
            raise click.UsageError("--record has the message, the client and DNS; give it alone")
        shown = replay_record(record, given.load_or_default)
    else:
        missing = [name for name in ("file", "ip", "mail_from", "rcpts") if asked[name] in (None, ())]
        if missing:
            raise click.UsageError("FILE, --ip, --mail-from and --rcpt are needed, or --record")
        if given.config == "-" and asked["file"] is sys.stdin.buffer:
            raise click.UsageError("the message and the configuration cannot both be standard input")
        try:
            shown = explain_message(given.load_or_default, **asked)
        except GivenError as exc:
            raise click.UsageError(str(exc)) from exc
    if not given.is_there:
        click.echo("no configuration: the default plan, for mail to the recipients' domains", err=True)
    if as_json:
        click.echo(json.dumps(shown.as_json, indent=2))
    else:
        _echo_lines(shown.lines)
    return 0 if shown.is_good else 1


@cli.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--config", "configs", type=_FILE, multiple=True, help="One, or two to compare.")
@click.option("--ip", metavar="ADDRESS", default="", help="The client's, where a message does not say.")
@click.option("--helo", metavar="NAME", default="", help="What it said in EHLO.")
@click.option("--mail-from", metavar="ADDRESS", help="The reverse-path; '' for the null one.")
@click.option("--rcpt", "rcpts", metavar="ADDRESS", multiple=True, help="A recipient. Repeatable.")
@click.option("--zone", type=_FILE, help="A zone file (RFC 1035 5) that is all of DNS.")
@_json_option
@click.pass_obj
def replay(group: Given, /, *, path: Path, configs: tuple[Path, ...], as_json: bool, **given: Any) -> int:
    """Say what a configuration makes of stored mail, or where two of them differ.

    PATH is a directory (a Maildir, or any other), an mbox or one file; files that end in .json are decisions as `mxgate
    decisions --tx ID --json` prints them. Nothing is delivered and nothing remembered. Exit code 1: something differs.
    """
    # serve must not pay for them
    from gateway.explain.compare import Outcome, replay_all  # noqa: PLC0415
    from gateway.explain.stored import Assumed  # noqa: PLC0415

    if len(configs) > 2:
        raise click.UsageError("two configurations can be compared, and no more")
    loaded = [Given(str(each), group.overrides).load() for each in configs] or [group.load_or_default()]
    zone = given.pop("zone")
    told: list[Outcome] = []

    def tell(outcome: Outcome) -> None:
        told.append(outcome)
        if not as_json:
            for line in outcome.lines():
                _echo_lines([line])

    different = replay_all(path, loaded, Assumed(**given), zone, tell)
    skipped = sum(bool(each.trouble) for each in told)
    if as_json:
        click.echo(json.dumps([each.as_json() for each in told], indent=2))
    else:
        click.echo(f"{len(told)} replayed: {different} different, {skipped} skipped", err=True)
    return 1 if different else 0


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


def _echo_lines(lines: Iterable[str]) -> None:
    encoding = sys.stdout.encoding  # not every terminal's is UTF-8
    click.echo("\n".join(lines).encode(encoding, "backslashreplace").decode(encoding))


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

"""Writes the manual pages mxgate(1) and mxgate.toml(5), and the completions of the shells, from the program itself.

The commands' own help and the reference of the configuration are the one source. The completions are click's:
each asks the installed program, so that commands of policies complete too. `./dev manual` runs this; a test compares.
The wheel installs all of it below share/, where man-db and the shells look.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from gateway import __version__
from gateway.cli import COMMANDS_GROUP, DEFAULT_CONFIG, cli
from gateway.config.render import docs_markdown

HERE = Path(__file__).parent
PROGRAM = "mxgate"
# shell -> file; pyproject.toml says where each is installed
COMPLETIONS = {"bash": "mxgate.bash", "zsh": "_mxgate", "fish": "mxgate.fish"}
_SIGNALS = {
    "SIGTERM, SIGINT": "Drain and end with 0; a second one ends at once, with 1.",
    "SIGHUP": "Load the configuration again. One that is wrong leaves the old in force.",
}
_EXITS = {
    "0": "Good.",
    "1": "A finding, or a failure.",
    "64": "The command line is wrong.",
    "78": "The configuration cannot be used.",
}
_ENVIRONMENT = {
    "MXGATE_CONFIG": "The configuration, where --config is not given.",
    "MXGATE__SECTION__KEY": "Overrides a key of the configuration.",
}
_FILES = {
    DEFAULT_CONFIG: "The configuration; mxgate.toml(5).",
    "/var/lib/mxgate": "What policies remember, unless the configuration says otherwise.",
}


def main() -> None:
    """Write all files."""
    for name, text in generated().items():
        file = HERE / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, "utf-8")


def generated() -> dict[str, str]:
    """The files by their name below deploy/, as they have to be."""
    pages = {
        "man/mxgate.1": "\n".join(_commands_page()),
        "man/mxgate.toml.5": "\n".join(_configuration_page()),
    }
    return {name: text + "\n" for name, text in pages.items()} | {
        f"completion/{name}": _completion(shell) for shell, name in COMPLETIONS.items()
    }


def _completion(shell: str) -> str:
    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(cli, {}, PROGRAM, f"_{PROGRAM.upper()}_COMPLETE").source()
    return "\n".join(line.rstrip() for line in script.strip().splitlines()) + "\n"


def _commands_page() -> Iterator[str]:
    yield from _head("1", "an inbound SMTP security gateway")
    yield ".SH SYNOPSIS"
    yield f".B {PROGRAM}\n[\\-\\-config FILE] [\\-\\-set SECTION.KEY=VALUE] COMMAND [ARGUMENT ...]"
    yield ".SH DESCRIPTION"
    yield _prose(cli.help or "")
    yield ".SH OPTIONS"
    context = click.Context(cli, info_name=PROGRAM, **cli.context_settings)
    yield from _options(cli, context)
    yield ".SH COMMANDS"
    for name in cli.list_commands(context):
        yield from _command(name, context)
    for heading, table in (
        ("SIGNALS", _SIGNALS),
        ("EXIT STATUS", _EXITS),
        ("ENVIRONMENT", _ENVIRONMENT),
        ("FILES", _FILES),
    ):
        yield f".SH {heading}"
        yield from _tagged(table)
    yield ".SH SEE ALSO"
    yield ".BR mxgate.toml (5)"


def _command(name: str, above: click.Context) -> Iterator[str]:
    assert isinstance(above.command, click.Group)
    command = above.command.get_command(above, name)
    assert command is not None, f"{name} of {COMMANDS_GROUP}"
    if command.hidden:
        return
    context = click.Context(command, info_name=name, parent=above, **command.context_settings)
    if isinstance(command, click.Group):
        for each in command.list_commands(context):
            yield from _command(each, context)
        return
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    yield f'.SS "{_escaped(usage)}"'
    yield _prose(command.help or "")
    yield from _options(command, context)


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    records = [each.get_help_record(context) for each in command.get_params(context)]
    own = [each.get_help_record(context) for each in cli.get_params(context)] if context.parent else []
    # what all commands take is said once
    yield from _tagged(dict(record for record in records if record and record[1] and record not in own))


def _configuration_page() -> Iterator[str]:
    yield from _head("5", f"configuration of {PROGRAM}(1)", name="mxgate.toml")
    introduction, *sections = re.split(r"^## ", docs_markdown(), flags=re.MULTILINE)
    yield ".SH DESCRIPTION"
    yield _prose(re.sub(r"\A#[^\n]*\n|<!--.*?-->", "", introduction, flags=re.DOTALL))
    for section in sections:
        heading, _, text = section.partition("\n")
        said, *rows = re.split(r"^\| ", text, flags=re.MULTILINE)
        yield f'.SH "{_escaped(heading.strip("` "))}"'
        yield _prose(said)
        keys = {}
        # the first row is the table's head
        for row in rows[1:]:
            key, default, allowed, meaning, _ = re.split(r" \|(?: |$)", row.strip())
            also = f" ({allowed.strip()})" if allowed.strip() else ""
            value = f" = {default.strip()}" if default.strip() else ""
            keys[f"{key}{value}"] = f"{meaning.strip()}{also}".replace("\\|", "|")
        yield from _tagged(keys)
    yield ".SH SEE ALSO"
    yield ".BR mxgate (1)"


def _head(section: str, what: str, *, name: str = PROGRAM) -> Iterator[str]:
    yield f'.\\" Generated by ./dev manual; do not edit.\n.TH {name.upper()} {section} "" "{PROGRAM} {__version__}"'
    yield f".SH NAME\n{name} \\- {what}"


def _tagged(table: dict[str, str]) -> Iterator[str]:
    for tag, text in table.items():
        yield f".TP\n.B {_escaped(tag.replace('`', ''))}"
        yield _escaped(_plain(text))


def _prose(text: str) -> str:
    """Paragraphs; code in backquotes is bold."""
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(text).strip())
    return "\n.PP\n".join(_escaped(_plain(each)) for each in paragraphs if each)


def _plain(text: str) -> str:
    """One line, without what Markdown and click want."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text.replace("\b", ""))
    return " ".join(text.split())


def _escaped(text: str) -> str:
    """Text as roff takes it: groff_char(7); a dot or a quote that begins a line would be a request."""
    text = text.replace("\\", "\\(rs").replace("-", "\\-").replace('"', "\\(dq")
    text = re.sub(r"`([^`]*)`", r"\\fB\1\\fR", text)
    text = re.sub(r"[^\x00-\x7f]", lambda found: f"\\[u{ord(found[0]):04X}]", text)
    return re.sub(r"^(?=[.'])", r"\\&", text, flags=re.MULTILINE)


if __name__ == "__main__":
    main()

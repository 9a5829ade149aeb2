"""Postfix as a before-queue proxy: the files of a private instance (SMTPD_PROXY_README of Postfix).

Everything it writes is below one directory; the installed Postfix is not touched.  What could cost it work that the
other systems do not do is off: name look-ups of clients, rate limits (anvil), a log daemon of its own (it logs to
syslog, where there is one).
"""

import grp
import os
import pwd
import shutil
from pathlib import Path

SERVICES = """\
127.0.0.1:{port} inet n - n - - smtpd
  -o smtpd_proxy_filter=127.0.0.1:{sink_port}
  -o smtpd_client_connection_count_limit=0
pickup unix n - n 60 1 pickup
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
proxymap unix - - n - - proxymap
relay unix - - n - - smtp
error unix - - n - - error
retry unix - - n - - error
anvil unix - - n - 1 anvil
"""
SETTINGS = """\
compatibility_level = 3.6
queue_directory = {directory}/queue
data_directory = {directory}/data
mail_owner = postfix
setgid_group = postdrop
myhostname = gw.example
mydestination =
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
mynetworks = 192.0.2.1/32
relay_domains = rcpt.example
local_recipient_maps =
alias_maps =
alias_database =
disable_dns_lookups = yes
smtpd_peername_lookup = no
smtpd_recipient_restrictions = reject_unauth_destination
smtpd_relay_restrictions = reject_unauth_destination
smtpd_client_connection_count_limit = 0
smtpd_client_connection_rate_limit = 0
smtpd_tls_security_level =
smtputf8_enable = no
message_size_limit = 52428800
mailbox_size_limit = 0
default_process_limit = 100
biff = no
"""
POSTFIX_DIRECTORIES = ("/usr/sbin", "/usr/local/sbin")


def find_postfix() -> str | None:
    """The `postfix` command, which is seldom in an ordinary user's path."""
    return shutil.which("postfix") or shutil.which("postfix", path=os.pathsep.join(POSTFIX_DIRECTORIES))


def why_not() -> str | None:
    """Why this machine cannot run it; None when it can."""
    if find_postfix() is None:
        return "postfix is not installed"
    if os.geteuid():
        return "postfix starts as root only"
    try:
        pwd.getpwnam("postfix"), grp.getgrnam("postdrop")
    except KeyError:
        return "the user postfix or the group postdrop is missing"
    return None


def write_instance(directory: Path, port: int, sink_port: int) -> list[str]:
    """Write its files below `directory`; the command that runs it in the foreground."""
    etc = directory / "etc"
    for path in (etc, directory / "queue" / "pid", directory / "data"):
        path.mkdir(parents=True)
    (etc / "main.cf").write_text(SETTINGS.format(directory=directory))
    (etc / "master.cf").write_text(SERVICES.format(port=port, sink_port=sink_port))
    shutil.chown(directory / "data", "postfix")
    postfix = find_postfix()
    assert postfix is not None
    return [postfix, "-c", str(etc), "start-fg"]

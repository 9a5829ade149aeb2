"""What the process may do: it gives up root once its sockets are bound, and leaves no core on the disk.

A core would hold mail, keys and passwords. RLIMIT_CORE does not keep the kernel from piping one to a program (core(5)),
so on Linux the process is also made undumpable, which keeps others of its user from tracing it.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys

from gateway.identity import identity_of
from gateway.listening import EXIT_CONFIG, StartError

# Of prctl, in section 2 of the manual
_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38


def forbid_core_dumps() -> None:
    """For this process and those that it forks."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_DUMPABLE, 0)


def become(user: str, group: str = "") -> None:
    """Be this user from now on, for good, with its supplementary groups. Nothing happens when it is this user already.

    Raises StartError.
    """
    try:
        identity = identity_of(user, group)
    except KeyError as exc:
        raise StartError(f"server.user: {exc.args[0]}", EXIT_CONFIG) from exc
    if os.geteuid() != 0:
        if (identity.uid, identity.gid) == (os.geteuid(), os.getegid()):
            return
        raise StartError(
            f"server.user: only root can become {identity.user}, and this is user {os.geteuid()}: start it as root, or "
            "leave server.user empty and let it bind its ports otherwise (docs/operate.md)",
            EXIT_CONFIG,
        )
    try:
        os.initgroups(identity.user, identity.gid)
        os.setresgid(identity.gid, identity.gid, identity.gid)
        os.setresuid(identity.uid, identity.uid, identity.uid)
    except OSError as exc:  # root without its capabilities, as in some containers
        raise StartError(f"server.user: cannot become {identity.user}: {exc.strerror}", EXIT_CONFIG) from exc
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if identity.uid and _can_come_back():
        raise StartError("server.user: root cannot be given up here", EXIT_CONFIG)
    # the kernel decides anew about dumps of a process that has become somebody else
    forbid_core_dumps()


def _can_come_back() -> bool:
    try:
        os.seteuid(0)
    except PermissionError:
        return False
    return True


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)

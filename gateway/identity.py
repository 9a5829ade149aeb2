"""Users and groups of this machine, by name or number."""

from __future__ import annotations

import grp
import pwd
from typing import NamedTuple


class Identity(NamedTuple):
    """A user and the group that it runs with."""

    user: str
    uid: int
    gid: int


def identity_of(user: str, group: str = "") -> Identity:
    """Who is named, by name or number; the group is the user's own unless given. Raises KeyError with what to say."""
    try:
        entry = pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
    except KeyError:
        raise KeyError(f"there is no user {user}") from None
    if not group:
        return Identity(entry.pw_name, entry.pw_uid, entry.pw_gid)
    try:
        found = grp.getgrgid(int(group)) if group.isdecimal() else grp.getgrnam(group)
    except KeyError:
        raise KeyError(f"there is no group {group}") from None
    return Identity(entry.pw_name, entry.pw_uid, found.gr_gid)

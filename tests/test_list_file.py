"""gateway.list_file: a list is read when it changes, and a wrong one changes nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gateway.list_file import ListError, ListFile
from gateway.testing import FakeServices


@pytest.fixture
def numbers(tmp_path: Path) -> tuple[Path, FakeServices, ListFile[int]]:
    path, services = tmp_path / "numbers", FakeServices()
    path.write_text("1\n  2 # two\n\n# none\n")
    read = ListFile(path, int, services)
    read.load()
    return path, services, read


Numbers = tuple[Path, FakeServices, ListFile[int]]


def written(path: Path, octets: bytes, stamp: int) -> None:
    path.write_bytes(octets)
    os.utime(path, ns=(stamp, stamp))


def test_comments_and_empty_lines_are_no_entries(numbers: Numbers) -> None:
    assert numbers[2].entries == {1, 2}


def test_a_change_is_seen_after_five_seconds(numbers: Numbers) -> None:
    path, services, read = numbers
    assert not read.refresh()
    written(path, b"3\n", 1)
    assert not read.refresh()
    services.clock.advance(5)
    assert read.refresh()
    assert read.entries == {3}
    services.clock.advance(5)
    assert not read.refresh()


def test_a_list_is_followed_through_links_that_are_changed_at_once(tmp_path: Path) -> None:
    """As Kubernetes mounts a ConfigMap; both versions of the file are of one size and one time."""
    services = FakeServices()
    for number in (1, 2):
        (tmp_path / f"..{number}").mkdir()
        written(tmp_path / f"..{number}" / "numbers", b"%d\n" % number, 1)
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "numbers").symlink_to("..data/numbers")
    read = ListFile(tmp_path / "numbers", int, services)
    read.load()
    assert read.entries == {1}
    (tmp_path / "..data_tmp").symlink_to("..2")
    (tmp_path / "..data_tmp").replace(tmp_path / "..data")
    services.clock.advance(5)
    assert read.refresh()
    assert read.entries == {2}


@pytest.mark.parametrize("octets", [b"3\nx\n", b"\xff\n", None])
def test_a_list_that_became_wrong_is_logged_and_left_alone(numbers: Numbers, octets: bytes | None) -> None:
    path, services, read = numbers
    if octets is None:
        path.unlink()
    else:
        written(path, octets, 1)
    services.clock.advance(5)
    assert not read.refresh()
    assert read.entries == {1, 2}
    (line,) = services.log.of("error")
    assert line.event == "list.reload_failed"
    assert str(path) in str(line.keys["error"])


@pytest.mark.parametrize(("octets", "where"), [(b"1\nx\n", "numbers:2: "), (b"\xff", "numbers: ")])
def test_a_wrong_list_cannot_be_loaded(numbers: Numbers, octets: bytes, where: str) -> None:
    written(numbers[0], octets, 1)
    with pytest.raises(ListError, match=where):
        numbers[2].load()


def test_without_a_path_there_is_nothing_to_read() -> None:
    read = ListFile(None, int, FakeServices())
    read.load()
    assert not read.refresh()
    assert read.entries == set()

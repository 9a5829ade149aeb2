"""changed_files: which changes count, and when."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gateway.changed_files import ChangedFiles


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "file"
    file.write_text("first")
    return file


@pytest.fixture
def watched(file: Path) -> ChangedFiles:
    watched = ChangedFiles()
    watched.watch([file])
    return watched


def test_nothing_has_changed(watched: ChangedFiles) -> None:
    assert [watched.have_changed() for _ in range(3)] == [False] * 3


def test_a_change_counts_when_it_has_stayed(watched: ChangedFiles, file: Path) -> None:
    file.write_text("second, longer")
    assert not watched.have_changed()
    file.write_text("second, and longer still")
    assert not watched.have_changed()
    assert watched.have_changed()


def test_a_change_is_over_when_the_file_is_read(watched: ChangedFiles, file: Path) -> None:
    file.write_text("second")
    watched.note()
    assert [watched.have_changed() for _ in range(3)] == [False] * 3


def test_what_changes_while_it_is_read_is_not_lost(watched: ChangedFiles, file: Path) -> None:
    watched.note()
    file.write_text("second")
    watched.watch([file])
    assert not watched.have_changed()
    assert watched.have_changed()


def test_a_file_that_goes_or_comes_has_changed(watched: ChangedFiles, file: Path) -> None:
    file.unlink()
    assert not watched.have_changed()
    assert watched.have_changed()
    watched.note()
    file.write_text("again")
    assert not watched.have_changed()
    assert watched.have_changed()


def test_a_file_that_looks_the_same_but_is_another_has_changed(watched: ChangedFiles, file: Path) -> None:
    times = file.stat()
    other = file.with_name("other")
    other.write_text("other")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.rename(file)
    assert not watched.have_changed()
    assert watched.have_changed()

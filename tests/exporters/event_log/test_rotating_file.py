"""Two writers of one file. Two objects act like two processes: neither knows what the other has open."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ess_monitor.exporters import EventLogConfig, EventLogExporter, read_event_log
from ess_monitor.exporters.event_log import rotating_file as line_file
from ess_monitor.exporters.event_log.rotating_file import LineFile
from tests.exporters.helpers import measurement, run_info, snapshot

LIMIT = 100

fcntl = pytest.importorskip("fcntl", reason="renaming an open file, and locking it, needs POSIX")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "below" / "lines"


@pytest.fixture
def new(path: Path) -> Iterator[Callable[[], LineFile]]:
    opened: list[LineFile] = []

    def make() -> LineFile:
        opened.append(LineFile(path))
        opened[-1].open()
        return opened[-1]

    yield make
    for file in opened:
        file.close()


@pytest.fixture
def older(path: Path) -> Path:
    return path.with_name("lines.1")


@pytest.fixture
def deleted(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Lines of the parts that a rotation has deleted."""
    lines: list[bytes] = []
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        lines.extend(target.read_bytes().splitlines() if target.exists() else [])
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    return lines


def test_a_heading_counts_for_the_limit(new: Callable[[], LineFile], path: Path, older: Path) -> None:
    """A run that finds the file of another writes its heading first, and both must fit."""
    first, second = new(), new()
    first.write(b"a" * 60 + b"\n", max_bytes=LIMIT)
    first.rotate()
    first.write(b"b" * 60 + b"\n", max_bytes=LIMIT)
    second.write(b"c" * 30 + b"\n", max_bytes=LIMIT, heading=lambda: b"h" * 20 + b"\n")
    assert path.read_bytes() == b"h" * 20 + b"\n" + b"c" * 30 + b"\n"
    assert older.read_bytes() == b"b" * 60 + b"\n"


def test_an_empty_file_is_not_rotated_for_a_line_that_is_too_long(
    new: Callable[[], LineFile], path: Path, older: Path
) -> None:
    file = new()
    file.write(b"a" * 60 + b"\n", max_bytes=LIMIT)
    file.rotate()
    file.write(b"b" * 200 + b"\n", max_bytes=LIMIT)
    assert (path.read_bytes(), older.read_bytes()) == (b"b" * 200 + b"\n", b"a" * 60 + b"\n")


@pytest.mark.parametrize("turns", [(1, 1), (1, 40), (40, 1), (7, 3)])
def test_two_writers_lose_no_line_but_those_that_a_rotation_deletes(
    new: Callable[[], LineFile], path: Path, older: Path, deleted: list[bytes], turns: tuple[int, int]
) -> None:
    writers, expected = (new(), new()), []
    while len(expected) < 300:
        for name, writer, times in zip("ab", writers, turns, strict=True):
            for _ in range(times):
                expected.append(f"{name}{len(expected):06}".encode())
                writer.write(expected[-1] + b"\n", max_bytes=LIMIT)
                assert writer.size == path.stat().st_size <= LIMIT
                assert not older.exists() or older.stat().st_size <= LIMIT
    assert len(deleted) > 100
    assert deleted + older.read_bytes().splitlines() + path.read_bytes().splitlines() == expected


def test_every_writer_begins_a_file_that_is_new_to_it_with_its_heading(
    new: Callable[[], LineFile], path: Path, older: Path
) -> None:
    first, second = new(), new()
    first.write(b"a" * 60 + b"\n", max_bytes=LIMIT, heading=lambda: b"first\n")
    second.write(b"b" * 60 + b"\n", max_bytes=LIMIT, heading=lambda: b"second\n")
    first.write(b"c\n", max_bytes=LIMIT, heading=lambda: b"first\n")
    second.write(b"d\n", max_bytes=LIMIT, heading=lambda: b"second\n")
    assert older.read_bytes() == b"a" * 60 + b"\n"
    assert path.read_bytes() == b"second\n" + b"b" * 60 + b"\nfirst\nc\nd\n"


def test_of_two_that_are_about_to_rotate_one_does_and_the_other_goes_on_in_its_file(
    new: Callable[[], LineFile], path: Path, older: Path
) -> None:
    first, second = new(), new()
    first.write(b"old\n")
    assert first.rotate()
    first.write(b"new\n")
    assert second.rotate(), "it had the old file open"
    second.write(b"next\n")
    assert (older.read_bytes(), path.read_bytes()) == (b"old\n", b"new\nnext\n")


def test_a_line_goes_to_the_old_file_while_another_process_is_renaming_it(
    new: Callable[[], LineFile], path: Path, older: Path
) -> None:
    first, second = new(), new()
    first.write(b"1234\n")
    assert second._file is not None
    fcntl.flock(second._file, fcntl.LOCK_EX)
    first.write(b"5678\n", max_bytes=6)
    assert (path.read_bytes(), older.exists()) == (b"1234\n5678\n", False)
    fcntl.flock(second._file, fcntl.LOCK_UN)
    first.write(b"next\n", max_bytes=6)
    assert (older.read_bytes(), path.read_bytes()) == (b"1234\n5678\n", b"next\n")


def test_a_lock_ends_with_the_rotation_also_where_a_forked_process_has_the_file_open(
    new: Callable[[], LineFile], older: Path
) -> None:
    (older / "full").mkdir(parents=True)  # nothing can be renamed onto a folder
    first, second = new(), new()
    first.write(b"1234\n")
    assert first._file is not None
    copy = os.dup(first._file.fileno())
    with pytest.raises(OSError, match="lines"):
        first.rotate()
    (older / "full").rmdir()
    older.rmdir()
    assert second.rotate()
    assert older.read_bytes() == b"1234\n"
    os.close(copy)


def test_a_file_system_without_locks_is_rotated_all_the_same(
    new: Callable[[], LineFile], older: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    file = new()
    file.write(b"1234\n")
    assert file.rotate()
    assert older.read_bytes() == b"1234\n"


def test_without_locks_and_with_the_file_closed_before_it_is_renamed_nothing_is_lost(
    new: Callable[[], LineFile], path: Path, older: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_file, "fcntl", None)
    monkeypatch.setattr(line_file, "_WINDOWS", True)
    closed: list[bool] = []
    real = os.replace

    def replace(*paths: Path) -> None:
        assert file._file is not None
        closed.append(file._file.closed)
        real(*paths)

    monkeypatch.setattr(os, "replace", replace)
    file = new()
    for line in (b"1234\n", b"5678\n"):
        file.write(line, max_bytes=6)
    assert (older.read_bytes(), path.read_bytes(), closed) == (b"1234\n", b"5678\n", [True])


@pytest.mark.parametrize("gone", ["file", "folder"])
def test_what_was_removed_is_made_anew(new: Callable[[], LineFile], path: Path, gone: str) -> None:
    file = new()
    file.write(b"1234\n")
    path.unlink()
    if gone == "folder":
        path.parent.rmdir()
    file.write(b"5678\n", max_bytes=6, heading=lambda: b"heading\n")
    assert path.read_bytes() == b"heading\n5678\n"


def test_a_file_that_cannot_be_made_anew_is_an_error_each_time_until_it_can(
    new: Callable[[], LineFile], path: Path
) -> None:
    file = new()
    file.write(b"1234\n")
    path.unlink()
    path.mkdir()
    for _ in range(2):
        with pytest.raises(IsADirectoryError):
            file.write(b"lost\n")
    path.rmdir()
    file.write(b"5678\n")
    assert path.read_bytes() == b"5678\n"


def test_a_folder_that_may_not_be_looked_into_any_more_does_not_stop_the_writing(
    new: Callable[[], LineFile], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = new()
    with monkeypatch.context() as patch:

        def refuse(*_: object) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        patch.setattr(os, "stat", refuse)
        file.write(b"1234\n")
    assert path.read_bytes() == b"1234\n"


def test_a_file_that_is_renamed_while_it_is_opened_is_followed_by_the_next_line(
    new: Callable[[], LineFile], path: Path, older: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new().write(b"old\n")
    real = os.fstat

    def renamed(descriptor: int) -> os.stat_result:
        if path.exists():
            path.rename(older)
        return real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", renamed)
        file = new()
    file.write(b"new\n")
    assert (older.read_bytes(), path.read_bytes()) == (b"old\n", b"new\n")


def test_nothing_stays_open_when_opening_fails(
    new: Callable[[], LineFile], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        seen.append(descriptor)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    seen: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", refuse)
        with pytest.raises(OSError, match="Input/output"):
            new()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(seen[0])


def test_a_closed_file_is_neither_written_nor_rotated(new: Callable[[], LineFile], path: Path) -> None:
    file = new()
    file.close()
    with pytest.raises(OSError, match="is not open"):
        file.write(b"1234\n")
    with pytest.raises(OSError, match="is not open"):
        file.rotate()
    assert path.read_bytes() == b""


def test_two_runs_on_one_event_log_that_rotates_are_both_whole_in_what_is_left(path: Path, older: Path) -> None:
    config = EventLogConfig(path=path, max_bytes=16_384)
    runs = [EventLogExporter(config, clock=lambda: 5.0) for _ in range(2)]
    for run, name in zip(runs, "ab", strict=True):
        run.start(run_info(run_name=name), snapshot)
    for step in range(100):
        for run in runs:
            run.export(measurement(step))
    for run in runs:
        run.close("finished")
    assert max(path.stat().st_size, older.stat().st_size) <= 16_384
    reader = read_event_log(path, rotated=True)
    events = list(reader)
    assert reader.skipped_lines == 0
    for name in "ab":
        steps = [event.data.step for event in events if event.event == "measurement" and event.run == name]
        assert steps == list(range(steps[0], 100))
        for part in (older, path):
            assert next(event.event for event in read_event_log(part) if event.run == name) == "run_started"
        assert [event.event for event in events if event.run == name][-1] == "run_finished"


def test_a_pipe_that_takes_the_place_of_the_file_is_not_waited_for(new: Callable[[], LineFile], path: Path) -> None:
    file = new()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="No such device or address"):
        file.write(b"a\n")

"""What is written to a path that is no plain file: a clear error at once, or the file that a link leads to."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ess_monitor.alerts import export
from ess_monitor.cli.report import compare, report
from ess_monitor.errors import ConfigError, EssMonitorError
from ess_monitor.exporters import (
    EventLogConfig,
    EventLogExporter,
    TextfileConfig,
    TextfileExporter,
    read_event_log,
)
from ess_monitor.report import find_event_log, load_history
from ess_monitor.runtime.files import replace_file, require_writable
from tests.exporters.helpers import run_info, snapshot
from tests.report.helpers import rescued_run, write_log

pytestmark = pytest.mark.skipif(os.name == "nt", reason="pipes and devices in the file system are POSIX's")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write_log(tmp_path / "run" / "events.jsonl", rescued_run())


def _event_log(path: Path, log: Path) -> None:
    EventLogExporter(EventLogConfig(path=path)).start(run_info(), snapshot)


def _textfile(path: Path, log: Path) -> None:
    TextfileExporter(TextfileConfig(path=path)).start(run_info(), snapshot)


WRITERS: dict[str, Callable[[Path, Path], Any]] = {
    "event_log": _event_log,
    "textfile": _textfile,
    "report": lambda path, log: report(log, str(path)),
    "compare": lambda path, log: compare(log, write_log(log.with_name("b"), rescued_run()), str(path)),
    "alerts": lambda path, log: export(path.parents[1]),
    "alerts, overwriting": lambda path, log: export(path.parents[1], overwrite=True),
}


def _device() -> Path:
    """A terminal of nobody's: a device that may be lost."""
    return Path(os.ttyname(os.openpty()[1]))


def _socket(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)  # a bound socket's address would have to be shorter than such a path can be


KINDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "folder": (Path.mkdir, "is a folder, not a file"),
    "pipe": (os.mkfifo, "is a named pipe, not a file"),
    "socket": (_socket, "is a socket, not a file"),
    "link to a pipe": (lambda path: (os.mkfifo(path.with_name("p")), path.symlink_to("p")), "is a named pipe, not"),
    "link to a device": (lambda path: path.symlink_to(_device()), "is a device, not a file"),
    "link to itself": (lambda path: path.symlink_to(path.name), "symbolic links"),
}


@pytest.fixture(autouse=True)
def readers(tmp_path: Path) -> Iterator[None]:
    """A writer that waits for the reader of a pipe gets one after two minutes, so that its test fails and ends."""

    def read() -> None:
        for path in tmp_path.rglob("*"):
            if path.is_fifo():
                os.open(path, os.O_RDWR | os.O_NONBLOCK)

    timer = threading.Timer(120, read)
    timer.daemon = True
    timer.start()
    yield
    timer.cancel()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_no_file_is_an_error_at_once_and_stays(writer: str, kind: str, tmp_path: Path, log: Path) -> None:
    make, message = KINDS[kind]
    path = tmp_path / "prometheus" / ("ess_monitor.rules.yml" if writer.startswith("alerts") else "out.prom")
    path.parent.mkdir()
    make(path)
    before = path.lstat()
    with pytest.raises(EssMonitorError, match=message) as caught:
        WRITERS[writer](path, log)
    assert str(path) in str(caught.value)
    after = path.lstat()
    assert (after.st_mode, after.st_ino) == (before.st_mode, before.st_ino)


@pytest.mark.parametrize("writer", ["textfile", "report", "compare"])
@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_a_link_and_the_permissions_of_a_file_stay(writer: str, mode: int, tmp_path: Path, log: Path) -> None:
    (disk := tmp_path / "disk").mkdir()
    path, target = tmp_path / "out.prom", disk / "file"
    path.symlink_to(tmp_path / "second")
    (tmp_path / "second").symlink_to("disk/file")
    for round_ in range(2):  # the target is missing at first
        WRITERS[writer](path, log)
        assert path.is_symlink()
        content = target.read_bytes()
        assert len(content) > 100
        if round_:
            assert target.stat().st_mode & 0o777 == mode
        target.write_bytes(b"old")
        target.chmod(mode)
    assert sorted(file.name for file in disk.iterdir()) == ["file"]


def test_a_file_is_whole_whatever_stands_at_the_name_of_the_temporary_one(tmp_path: Path) -> None:
    path, others = tmp_path / "file", tmp_path / "others"
    others.write_text("of somebody else")
    (tmp_path / f".file.{os.getpid()}.tmp").symlink_to(others)
    replace_file(path, b"new")
    assert (path.read_bytes(), others.read_text()) == (b"new", "of somebody else")
    assert sorted(tmp_path.iterdir()) == [path, others]


def spellings(log: Path) -> dict[str, Path]:
    link, hard = log.with_name("link.html"), log.with_name("hard.html")
    link.symlink_to(log)
    os.link(log, hard)
    older = log.with_name(log.name + ".1")
    older.write_bytes(b"\n")
    other = write_log(log.with_name("others.jsonl"), rescued_run()[:1])
    spelled = log.parent / ".." / log.parent.name / "." / log.name
    return {"itself": log, "spelled": spelled, "link": link, "hard link": hard, "older part": older, "another": other}


@pytest.mark.parametrize("command", ["report", "compare"])
@pytest.mark.parametrize("spelling", ["itself", "spelled", "link", "hard link", "older part", "another"])
def test_a_page_does_not_replace_an_event_log(
    command: str, spelling: str, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_log(tmp_path / "b" / "events.jsonl", rescued_run())
    monkeypatch.chdir(log.parent)
    output = spellings(log)[spelling]
    before = output.read_bytes()
    for path in (output, Path(os.path.relpath(output))):
        with pytest.raises(ConfigError, match=r"--output: .* is an event log.*another file"):
            report(log, str(path)) if command == "report" else compare(other, log, str(path))
    assert output.read_bytes() == before


def test_the_default_page_does_not_replace_a_log_of_its_name(tmp_path: Path) -> None:
    log = write_log(tmp_path / "ess_report.html", rescued_run())
    before = log.read_bytes()
    with pytest.raises(ConfigError, match="is an event log"):
        report(log)
    assert log.read_bytes() == before


@pytest.mark.parametrize("links", [1, 2])
@pytest.mark.parametrize("exists", [False, True])
def test_a_log_behind_a_link_is_rotated_where_it_lies(links: int, exists: bool, tmp_path: Path) -> None:
    target = tmp_path / "disk" / "logs" / "target.jsonl"
    path = tmp_path / "run" / "events.jsonl"
    path.parent.mkdir()
    if exists:
        target.parent.mkdir(parents=True)
        target.touch()
    path.symlink_to(tmp_path / "middle" if links == 2 else target)
    if links == 2:
        (tmp_path / "middle").symlink_to(target)
    exporter = EventLogExporter(EventLogConfig(path=path, max_bytes=8000))
    exporter.start(run_info(), snapshot)
    run = rescued_run()
    for each in run:
        exporter.export(each)
    exporter.close("finished")
    assert path.is_symlink()
    older = target.with_name("target.jsonl.1")
    assert sorted(target.parent.iterdir()) == [target, older]
    for name in (path, target):
        events = list(read_event_log(name, rotated=True))
        steps = [event.data.step for event in events if event.event == "measurement"]
        assert steps[-1] == run[-1].step
        assert steps == [each.step for each in run][-len(steps) :]
    assert load_history(path).measurements == load_history(target).measurements
    (tmp_path / "disk" / "logs" / "link.jsonl").symlink_to(target)
    assert find_event_log(target.parent).resolve() == target


def test_a_folder_is_searched_past_what_is_no_file(log: Path) -> None:
    os.mkfifo(log.with_name("pipe.jsonl"))
    log.with_name("folder.jsonl").mkdir()
    log.with_name("broken.jsonl").symlink_to("nowhere")
    assert find_event_log(log.parent) == log
    with pytest.raises(ConfigError, match="is not a file"):
        find_event_log(log.with_name("pipe.jsonl"))


def test_what_can_be_written_is_known_before_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "file", tmp_path / "new", tmp_path / "missing" / "folders" / "new"):
        require_writable(path)
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "file" / "new", "Not a directory")):
        with pytest.raises(OSError, match=message):
            require_writable(path)
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    with pytest.raises(PermissionError):
        require_writable(tmp_path / "missing" / "new")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]

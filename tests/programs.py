"""Programs in processes of their own, forked from a server that has imported the libraries once.

A new interpreter needs two to five seconds of processor time for torch, Lightning and transformers alone. A program
that is forked has them, and is like one that was just started in everything else: it is `__main__`, has its own
arguments, folder, environment and streams, and at its end threads are waited for and `atexit` is run. What is tested of
imports, of the interpreter's options or of its finalization, or with a library that changes another one needs a new
interpreter.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
LIBRARIES = ("torch.distributed", "torch._dynamo", "ess_monitor.exporters", "ess_monitor.featurizers")
"""What every program has imported."""


class Program:
    """A program that has been started.

    Args:
        command: as after `python`: a path, `-m` and a module, or `-c` and code, and the arguments.
        folder: of its output; only for this program.
        imports: modules that are imported before it is started, if they are installed.
        cwd: its working directory.
        env: its environment; that of this process by default.
        stdin, stdout: paths to open instead of nothing and of a file; those of pipes for example.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        folder: Path,
        *,
        imports: Sequence[str] = (),
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        stdin: Path | None = None,
        stdout: Path | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.args = [str(part) for part in command]
        self._output, self._errors = folder / "stdout", folder / "stderr"
        self.pid = _answer(
            command=self.args,
            imports=list(imports),
            cwd=str(cwd or Path.cwd()),
            env=dict(os.environ if env is None else env),
            streams=[str(stdin or os.devnull), str(stdout or self._output), str(self._errors)],
        )
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        if self.returncode is None:
            self.returncode = _answer(poll=self.pid)
        return self.returncode

    def wait(self, seconds: float = 120) -> int:
        """Its exit status, once it has ended."""
        ends = time.monotonic() + seconds
        while (status := self.poll()) is None:
            if time.monotonic() > ends:
                self.kill()
                pytest.fail(f"{self.args} did not end: {self.errors}")
            time.sleep(0.02)
        return status

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it, and wait for its end."""
        while self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.02)

    @property
    def errors(self) -> str:
        """What it has written to stderr."""
        return self._errors.read_text() if self._errors.exists() else ""

    @property
    def output(self) -> str:
        """What it has written to stdout."""
        return self._output.read_text() if self._output.exists() else ""


def run_program(
    command: Sequence[str | Path], folder: Path, *, seconds: float = 120, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Start a `Program` and wait for its end."""
    program = Program(command, folder, **options)
    status = program.wait(seconds)
    return subprocess.CompletedProcess(program.args, status, program.output, program.errors)


@functools.cache
def _server() -> Any:
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "tests.programs", str(theirs.fileno())]
    process = subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    theirs.close()
    stream = ours.makefile("rw")

    def end() -> None:
        stream.close()
        ours.close()
        process.wait()

    atexit.register(end)
    return stream


def _answer(**request: Any) -> Any:
    stream = _server()
    stream.write(json.dumps(request) + "\n")
    stream.flush()
    return json.loads(stream.readline())


def _serve(connection: socket.socket) -> None:
    """Answer requests until the other side closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever waits for the program
    for name in LIBRARIES:
        importlib.import_module(name)
    stream = connection.makefile("rw")
    for line in stream:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            for name in request["imports"]:
                importlib.import_module(name)
            gc.freeze()  # what is there already is not looked at in the program, which would copy it
            answer = os.fork()
            if answer == 0:
                os.close(connection.detach())
                signal.signal(signal.SIGINT, signal.default_int_handler)
                _become(**request)
        stream.write(json.dumps(answer) + "\n")
        stream.flush()
    os._exit(0)


def _become(command: list[str], cwd: str, env: dict[str, str], streams: list[str], imports: list[str]) -> None:
    """Run the program in this process, which ends with it."""
    for number, path in enumerate(streams):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND if number else os.O_RDONLY)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[1:1] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    try:
        _run(*command)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        status = -signal.SIGINT
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    # Without freeing the libraries one by one, which takes as long as to import some of them.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if status < 0:
        os.kill(os.getpid(), -status)  # as the interpreter ends on Ctrl-C
    os._exit(status)


def _run(kind: str, *arguments: str) -> None:
    if kind == "-m":
        sys.path[0], sys.argv = os.getcwd(), [*arguments]
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.path[0], sys.argv = "", ["-c", *arguments[1:]]
        exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path[0], sys.argv = str(Path(kind).parent), [kind, *arguments]
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))

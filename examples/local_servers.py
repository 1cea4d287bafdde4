"""A real Prometheus and a real Alertmanager on this machine, for as long as a `with` block lasts.

They run the rules, the scrape configuration and the routing that `ess_monitor.alerts` ships. Only what takes minutes is
shortened: scrapes and evaluations come every second, notifications go out at once, and how long an alert waits is the
caller's `AlertsConfig`. Everything listens on free ports of 127.0.0.1 and writes below one folder.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ess_monitor.alerts import AlertsConfig, export

PATIENCE_SECONDS = 180.0
"""Before something is given up. All of it takes seconds where the machine has nothing else to do."""
PACKAGES = {"prometheus": "prometheus", "prometheus-alertmanager": "prometheus-alertmanager"}
"""Program -> the package of Debian and Ubuntu that has it."""

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has no way to our loopback
T = TypeVar("T")


def missing_packages() -> list[str]:
    """Packages to install before `alerting_stack` can start."""
    return [package for program, package in PACKAGES.items() if shutil.which(program) is None]


def eventually(ask: Callable[[], T | None], what: str, *, seconds: float = PATIENCE_SECONDS) -> T:
    """The first answer that is true; asks ten times a second.

    Raises:
        TimeoutError: there was none in time; names `what` was waited for and the last answer.
    """
    deadline = time.monotonic() + seconds
    while True:
        answer = ask()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s; the last answer was {answer!r:.500}")
        time.sleep(0.1)


@dataclass(frozen=True)
class Notification:
    """One alert in one message of Alertmanager."""

    status: str
    """firing or resolved"""
    labels: dict[str, str]
    annotations: dict[str, str]
    path: str
    """Of the webhook it was sent to: /page, /chat or /log."""
    changed_timestamp_seconds: float
    """When Prometheus saw it begin to fire, or end."""
    received_timestamp_seconds: float

    @property
    def name(self) -> str:
        """Of the alert."""
        return self.labels["alertname"]


class Webhook:
    """Takes Alertmanager's messages and keeps them in order; `tell` is called with each, from the server's thread."""

    def __init__(self, tell: Callable[[Notification], None] = lambda _: None) -> None:
        self.notifications: list[Notification] = []
        taken = self.notifications

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                now = time.time()
                for alert in message["alerts"]:
                    changed = _seconds(alert["startsAt" if alert["status"] == "firing" else "endsAt"])
                    notification = Notification(
                        alert["status"], alert["labels"], alert["annotations"], self.path, changed, now
                    )
                    taken.append(notification)
                    tell(notification)
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="webhook", daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Webhook:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def wait_for(self, name: str, status: str) -> Notification:
        """The first notification of this alert with this status, past or to come."""
        return eventually(
            lambda: next((n for n in self.notifications if (n.name, n.status) == (name, status)), None),
            f"webhook: {name} {status}",
        )


@dataclass(frozen=True)
class Prometheus:
    """A Prometheus that answers."""

    url: str

    def query(self, expression: str, at: float | None = None) -> list[dict[str, Any]]:
        """The instant vector of an expression, now or at a time in seconds since the epoch."""
        question = urllib.parse.urlencode({"query": expression, **({} if at is None else {"time": at})})
        with _DIRECT.open(f"{self.url}/api/v1/query?{question}", timeout=PATIENCE_SECONDS) as response:
            result: list[dict[str, Any]] = json.load(response)["data"]["result"]
        return result

    def values(self, expression: str, *labels: str, at: float | None = None) -> dict[tuple[str, ...], float]:
        """The same as label values -> value; a label that a series does not have is empty."""
        return {
            tuple(series["metric"].get(label, "") for label in labels): float(series["value"][1])
            for series in self.query(expression, at)
        }


@dataclass(frozen=True)
class Stack:
    """Where everything is."""

    prometheus: Prometheus
    alertmanager_url: str
    webhook: Webhook
    targets: Path
    """Folder that Prometheus watches: `file_sd_dir` of the runs."""
    alerts: Path
    """What `ess_monitor.alerts.export` wrote."""


@contextmanager
def alerting_stack(
    folder: Path, config: AlertsConfig, tell: Callable[[Notification], None] = lambda _: None
) -> Iterator[Stack]:
    """Prometheus -> Alertmanager -> webhook, all ready; all ended at the end of the block, whatever ends it.

    Args:
        folder: takes configuration, data and logs.
        config: of the alerting rules.
        tell: called with each notification, from another thread.

    Raises:
        RuntimeError: a server ended instead of answering; the message has the end of its log.
        TimeoutError: a server does not answer.
    """
    alerts = folder / "alerts"
    export(alerts, config)
    targets = alerts / "prometheus" / "targets"
    targets.mkdir()
    with ExitStack() as stack:
        webhook = stack.enter_context(Webhook(tell))
        alertmanager, prometheus = (f"127.0.0.1:{port}" for port in _free_ports(2))
        rules = _shortened_scraping(alerts / "prometheus" / "prometheus.example.yml", alertmanager)
        routes = _shortened_routing(alerts / "alertmanager" / "alertmanager.yml", webhook.url)
        command = ["prometheus-alertmanager", f"--config.file={routes}", f"--storage.path={folder / 'alertmanager'}"]
        command += [f"--web.listen-address={alertmanager}", "--cluster.listen-address="]
        stack.enter_context(_running(command, f"http://{alertmanager}", folder / "alertmanager.log"))
        command = ["prometheus", f"--config.file={rules}", f"--storage.tsdb.path={folder / 'prometheus'}"]
        command += [f"--web.listen-address={prometheus}"]
        stack.enter_context(_running(command, f"http://{prometheus}", folder / "prometheus.log"))
        yield Stack(Prometheus(f"http://{prometheus}"), f"http://{alertmanager}", webhook, targets, alerts)


def _shortened_scraping(example: Path, alertmanager: str) -> Path:
    """The shipped example, with its short paths to rules and targets, at one scrape and evaluation a second."""
    config = yaml.safe_load(example.read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["alerting"]["alertmanagers"] = [{"static_configs": [{"targets": [alertmanager]}]}]
    path = example.with_name("prometheus.yml")
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def _shortened_routing(shipped: Path, webhook: str) -> Path:
    """The shipped routes, receivers and inhibitions, towards our webhook and without waiting."""
    text = re.sub(r"http://127\.0\.0\.1:\d+", webhook, shipped.read_text())
    text = re.sub(r"\b(group_wait|group_interval): \w+", lambda m: f"{m[1]}: {int(m[1] != 'group_wait')}s", text)
    path = shipped.with_name("shortened.yml")
    path.write_text(text)
    return path


@contextmanager
def _running(command: list[str], url: str, log: Path) -> Iterator[None]:
    """A server that says it is ready."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)

    def ready() -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"{command[0]} ended with status {process.returncode}:\n{log.read_text()[-2000:]}")
        try:
            with _DIRECT.open(f"{url}/-/ready", timeout=PATIENCE_SECONDS) as response:
                return bool(response.status == 200)
        except OSError:
            return False  # not yet

    try:
        eventually(ready, f"{command[0]} at {url}")
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


def _seconds(moment: str) -> float:
    """RFC 3339 with nanoseconds, which Python 3.10 does not read, to seconds since the epoch."""
    whole, fraction, zone = re.fullmatch(r"([^.Z+]+?)(\.\d+)?(Z|[+-]\d\d:\d\d)", moment).groups()  # type: ignore[union-attr]
    return datetime.fromisoformat(whole + zone.replace("Z", "+00:00")).timestamp() + float(fraction or 0)

"""Runs a real Prometheus and a real Alertmanager on this machine for the duration of a `with` block.

They use the rules, the scrape configuration and the routing that `ess_monitor.alerts` ships. Only the times are
shorter: scrapes and evaluations happen every second, notifications are sent at once, and the caller's `AlertsConfig`
sets how long an alert waits. The servers listen on free ports of 127.0.0.1 and write below one folder.
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
"""Limit of every wait. On an idle machine each of them takes seconds."""
PACKAGES = {"prometheus": "prometheus", "prometheus-alertmanager": "prometheus-alertmanager"}
"""Program -> its package in Debian and Ubuntu."""

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach our loopback
T = TypeVar("T")


def missing_packages() -> list[str]:
    """Return the packages that `alerting_stack` needs and that are not installed."""
    return [package for program, package in PACKAGES.items() if shutil.which(program) is None]


def eventually(ask: Callable[[], T | None], what: str, *, seconds: float = PATIENCE_SECONDS) -> T:
    """Call `ask` ten times a second, and return its first true answer.

    Raises:
        TimeoutError: no answer was true in time. The message names `what` and has the last answer.
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
    """One alert in a message of Alertmanager."""

    status: str
    """firing or resolved"""
    labels: dict[str, str]
    annotations: dict[str, str]
    path: str
    """Path of the webhook: /page, /chat or /log."""
    changed_timestamp_seconds: float
    """When Prometheus saw the alert start or end."""
    received_timestamp_seconds: float

    @property
    def name(self) -> str:
        """Name of the alert."""
        return self.labels["alertname"]


class Webhook:
    """Receives Alertmanager's messages, and keeps their alerts in order.

    `on_notification` is called with each alert, from the server's thread.
    """

    def __init__(self, on_notification: Callable[[Notification], None] = lambda _: None) -> None:
        self.notifications: list[Notification] = []
        received = self.notifications

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                now = time.time()
                for alert in message["alerts"]:
                    changed = _seconds(alert["startsAt" if alert["status"] == "firing" else "endsAt"])
                    notification = Notification(
                        alert["status"], alert["labels"], alert["annotations"], self.path, changed, now
                    )
                    received.append(notification)
                    on_notification(notification)
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
        """Return the first notification of this alert with this status; wait for it if needed."""
        return eventually(
            lambda: next((n for n in self.notifications if (n.name, n.status) == (name, status)), None),
            f"webhook: {name} {status}",
        )


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus."""

    url: str

    def query(self, expression: str, at: float | None = None) -> list[dict[str, Any]]:
        """Return the instant vector of an expression, now or at a time in seconds since the epoch."""
        question = urllib.parse.urlencode({"query": expression, **({} if at is None else {"time": at})})
        with _DIRECT.open(f"{self.url}/api/v1/query?{question}", timeout=PATIENCE_SECONDS) as response:
            result: list[dict[str, Any]] = json.load(response)["data"]["result"]
        return result

    def values(self, expression: str, *labels: str, at: float | None = None) -> dict[tuple[str, ...], float]:
        """Return the same vector as label values -> value. A label that a series does not have is empty."""
        return {
            tuple(series["metric"].get(label, "") for label in labels): float(series["value"][1])
            for series in self.query(expression, at)
        }


@dataclass(frozen=True)
class Stack:
    """The running servers and their folders."""

    prometheus: Prometheus
    alertmanager_url: str
    webhook: Webhook
    targets: Path
    """Folder that Prometheus watches: `file_sd_dir` of the runs."""
    alerts: Path
    """Folder that `ess_monitor.alerts.export` wrote."""


@contextmanager
def alerting_stack(
    folder: Path, config: AlertsConfig, on_notification: Callable[[Notification], None] = lambda _: None
) -> Iterator[Stack]:
    """Start Prometheus, Alertmanager and a webhook, and stop them at the end of the block.

    Args:
        folder: where configuration, data and logs are written.
        config: settings of the alerting rules.
        on_notification: called with each notification, from another thread.

    Raises:
        RuntimeError: a server ended instead of answering. The message has the end of its log.
        TimeoutError: a server does not answer.
    """
    alerts = folder / "alerts"
    export(alerts, config)
    targets = alerts / "prometheus" / "targets"
    targets.mkdir()
    with ExitStack() as stack:
        webhook = stack.enter_context(Webhook(on_notification))
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
    """Write the shipped scrape configuration with one scrape and one evaluation a second."""
    config = yaml.safe_load(example.read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["alerting"]["alertmanagers"] = [{"static_configs": [{"targets": [alertmanager]}]}]
    path = example.with_name("prometheus.yml")
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def _shortened_routing(shipped: Path, webhook: str) -> Path:
    """Write the shipped routes, receivers and inhibitions for our webhook, without waiting times."""
    text = re.sub(r"http://127\.0\.0\.1:\d+", webhook, shipped.read_text())
    text = re.sub(r"\b(group_wait|group_interval): \w+", lambda m: f"{m[1]}: {int(m[1] != 'group_wait')}s", text)
    path = shipped.with_name("shortened.yml")
    path.write_text(text)
    return path


@contextmanager
def _running(command: list[str], url: str, log: Path) -> Iterator[None]:
    """Start a server, wait until it is ready, and stop it at the end of the block."""
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
    """Convert RFC 3339 with nanoseconds, which Python 3.10 cannot parse, to seconds since the epoch."""
    whole, fraction, zone = re.fullmatch(r"([^.Z+]+?)(\.\d+)?(Z|[+-]\d\d:\d\d)", moment).groups()  # type: ignore[union-attr]
    return datetime.fromisoformat(whole + zone.replace("Z", "+00:00")).timestamp() + float(fraction or 0)

"""Prints a timeline from a collapsed layer to a notification and back, with a real Prometheus and Alertmanager.

    make observability        or        python examples/observability.py [--steps 2000] [--seed 0] [--json FILE]

The demo run (see demo.py) trains with the autopilot. Prometheus discovers it through a file, scrapes it every second
and evaluates the shipped rules. Alertmanager sends the alerts that fire to a webhook. The program prints each event and
the time since the event before: collapse diagnosed, treated, alert firing, delivered, layer rescued, alert resolved,
delivered.

The alert waits two seconds instead of ten minutes, so that it fires during the short run. Otherwise the rules and the
routing are those that `ess_monitor.alerts.export` writes. On Debian and Ubuntu the program installs missing servers
with apt-get if it runs as root. They listen on free ports of 127.0.0.1 and stop with the program.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from local_servers import Notification, alerting_stack, eventually, missing_packages
from recall import Recall, RecallModule
from rich.console import Console

from ess_monitor import Measurement
from ess_monitor.alerts import AlertsConfig
from ess_monitor.exporters import PrometheusConfig, PrometheusExporter
from ess_monitor.integrations.lightning import ESSMonitorCallback
from ess_monitor.records import RunInfo, RunStatus, Snapshot

LAYER = "model.blocks.1.mixer"
ALERT = "EssMonitorStateCollapsed"
MILESTONES = ("diagnosed", "treated", "firing", "firing_delivered", "rescued", "resolved", "resolved_delivered")
"""The milestones of a successful run, in order."""


class Timeline:
    """Prints each event with its time and the time since the event before. Called from several threads."""

    def __init__(self, console: Console) -> None:
        self.events: list[dict[str, Any]] = []
        self._console = console
        self._lock = threading.Lock()
        self._start = time.time()

    def add(self, text: str, milestone: str = "", at: float | None = None) -> None:
        """Add an event that happened now, or at a time in seconds since the epoch."""
        with self._lock:
            seconds = (time.time() if at is None else at) - self._start
            before = self.events[-1]["seconds"] if self.events else 0.0
            if any(event["milestone"] == milestone for event in self.events):
                milestone = ""  # only the first occurrence counts
            self.events.append({"seconds": seconds, "milestone": milestone, "text": text})
            self._console.print(f"{seconds:7.1f} s  {seconds - before:+6.1f} s  {text}", highlight=False)

    def missing(self) -> list[str]:
        """Return the milestones that the run has not passed."""
        passed = {event["milestone"] for event in self.events}
        return [milestone for milestone in MILESTONES if milestone not in passed]

    def add_notification(self, notification: Notification) -> None:
        """Add a notification of Alertmanager, and the change of the alert, whose time is in the message."""
        firing, ours = notification.status == "firing", notification.name == ALERT
        self.add(
            f"Prometheus: {notification.name} {notification.status}",
            ("firing" if firing else "resolved") if ours else "",
            notification.changed_timestamp_seconds,
        )
        self.add(
            f"webhook {notification.path}: {notification.status}: {notification.annotations['summary']}",
            ("firing_delivered" if firing else "resolved_delivered") if ours else "",
            notification.received_timestamp_seconds,
        )


class TimelineExporter:
    """An exporter that adds findings and actions to the timeline."""

    name = "timeline"
    inline = True

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline

    def start(self, run: RunInfo, snapshot: Callable[[], Snapshot]) -> None:
        """Do nothing: there is nothing to open."""

    def export(self, measurement: Measurement) -> None:
        """Add the findings and actions of this step."""
        for finding in measurement.findings:
            milestone = {"collapsed": "diagnosed", "healthy": "rescued"}.get(finding.condition, "")
            text = f"step {finding.step}: {finding.layer} is {finding.condition}: {finding.reason}"
            self._timeline.add(text, milestone if finding.layer == LAYER else "")
        for action in measurement.actions:
            text = f"step {action.step}: {action.layer}: {action.action} {action.outcome}: {action.message}"
            self._timeline.add(text, "treated" if action.outcome == "applied" else "")

    def close(self, status: RunStatus) -> None:
        """Add the end of the run."""
        self._timeline.add(f"the run {status}")


def install_servers(console: Console) -> None:
    """Install the servers that are missing; exit if they cannot be installed."""
    packages = missing_packages()
    if not packages:
        return
    command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages]
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        sys.exit(
            f"This example needs {' and '.join(packages)}. On Debian or Ubuntu: sudo {' '.join(command)}. Elsewhere: "
            "download `prometheus` and `alertmanager` from prometheus.io/download, rename the second to "
            "`prometheus-alertmanager`, and add both to PATH."
        )
    console.print(f"installing {', '.join(packages)}")
    quiet: dict[str, Any] = {"check": True, "stdout": subprocess.DEVNULL}
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-qq"], env=environment, **quiet)
    subprocess.run(command, env=environment, **quiet)


def train(
    recall: Recall, targets: Path, timeline: Timeline, scraped: Callable[[], object]
) -> tuple[float, PrometheusExporter]:
    """Train the demo run after its first scrape; return its last accuracy and the endpoint, which is still open."""
    endpoint = PrometheusExporter(PrometheusConfig(port=0, file_sd_dir=targets, run_id="demo", linger_seconds=600))
    ess = ESSMonitorCallback(
        every_n_steps=50,
        overhead_budget_ratio=None,  # a run this short needs its measurements, however busy the machine is
        diagnosis={"metric": "accuracy", "metric_solved": 0.9, "warmup_steps": 300},
        autopilot="auto",
        exporters=[endpoint, TimelineExporter(timeline)],
        table=False,
    )

    class Begin(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            timeline.add(f"serving {endpoint.url}")
            scraped()
            timeline.add("Prometheus: up")

    trainer = pl.Trainer(
        max_steps=recall.steps,
        accelerator="cpu",
        logger=False,
        callbacks=[ess, Begin()],
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(RecallModule(recall))
    return float(trainer.callback_metrics["accuracy"]), endpoint


def main() -> int:
    """Run the example; return 1 if a milestone was not passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the timeline to FILE")
    arguments = parser.parse_args()
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda number, _: sys.exit(128 + number))  # so that the servers stop, too
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
    torch.set_num_threads(1)

    console = Console(soft_wrap=True)
    install_servers(console)
    timeline = Timeline(console)
    alerts = AlertsConfig(condition_for_seconds=2, condition_keep_firing_seconds=1)
    with (
        tempfile.TemporaryDirectory(prefix="ess-monitor-") as folder,
        alerting_stack(Path(folder), alerts, timeline.add_notification) as stack,
    ):
        timeline.add(f"Prometheus {stack.prometheus.url}, Alertmanager {stack.alertmanager_url}, both ready")
        accuracy, endpoint = train(
            Recall(seed=arguments.seed, steps=arguments.steps),
            stack.targets,
            timeline,
            lambda: eventually(lambda: stack.prometheus.query('up{job="ess_monitor"} == 1'), "a first scrape"),
        )
        if timeline.missing() in (["resolved_delivered"], ["resolved", "resolved_delivered"]):  # still on its way
            stack.webhook.wait_for(ALERT, "resolved")
        endpoint.stop()
    console.print(f"\naccuracy {accuracy:.2f}; a guess among the four values is right one time in four")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"accuracy": accuracy, "events": timeline.events}, indent=2) + "\n")
    missing = timeline.missing()
    if missing:
        console.print(f"not seen: {', '.join(missing)}")
    return int(bool(missing))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

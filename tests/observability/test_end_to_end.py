"""From a layer that forgets to a message on a phone, and back: nothing on the way is a stand-in.

Real: two Lightning processes (DDP over gloo) with their endpoints and discovery files; the layer, whose gate starts so
low that its memory is collapsed, and the autopilot's regularizer that fills it (left alone it stays collapsed);
Prometheus with the scrape configuration and the rules that `ess_monitor.alerts` exports; Alertmanager with its routes
and inhibitions; HTTP between all of them. Shortened: the wait of the alerts (seconds instead of minutes), scrape and
evaluation intervals, Alertmanager's grouping times, and the patience of the diagnosis. Held back: the training begins
when Prometheus has found it, and steps no faster than every 30 ms.

One story, told by fixtures that stand on each other: found, alerted, resolved, killed, bereft, forgotten.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from ess_monitor.alerts import AlertsConfig
from ess_monitor.exporters import read_event_log
from ess_monitor.exporters.event_log.events import FindingEvent, RunFinishedEvent
from examples.local_servers import PATIENCE_SECONDS, Notification, Stack, alerting_stack, eventually
from tests.alerts.helpers import need
from tests.observability.ranks import RUN_ID, Rank, event_log, two_ranks

pytestmark = [pytest.mark.servers, pytest.mark.timeout(600)]

LAYER = "model.blocks.1.mixer"
COLLAPSED, DOWN = "EssMonitorStateCollapsed", "EssMonitorTargetDown"
CONFIG = AlertsConfig(
    condition_for_seconds=1,
    condition_keep_firing_seconds=1,
    # Prometheus takes up to five seconds to forget a run that has left discovery, and must not call it down meanwhile.
    target_down_for_seconds=8,
)


class Scene(NamedTuple):
    """The servers, and the two processes that they watch."""

    stack: Stack
    ranks: list[Rank]
    folder: Path

    def values(self, expression: str, *labels: str, at: float | None = None) -> dict[tuple[str, ...], float]:
        return self.stack.prometheus.values(expression, *labels, at=at)

    def delivered(self) -> list[tuple[str, str]]:
        return [(notification.name, notification.status) for notification in self.stack.webhook.notifications]

    def diagnosed(self, condition: str) -> FindingEvent:
        """The line of the event log which says that the layer entered a condition."""
        findings = (event for event in read_event_log(event_log(self.folder)) if isinstance(event, FindingEvent))
        return next(event for event in findings if (event.data.layer, event.data.condition) == (LAYER, condition))


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    need("prometheus", "prometheus")
    need("prometheus-alertmanager", "prometheus-alertmanager")
    folder = tmp_path_factory.mktemp("end_to_end")
    with alerting_stack(folder, CONFIG) as stack, two_ranks(stack.targets, folder) as ranks:
        yield Scene(stack, ranks, folder)


@pytest.fixture(scope="module")
def found(scene: Scene) -> dict[tuple[str, ...], float]:
    """`up` of both ranks; from here on they train."""
    up = eventually(
        lambda: (
            all(rank.still_running() for rank in scene.ranks)
            and len(found := scene.values("up == 1", "job", "run_id", "rank")) == 2
            and found
        ),
        "both ranks up",
    )
    for rank in scene.ranks:
        rank.begin()
    assert up
    return up


@pytest.fixture(scope="module")
def alerted(scene: Scene, found: object) -> Notification:
    return scene.stack.webhook.wait_for(COLLAPSED, "firing")


@pytest.fixture(scope="module")
def resolved(scene: Scene, alerted: object) -> Notification:
    return scene.stack.webhook.wait_for(COLLAPSED, "resolved")


@pytest.fixture(scope="module")
def killed(scene: Scene, resolved: object) -> tuple[float, Notification]:
    """When rank 1 was killed, and what was said of it."""
    alive = time.time()
    scene.ranks[1].kill()
    return alive, scene.stack.webhook.wait_for(DOWN, "firing")


@pytest.fixture(scope="module")
def bereft(scene: Scene, killed: object) -> int:
    """Exit status of rank 0, whose partner is gone."""
    return scene.ranks[0].wait(PATIENCE_SECONDS)


@pytest.fixture(scope="module")
def forgotten(scene: Scene, bereft: object) -> Notification:
    """What is said once somebody has deleted the discovery file that the killed process left."""
    (left_behind,) = scene.stack.targets.iterdir()
    assert left_behind.name == f"{RUN_ID}-1.json"
    left_behind.unlink()
    return scene.stack.webhook.wait_for(DOWN, "resolved")


def test_both_ranks_are_found_through_their_files(scene: Scene, found: dict[tuple[str, ...], float]) -> None:
    assert found == {("ess_monitor", RUN_ID, "0"): 1.0, ("ess_monitor", RUN_ID, "1"): 1.0}
    layers = scene.values("ess_monitor_layers", "run_id", "rank")
    assert layers == {(RUN_ID, "0"): 2.0, (RUN_ID, "1"): 2.0}


def test_the_collapse_fires_the_rule_and_is_delivered(scene: Scene, alerted: Notification) -> None:
    assert alerted.labels == {
        "alertname": COLLAPSED,
        "severity": "warning",
        "job": "ess_monitor",
        "run_id": RUN_ID,
        "layer": LAYER,
        "condition": "collapsed",
    }
    assert alerted.path == "/chat"
    assert alerted.annotations["summary"] == f"Layer {LAYER} of run {RUN_ID} has collapsed"
    assert (scene.stack.alerts / alerted.annotations["runbook_url"]).is_file()
    # The diagnosis came first, the alert a second later, then the message.
    diagnosed = scene.diagnosed("collapsed").timestamp_seconds
    assert diagnosed + CONFIG.condition_for_seconds < alerted.changed_timestamp_seconds
    assert alerted.changed_timestamp_seconds <= alerted.received_timestamp_seconds


def test_both_ranks_served_the_collapse_that_was_alerted(scene: Scene, alerted: Notification) -> None:
    collapsed = f'ess_monitor_layer_condition{{layer="{LAYER}", condition="collapsed"}}'
    seen = scene.values(collapsed, "rank", at=alerted.changed_timestamp_seconds)
    assert seen == {("0",): 1.0, ("1",): 1.0}


def test_it_resolves_after_the_rescue(scene: Scene, resolved: Notification) -> None:
    recovered = scene.diagnosed("healthy")
    assert recovered.data.previous == "collapsed"
    assert recovered.timestamp_seconds < resolved.changed_timestamp_seconds <= resolved.received_timestamp_seconds
    pulled = 'ess_monitor_interventions_total{action="pull_to_identity", outcome=~"applied|recovered"}'
    assert set(scene.values(pulled, "rank", "outcome").values()) == {1.0}
    # Once each, and nothing else was said of a run that had nothing else to tell.
    assert scene.delivered() == [(COLLAPSED, "firing"), (COLLAPSED, "resolved")]


def test_a_killed_rank_is_down_and_its_series_end_at_once(scene: Scene, killed: tuple[float, Notification]) -> None:
    alive, notification = killed
    assert notification.labels["alertname"] == DOWN
    assert {label: notification.labels[label] for label in ("job", "run_id", "rank")} == {
        "job": "ess_monitor",
        "run_id": RUN_ID,
        "rank": "1",
    }
    assert scene.values('up{rank="1"}', "rank") == {("1",): 0.0}
    # A last value that stayed for the five minutes of the lookback would be taken for a run that goes on.
    assert scene.values('ess_monitor_layers{rank="1"}', "rank", at=alive) == {("1",): 2.0}
    assert scene.values('ess_monitor_layers{rank="1"}', "rank") == {}


def test_the_other_rank_fails_and_leaves_discovery(scene: Scene, bereft: int) -> None:
    assert bereft != 0
    assert [path.name for path in scene.stack.targets.iterdir()] == [f"{RUN_ID}-1.json"]
    assert eventually(lambda: set(scene.values("up", "rank")) == {("1",)}, "rank 0 gone from Prometheus")
    last = list(read_event_log(event_log(scene.folder)))[-1]
    assert isinstance(last, RunFinishedEvent)
    assert last.data.status == "failed"


def test_the_alert_on_a_killed_rank_resolves_once_its_file_is_gone(scene: Scene, forgotten: Notification) -> None:
    assert forgotten.labels["rank"] == "1"
    assert scene.values("up", "rank") == {}
    assert scene.delivered() == [
        (COLLAPSED, "firing"),
        (COLLAPSED, "resolved"),
        (DOWN, "firing"),
        (DOWN, "resolved"),
    ]

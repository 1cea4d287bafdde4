"""Rules on the run and its target: is it there, does it step."""

from __future__ import annotations

from ess_monitor.alerts.config import AlertsConfig
from ess_monitor.alerts.rules.base import PREFIX, Alert, Group, Record, duration


def run(config: AlertsConfig) -> Group:
    """The group of rules on the run itself."""
    job = f'job="{config.job}"'
    return Group(
        "ess_monitor.run",
        (
            Record(
                "rank:ess_monitor_steps:rate5m",
                f"rate(ess_monitor_steps_total{{{job}}}[5m])",
                "Steps per second of each rank.",
            ),
            Alert(
                "RunStalled",
                f"""
                (
                  time() - ess_monitor_last_step_timestamp_seconds{{{job}}} > {config.stalled_seconds}
                  and on (job, instance, run_id, rank)
                  ess_monitor_run_status{{{job}, status="running"}} == 1
                )
                or
                (
                  time() - ess_monitor_run_start_timestamp_seconds{{{job}}} > {config.start_seconds}
                  and on (job, instance, run_id, rank)
                  ess_monitor_run_status{{{job}, status="starting"}} == 1
                )
                """,
                "critical",
                "Run {{ $labels.run_id }} does not step",
                "Rank {{ $labels.rank }} of run {{ $labels.run_id }} has not ended a step for "
                "{{ $value | humanizeDuration }}, and says that it goes on. Allowed are "
                f"{duration(config.stalled_seconds)} between two steps and {duration(config.start_seconds)} before the "
                "first.",
                "A process that hangs still answers scrapes: the endpoint has a thread of its own. Until the first "
                "step, a run is starting and has no time of a last one.",
                f"{config.runbook_base_url}/{PREFIX}RunStalled.md",
                60,
            ),
            Alert(
                "TargetDown",
                f"up{{{job}}} == 0",
                "warning",
                "Rank {{ $labels.rank }} of run {{ $labels.run_id }} cannot be scraped",
                f"For {duration(config.target_down_for_seconds)} {{{{ $labels.instance }}}} has not answered. Nothing "
                "is known of this rank: the process is gone, or the way to it is closed.",
                "Hides the other alerts of this rank (inhibition in alertmanager.yml). A run that has ended fires "
                "nothing once service discovery has forgotten it, for which the wait leaves time.",
                f"{config.runbook_base_url}/{PREFIX}TargetDown.md",
                config.target_down_for_seconds,
            ),
        ),
    )

"""Rules on what the autopilot did. All ranks act alike, so an action is seen once per rank and told once per run."""

from __future__ import annotations

from ess_monitor.alerts.config import AlertsConfig
from ess_monitor.alerts.rules.base import PREFIX, Alert, Group, duration

_HOUR = 3600


def interventions(config: AlertsConfig) -> Group:
    """The group of rules on the autopilot."""
    return Group("ess_monitor.interventions", (_failing(config), _flapping(config), _ineffective(config)))


def _failing(config: AlertsConfig) -> Alert:
    return Alert(
        "InterventionFailing",
        f"""
        max by (job, run_id, action, outcome) (
          increase(ess_monitor_interventions_total{{job="{config.job}", outcome=~"failed|rolled_back"}}[15m])
        ) > 0
        """,
        "warning",
        'An intervention in run {{ $labels.run_id }} has {{ if eq $labels.outcome "failed" }}failed'
        "{{ else }}been rolled back{{ end }}",
        "Within the last 15 minutes {{ $labels.action }} "
        '{{ if eq $labels.outcome "failed" }}did not bring its layer back, or could not be carried on'
        "{{ else }}was undone, as the loss broke{{ end }}. A person has to look: the event log names the layer and "
        "the reason.",
        "max, not sum: every rank of a run counts the same action.",
        f"{config.runbook_base_url}/{PREFIX}InterventionFailing.md",
    )


def _flapping(config: AlertsConfig) -> Alert:
    return Alert(
        "InterventionFlapping",
        f"""
        max by (job, run_id) (
          sum by (job, instance, run_id, rank) (
            round(increase(ess_monitor_interventions_total{{job="{config.job}", outcome="applied"}}[1h]))
          )
        ) > {config.flapping_actions}
        """,
        "warning",
        "The autopilot of run {{ $labels.run_id }} goes in circles",
        '{{ printf "%.0f" $value }} interventions were applied in the last hour, more than '
        f"{config.flapping_actions}. Layers recover and collapse again, or one remedy provokes the next.",
        "round: increase() extrapolates to the edges of its window, and six actions would read as 6.02.",
        f"{config.runbook_base_url}/{PREFIX}InterventionFlapping.md",
    )


def _ineffective(config: AlertsConfig) -> Alert:
    name = f"{PREFIX}InterventionIneffective"
    collapsed = f"""sum by (job, run_id) (
            max by (job, run_id, layer) (ess_monitor_layer_condition{{job="{config.job}", condition="collapsed"}})
          ) > 0"""
    return Alert(
        "InterventionIneffective",
        f"""
        (
          {collapsed}
        )
        and on (job, run_id) (
          max by (job, run_id) (
            increase(
              ess_monitor_interventions_total{{job="{config.job}", outcome="applied"}}[{_window(config)}]
            )
          ) > 0
          or
          ALERTS{{job="{config.job}", alertname="{name}", alertstate="firing"}}
        )
        """,
        "critical",
        "Run {{ $labels.run_id }} is still collapsed although the autopilot acted",
        'Collapsed layers of run {{ $labels.run_id }}: {{ printf "%.0f" $value }}. At no moment of the last '
        f"{duration(config.ineffective_for_seconds)} was there none, although an intervention was applied. The run "
        "goes on at its full cost: decide whether it should.",
        "An action within the hour before, or during the wait: the window is an hour longer than `for`, as one that "
        "is no longer than `for` would close before a single action could be judged. Once it fires, ALERTS keeps it "
        "firing until no layer is collapsed: an alert that resolves because its window closed would tell of a "
        "recovery that never was.",
        f"{config.runbook_base_url}/{name}.md",
        config.ineffective_for_seconds,
    )


def _window(config: AlertsConfig) -> str:
    return duration(config.ineffective_for_seconds + _HOUR)

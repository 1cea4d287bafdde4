"""All runs of a job: which of them needs somebody."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from ess_monitor.alerts.dashboards.boards import JOB, RUN_LINK, Section, board, values_of
from ess_monitor.alerts.dashboards.parts import (
    BLUE,
    GREEN,
    RED,
    YELLOW,
    Column,
    Placed,
    Query,
    lines,
    number,
    rows_of,
)

_RUNS = f'{JOB}, run_id=~"$run_id"'
_LINK = ("Open run", f"{RUN_LINK}${{__field.labels.run_id}}")


def fleet() -> Dashboard:
    """The dashboard of all runs."""
    return board(
        "ess-monitor-fleet",
        "ESS Monitor / Fleet",
        "Every training run of the job: state in use, collapsed layers, speed, alerts.",
        [
            values_of(
                "run_id", "Runs", f"label_values(ess_monitor_layers{{{JOB}}}, run_id)", "The runs to show.", multi=True
            )
        ],
        [Section("Now", (*_numbers(), _runs(), _alerts())), Section("Over time", _curves())],
        runs=_RUNS,
    )


def _numbers() -> tuple[Placed, ...]:
    bad = ((None, GREEN), (1, RED))
    return (
        number(
            "Runs under way",
            "Runs of which at least one rank says that it is running.",
            "short",
            Query(f'count(max by (run_id) (ess_monitor_run_status{{{_RUNS}, status="running"}}) == 1) or vector(0)'),
            width=5,
        ),
        number(
            "Unreachable ranks",
            "Targets that did not answer the last scrape. Nothing is known of them.",
            "short",
            Query(f"count(up{{{_RUNS}}} == 0) or vector(0)"),
            width=5,
            colors=bad,
        ),
        number(
            "Runs with a collapsed layer",
            "Runs in which at least one layer leaves its memory unused.",
            "short",
            Query(f"count(run:ess_monitor_layers_collapsed:count{{{_RUNS}}} > 0) or vector(0)"),
            width=5,
            colors=bad,
        ),
        number(
            "Firing alerts",
            "Alerts of all severities. The table further down says which.",
            "short",
            Query(f'count(ALERTS{{{_RUNS}, alertstate="firing"}}) or vector(0)'),
            width=5,
            colors=((None, GREEN), (1, YELLOW)),
        ),
        number(
            "Interventions applied",
            "What the autopilots changed within the time range. Every rank of a run counts the same action, so one of "
            "them is counted.",
            "short",
            Query(
                "sum(max by (run_id) (sum by (run_id, rank) "
                f'(round(increase(ess_monitor_interventions_total{{{_RUNS}, outcome="applied"}}[$__range])))))'
            ),
            colors=((None, BLUE),),
            decimals=0,
        ),
    )


def _runs() -> Placed:
    return rows_of(
        "Runs",
        "One line per run; its name leads to the run. Start with a run that has collapsed layers, or no recent step.",
        [
            f"max by (run_id, run_name, model, strategy, world_size) (ess_monitor_run_info{{{_RUNS}}})",
            f"max by (run_id, status) (ess_monitor_run_status{{{_RUNS}}} == 1)",
            f"run:ess_monitor_state_utilization:ratio{{{_RUNS}}}",
            f"run:ess_monitor_layers_collapsed:count{{{_RUNS}}}",
            f"max by (run_id) (ess_monitor_last_step{{{_RUNS}}})",
            f"max by (run_id) (rank:ess_monitor_steps:rate5m{{{_RUNS}}})",
            f"time() - max by (run_id) (ess_monitor_last_step_timestamp_seconds{{{_RUNS}}})",
            f"max by (run_id) (rank:ess_monitor_overhead:ratio_rate15m{{{_RUNS}}})",
        ],
        [
            Column("run_id", "Run", link=f'{RUN_LINK}${{__data.fields["Run"]}}'),
            Column("run_name", "Name"),
            Column("model", "Model"),
            Column("strategy", "Strategy"),
            Column("world_size", "Ranks"),
            Column("status", "Status"),
            Column("Value #C", "State in use", "percentunit"),
            Column("Value #D", "Collapsed layers"),
            Column("Value #E", "Step", "none"),
            Column("Value #F", "Steps per second"),
            Column("Value #G", "Since the last step", "s"),
            Column("Value #H", "Overhead", "percentunit"),
        ],
        hidden=("job", "Value #A", "Value #B"),
    )


def _alerts() -> Placed:
    return rows_of(
        "What fires now",
        "Each has a runbook of its name, with queries for the diagnosis. Alerts that Grafana manages itself are not "
        "here but under Alerting.",
        [f'max by (alertname, severity, run_id, rank, layer, exporter, part) (ALERTS{{{_RUNS}, alertstate="firing"}})'],
        [
            Column("severity", "Severity"),
            Column("alertname", "Alert"),
            Column("run_id", "Run", link=f'{RUN_LINK}${{__data.fields["Run"]}}'),
            Column("rank", "Rank"),
            Column("layer", "Layer"),
            Column("exporter", "Exporter"),
            Column("part", "Part"),
        ],
        hidden=("Value", "Value #A"),
        height=8,
    )


def _curves() -> tuple[Placed, ...]:
    return (
        lines(
            "State in use",
            "Effective size over capacity, summed over the layers of each run. Low for long while the loss stands "
            "still: memory is there and not used.",
            "percentunit",
            Query(f"run:ess_monitor_state_utilization:ratio{{{_RUNS}}}", "{{run_id}}"),
            limits=(0, 1),
            link=_LINK,
        ),
        lines(
            "Share of layers that are collapsed",
            "As the runs themselves say. When most layers have collapsed the cause is common to them.",
            "percentunit",
            Query(f"run:ess_monitor_layers_collapsed:ratio{{{_RUNS}}}", "{{run_id}}"),
            limits=(0, 1),
            link=_LINK,
        ),
        lines(
            "Steps per second",
            "Of the fastest rank of each run. A curve that falls to zero is a run that stands still.",
            "short",
            Query(f"max by (run_id) (rank:ess_monitor_steps:rate5m{{{_RUNS}}})", "{{run_id}}"),
            limits=(0, None),
            link=_LINK,
        ),
        lines(
            "Overhead of the monitor",
            "Time of the monitor over time of the steps, of the most expensive rank; the dashed line is the smallest "
            "budget among the runs.",
            "percentunit",
            Query(f"max by (run_id) (rank:ess_monitor_overhead:ratio_rate15m{{{_RUNS}}})", "{{run_id}}"),
            Query(f"min(ess_monitor_overhead_budget_ratio{{{_RUNS}}})", "budget", dashed=True),
            limits=(0, None),
            link=_LINK,
        ),
        lines(
            "Alerts over time",
            "How many of each kind fire.",
            "short",
            Query(f'count by (alertname, severity) (ALERTS{{{_RUNS}, alertstate="firing"}})', "{{alertname}}"),
            width=24,
            limits=(0, None),
            bars=True,
        ),
    )

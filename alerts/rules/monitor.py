"""Rules on the monitor itself: does it measure, what does it cost, do its sinks work."""

from __future__ import annotations

from ess_monitor.alerts.config import AlertsConfig
from ess_monitor.alerts.rules.base import PREFIX, Alert, Group, Record, duration, percent

OVERHEAD = "rank:ess_monitor_overhead:ratio_rate15m"
_TARGET = "job, instance, run_id, rank"


def monitor(config: AlertsConfig) -> Group:
    """The group of rules on the monitor's own work."""
    rules = (
        _overhead(config),
        _stale(config),
        _off(config),
        _costly(config),
        _errors(config),
        _cardinality(config),
    )
    return Group("ess_monitor.monitor", rules)


def _overhead(config: AlertsConfig) -> Record:
    job = f'job="{config.job}"'
    return Record(
        OVERHEAD,
        f"""
        sum by ({_TARGET}) (rate(ess_monitor_overhead_seconds_sum{{{job}}}[15m]))
        /
        (sum by ({_TARGET}) (rate(ess_monitor_training_step_seconds_sum{{{job}}}[15m])) > 0)
        """,
        "Time of the monitor, all phases, over the time of the steps. `> 0`: a run without a step has no ratio, not an "
        "infinite one.",
    )


def _stale(config: AlertsConfig) -> Alert:
    job = f'job="{config.job}"'
    return Alert(
        "MeasurementStale",
        f"""
        ess_monitor_last_step_timestamp_seconds{{{job}}}
        - (
          ess_monitor_last_measurement_timestamp_seconds{{{job}}}
          or
          ess_monitor_run_start_timestamp_seconds{{{job}}}
        )
        > {config.measurement_stale_seconds}
        """,
        "warning",
        "Run {{ $labels.run_id }} trains on but is no longer measured",
        "On rank {{ $labels.rank }} the last good measurement lies {{ $value | humanizeDuration }} before the last "
        f"step, more than {duration(config.measurement_stale_seconds)}. Sizes, conditions and the alerts on them are "
        "out of date.",
        "Against the last step, not the clock: a run that stands still is RunStalled's. A run that was never measured "
        "has no time of its last measurement; there the start of the run counts.",
        f"{config.runbook_base_url}/{PREFIX}MeasurementStale.md",
        300,
    )


def _off(config: AlertsConfig) -> Alert:
    job = f'job="{config.job}"'
    # `index` gives "" for a label that a series does not have, whatever the evaluator does with `$labels.part` then.
    summary = (
        '{{ with index $labels "part" }}Part {{ . }} of the monitor is off'
        '{{ else }}{{ with index $labels "exporter" }}Exporter {{ . }} is off'
        "{{ else }}Layers are no longer measured{{ end }}{{ end }} in run {{ $labels.run_id }}"
    )
    of_a_part = (
        '{{ if eq . "diagnosis" }}layers are measured and no longer judged: conditions are the last known ones'
        '{{ else if eq . "agreement" }}the ranks do not agree any more: each reads itself alone, and the autopilot '
        "does not act"
        '{{ else if eq . "intervention" }}the autopilot does nothing more: what it has attached stays as it is'
        '{{ else if eq . "export" }}the sinks get no more measurements; the endpoint goes on'
        "{{ else }}no more measurements come in: sizes and conditions are the last known ones{{ end }}"
    )
    of_the_rest = (
        '{{ with index $labels "exporter" }}the exporter {{ . }} gets no more measurements; the others do'
        '{{ else }}{{ printf "%.0f" $value }} of the layers failed again and again and were given up: their sizes and '
        "conditions are the last known ones{{ end }}"
    )
    return Alert(
        "PartOff",
        f"""
        ess_monitor_part_enabled{{{job}}} == 0
        or
        ess_monitor_exporter_enabled{{{job}}} == 0
        or
        ess_monitor_layers{{{job}}} - ess_monitor_layers_enabled{{{job}}} > 0
        """,
        "warning",
        summary,
        f'On rank {{{{ $labels.rank }}}} {{{{ with index $labels "part" }}}}{of_a_part}{{{{ else }}}}{of_the_rest}'
        "{{ end }}. The training goes on. It stays so for the rest of this run: the log has the reason, and a new "
        "monitor or a resumed run turns it on again.",
        "Without waiting: what has turned itself off after five failures in a row does not come back. A part, an "
        "exporter or, without a label of its own, the number of layers given up.",
        f"{config.runbook_base_url}/{PREFIX}PartOff.md",
    )


def _costly(config: AlertsConfig) -> Alert:
    return Alert(
        "OverheadHigh",
        f'{OVERHEAD}{{job="{config.job}"}} > {config.overhead_ratio:g}',
        "warning",
        "The monitor takes {{ $value | humanizePercentage }} of the step time of run {{ $labels.run_id }}",
        f"On rank {{{{ $labels.rank }}}} the monitor has taken more than {percent(config.overhead_ratio)} of the step "
        f"time for {duration(config.overhead_for_seconds)}. The histogram by phase tells where it goes.",
        "The budget of the process stretches the interval long before; this sees what the budget does not hold.",
        f"{config.runbook_base_url}/{PREFIX}OverheadHigh.md",
        config.overhead_for_seconds,
    )


def _errors(config: AlertsConfig) -> Alert:
    wait = duration(config.export_errors_for_seconds)
    job = f'job="{config.job}"'
    return Alert(
        "ExportErrors",
        f"""
        increase(ess_monitor_export_errors_total{{{job}}}[{wait}])
        + increase(ess_monitor_export_dropped_total{{{job}}}[{wait}])
        > 0
        """,
        "warning",
        "Exporter {{ $labels.exporter }} of run {{ $labels.run_id }} loses measurements",
        f"On rank {{{{ $labels.rank }}}} the exporter {{{{ $labels.exporter }}}} has raised or dropped measurements "
        f"for {wait}. The training is not affected; what this sink should hold is incomplete.",
        "With drops, as an exporter that failed five times in a row is off: from then on it drops, and raises no "
        "more. The window is as long as `for`, so that a single error does not fire.",
        f"{config.runbook_base_url}/{PREFIX}ExportErrors.md",
        config.export_errors_for_seconds,
    )


def _cardinality(config: AlertsConfig) -> Alert:
    return Alert(
        "CardinalityHigh",
        f'scrape_samples_scraped{{job="{config.job}"}} > {config.samples_per_scrape}',
        "info",
        'Rank {{ $labels.rank }} of run {{ $labels.run_id }} exports {{ printf "%.0f" $value }} samples',
        f"A scrape of {{{{ $labels.instance }}}} holds more than {config.samples_per_scrape} samples. Prometheus pays "
        "for each of them; measure fewer layers.",
        "A layer costs nine series, everything else together some 160.",
        f"{config.runbook_base_url}/{PREFIX}CardinalityHigh.md",
        600,
    )

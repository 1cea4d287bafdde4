"""Panels on what carries the measurement: the training loop, its ranks, and the monitor's own work."""

from __future__ import annotations

from ess_monitor.alerts.dashboards.parts import GREEN, RED, Placed, Query, lines, states


def ranks(run: str) -> tuple[Placed, ...]:
    """Speed, and whether the ranks of the run (matchers `run`) agree."""
    bucket = f"sum by (le) (rate(ess_monitor_training_step_seconds_bucket{{{run}}}[$__rate_interval]))"
    return (
        lines(
            "Steps per second",
            "Of each rank, over five minutes.",
            "short",
            Query(f"rank:ess_monitor_steps:rate5m{{{run}}}", "rank {{rank}}"),
            limits=(0, None),
        ),
        lines(
            "Duration of a step",
            "Median and slowest twentieth over all ranks, to within the buckets of the histogram.",
            "s",
            Query(f"histogram_quantile(0.5, {bucket})", "median"),
            Query(f"histogram_quantile(0.95, {bucket})", "95th percentile"),
            limits=(0, None),
        ),
        lines(
            "Utilization by rank",
            "Replicas of one model should lie close together.",
            "percentunit",
            Query(f"rank:ess_monitor_state_utilization:ratio{{{run}}}", "rank {{rank}}"),
            limits=(0, 1),
        ),
        lines(
            "Gap between ranks by layer",
            "Highest utilization of a rank less the lowest. A gap that stays is one of data, or of weights that parted "
            "ways. 0 with a single rank.",
            "percentunit",
            Query(f"run_layer:ess_monitor_state_utilization:range{{{run}}}", "{{layer}}"),
            limits=(0, None),
        ),
    )


def upkeep(run: str) -> tuple[Placed, ...]:
    """What the monitor costs on the run, and whether its measurements arrive."""
    return (
        states(
            "What works",
            "Parts of the monitor, its sinks and its layers, the worst rank of each. What is off stays off until a new "
            "monitor is attached or the run is resumed; the log has the reason.",
            Query(f"min by (part) (ess_monitor_part_enabled{{{run}}})", "{{part}}"),
            Query(f"min by (exporter) (ess_monitor_exporter_enabled{{{run}}})", "sink {{exporter}}"),
            Query(
                f"min(ess_monitor_layers_enabled{{{run}}} >= bool ess_monitor_layers{{{run}}})",
                "every layer",
            ),
            width=24,
            names={"1": ("works", GREEN), "0": ("off", RED)},
        ),
        lines(
            "Overhead",
            "Time of the monitor over time of the steps, by rank. Dashed is the budget, which the interval between "
            "samples is stretched to keep.",
            "percentunit",
            Query(f"rank:ess_monitor_overhead:ratio_rate15m{{{run}}}", "rank {{rank}}"),
            Query(f"max(ess_monitor_overhead_budget_ratio{{{run}}})", "budget", dashed=True),
            width=8,
            limits=(0, None),
        ),
        lines(
            "Where the time goes",
            "Seconds of the monitor per second of wall clock, all ranks, by phase.",
            "percentunit",
            Query(f"sum by (phase) (rate(ess_monitor_overhead_seconds_sum{{{run}}}[$__rate_interval]))", "{{phase}}"),
            width=8,
            limits=(0, None),
        ),
        lines(
            "Steps between samples",
            "As they are now. Above every_n_steps: the overhead budget has stretched them.",
            "short",
            Query(f"max(ess_monitor_measurement_interval_steps{{{run}}})", "interval"),
            width=8,
            limits=(0, None),
        ),
        lines(
            "Measurements",
            "Sampled steps by how they ended. Skipped now and then is harmless; failed is not.",
            "short",
            Query(
                f"sum by (outcome) (increase(ess_monitor_measurements_total{{{run}}}[$__rate_interval]))", "{{outcome}}"
            ),
            width=8,
            limits=(0, None),
            bars=True,
        ),
        lines(
            "Age of the last measurement",
            "Seconds by which it lies behind the last step, by rank. Grows without end where measuring has stopped.",
            "s",
            Query(
                f"max by (rank) (ess_monitor_last_step_timestamp_seconds{{{run}}} "
                f"- ess_monitor_last_measurement_timestamp_seconds{{{run}}})",
                "rank {{rank}}",
            ),
            width=8,
        ),
        lines(
            "Changes of condition",
            "How often layers entered each condition. Many of them: the thresholds are too close together.",
            "short",
            Query(
                f"sum by (condition) (increase(ess_monitor_condition_changes_total{{{run}}}[$__rate_interval]))",
                "{{condition}}",
            ),
            width=8,
            limits=(0, None),
            bars=True,
        ),
        lines(
            "Errors and drops of exporters",
            "Measurements that a sink raised on or did not take. The training is not affected; what the sink holds is "
            "incomplete.",
            "short",
            Query(
                f"sum by (exporter) (increase(ess_monitor_export_errors_total{{{run}}}[$__rate_interval]))",
                "{{exporter}} errors",
            ),
            Query(
                f"sum by (exporter) (increase(ess_monitor_export_dropped_total{{{run}}}[$__rate_interval]))",
                "{{exporter}} dropped",
            ),
            width=8,
            limits=(0, None),
            bars=True,
        ),
        lines(
            "Queues of exporters",
            "Measurements that wait for a sink. A queue that stays full drops.",
            "short",
            Query(f"max by (exporter) (ess_monitor_export_queue_length{{{run}}})", "{{exporter}}"),
            width=8,
            limits=(0, None),
        ),
        lines(
            "Samples per scrape",
            "What a rank costs Prometheus. Nine for every layer, and some 160.",
            "short",
            Query(f"scrape_samples_scraped{{{run}}}", "rank {{rank}}"),
            width=8,
            limits=(0, None),
        ),
    )

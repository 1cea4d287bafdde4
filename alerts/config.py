"""Settings of the alerting rules. Whether a layer is collapsed is decided by the process, not here."""

from __future__ import annotations

from pydantic import ConfigDict, Field, PositiveInt, field_validator

from ess_monitor.validation.settings import Settings


class AlertsConfig(Settings):
    """Job name, thresholds and waiting times of the alerting rules.

    Examples:
        >>> AlertsConfig(stalled_seconds=3600).stalled_seconds
        3600
    """

    model_config = ConfigDict(allow_inf_nan=False)

    job: str = Field(default="ess_monitor", pattern=r"^[A-Za-z0-9_./:-]+$")
    """Label `job` of the scrape configuration; every expression selects it."""
    runbook_base_url: str = Field(default="runbooks", pattern=r"^[^\s\"'{}]+$")
    """Where the runbooks can be read; `/<alert>.md` is appended. The default is the folder that is exported along."""
    grafana_datasource_uid: str = Field(default="ess-monitor-prometheus", pattern=r"^[A-Za-z0-9_-]{1,40}$")
    """Prometheus data source that Grafana-managed alerts ask. The default is the one that is provisioned along."""
    condition_for_seconds: PositiveInt = 600
    """How long a layer must be saturated or collapsed. The diagnosis has waited for several measurements already; ten
    minutes let the autopilot begin, so that nobody is called for what it fixes at once."""
    condition_keep_firing_seconds: PositiveInt = 300
    """How long these two go on firing after the layer has left the condition, so that one relapse is one message."""
    most_layers_ratio: float = Field(default=0.5, gt=0, lt=1)
    """Share of the judged layers above which collapse is a matter of the run and not of a layer: more than half."""
    most_layers_for_seconds: PositiveInt = 300
    """How long most layers must be collapsed: half as long as a single one, because the whole run is at stake."""
    divergence_ratio: float = Field(default=0.2, gt=0, lt=1)
    """Gap in utilization between two ranks. Batches of one distribution differ by some hundredths, so 0.2 is not the
    data."""
    divergence_for_seconds: PositiveInt = 900
    """How long the gap must last. Ranks may be scraped between different measurements; a quarter of an hour covers
    that."""
    flapping_actions: PositiveInt = 4
    """Applied actions in an hour above which it acts too often: two layers up a default ladder of two
    rungs. A run of the default `autopilot.budget` of 6 can pass it, and has then spent all but one action."""
    ineffective_for_seconds: PositiveInt = 3600
    """How long a layer may stay collapsed after an action; rescued runs recover within 1000 to 1500 steps."""
    stalled_seconds: PositiveInt = 900
    """Seconds without a step in a run that is under way: above a usual validation epoch or checkpoint."""
    start_seconds: PositiveInt = 3600
    """Seconds that a run may take to its first step: compiling, loading a data set and restoring a checkpoint are
    done once, and may be slow."""
    measurement_stale_seconds: PositiveInt = 1800
    """Seconds by which the last measurement may lie behind the last step. At 100 steps between samples it allows for
    steps of 18 s."""
    overhead_ratio: float = Field(default=0.05, gt=0, lt=1)
    """Share of the step time that the monitor may take: five times the default `overhead_budget_ratio`, for which the
    cadence has stretched the interval long before."""
    overhead_for_seconds: PositiveInt = 900
    """How long that must last. One expensive sample, for example a first one with its warm-up, does not fire."""
    export_errors_for_seconds: int = Field(default=600, ge=60)
    """How long errors of an exporter must go on, and the longest gap between two of them. At least a minute, as a
    window must hold a few scrapes."""
    target_down_for_seconds: PositiveInt = 300
    """How long a target may be unreachable: longer than a restart, and than service discovery needs to forget a run."""
    samples_per_scrape: PositiveInt = 5000
    """Samples of one target above which something is wrong: 48 layers make some 760."""

    @property
    def alive_seconds(self) -> int:
        """Age of the last step above which a process that says "running" is taken for one that was killed."""
        return max(self.stalled_seconds, self.measurement_stale_seconds)

    @field_validator("runbook_base_url")
    @classmethod
    def _without_slash(cls, value: str) -> str:
        return value.rstrip("/")

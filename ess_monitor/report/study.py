"""Reads what a study needs of many runs from their event logs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ess_monitor import validation
from ess_monitor.analysis.correlation import correlate, mean_of_known, pearson
from ess_monitor.analysis.study_results import Study, StudyRun
from ess_monitor.errors import ConfigError
from ess_monitor.records import Measurement
from ess_monitor.report.history import RunHistory, find_event_logs, load_histories

DEMANDS = ("kv_pairs", "num_kv_pairs", "kv", "tokens_to_copy")
"""Hyperparameters that are looked for, in this order, where no demand is named."""
_FEATURIZERS = ("featurizer", "mixer", "model")

Logs = Callable[[Sequence[Path]], Iterable[Path]]
"""Passes the logs on, one after another, and may show how far it is."""


def load_study(
    folder: str | Path,
    *,
    metric: str | None = None,
    demand: str | None = None,
    resamples: int = 1000,
    by_configuration: bool = False,
    seed: int = 0,
    progress: Logs | None = None,
) -> Study:
    """Read all runs of all event logs in a folder, and return how their sizes go along with what they learned.

    The task and the kind of layer are the hyperparameters `task` and `featurizer` (or `mixer`, `model`) of a run
    (`MonitorConfig.hyperparameters`); without the latter the classes of its layers. Sizes and metric are those of the
    last measurement that has them.

    Args:
        folder: of the runs.
        metric: the task metric; by default that of the diagnosis.
        demand: the hyperparameter that says what the task asks a memory for; by default the first of kv_pairs,
            num_kv_pairs, kv and tokens_to_copy that a run has.
        resamples: of the bootstrap, as in `correlate`.
        by_configuration: resample configurations, not runs, as in `correlate`.
        seed: of the bootstrap.
        progress: passes the logs on, such as `rich.progress.track`.

    Raises:
        ConfigError: there is no log or no run, or no run has the metric or the demand.

    Examples:
        >>> import tempfile
        >>> from ess_monitor.exporters.event_log.events import MeasurementEvent, RunStartedEvent, encode_event
        >>> from ess_monitor.records import Reading, RunInfo
        >>> def write(folder, k):
        ...     common = {"timestamp_seconds": 0.0, "run": f"run {k}"}
        ...     info = RunInfo(run_name=f"run {k}", model="Net", layers=(), hyperparameters={"kv_pairs": 4})
        ...     reading = Reading(step=1, layer="a", status="ok", effective_size=k, state_capacity=8.0)
        ...     measured = Measurement(
        ...         step=1, timestamp_seconds=0.0, readings=(reading,), metrics={"accuracy": k / 10}, conditions={}
        ...     )
        ...     events = [RunStartedEvent(data=info, **common), MeasurementEvent(data=measured, **common)]
        ...     Path(folder, f"{k}.jsonl").write_bytes(b"".join(map(encode_event, events)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for k in (1, 2, 3):
        ...         _ = write(folder, k)
        ...     study = load_study(folder, metric="accuracy")
        >>> len(study.runs), study.demand, study.correlations[0].r
        (3, 'kv_pairs', 1.0)
    """
    for name, text in (("metric", metric), ("demand", demand)):
        validation.optional(name, text, str, hint="a name, or leave it out")
    if progress is not None:
        validation.function("progress", progress, hint="such as rich.progress.track")
    logs = find_event_logs(folder)
    histories = [history for log in (logs if progress is None else progress(logs)) for history in load_histories(log)]
    if not histories:
        raise ConfigError(f"folder: {folder} holds no run; give a folder of event logs")
    metric = _metric(metric, histories)
    demand = _demand(demand, histories)
    runs = [_run(history, metric, demand) for history in histories]
    complete = sum(run.metric is not None and run.effective_size is not None for run in runs)
    notes = [f"{complete} of {len(runs)} runs have {metric} and ESS."] if complete < len(runs) else []
    if not demand:
        notes.append(
            "No run says what its task asks a memory for: set hyperparameters={'kv_pairs': ...} for its monitor, or "
            "name another one with demand."
        )
    return correlate(
        runs, metric=metric, demand=demand, resamples=resamples, by_configuration=by_configuration, seed=seed,
        notes=notes,
    )  # fmt: skip


def _metric(given: str | None, histories: Sequence[RunHistory]) -> str:
    known = sorted({name for history in histories for name in history.metric_names})
    named = {str(history.info.diagnosis.get("metric") or "") for history in histories} - {""}
    name = given if given is not None else (named.pop() if len(named) == 1 else "accuracy")
    if name not in known:
        raise ConfigError(f"metric: no run has {name!r}; give one of {', '.join(known) or 'the metrics of the loop'}")
    return name


def _demand(given: str | None, histories: Sequence[RunHistory]) -> str:
    known = sorted({name for history in histories for name in history.info.hyperparameters})
    if given is None:
        return next((name for name in DEMANDS if name in known), "")
    if given not in known:
        raise ConfigError(f"demand: no run has the hyperparameter {given!r}; they have {', '.join(known) or 'none'}")
    return given


def _run(history: RunHistory, metric: str, demand: str) -> StudyRun:
    facts = history.info.hyperparameters
    last = [readings[-1] for layer in history.layers if (readings := history.ok(layer))]
    classes = dict.fromkeys(layer.module for layer in history.info.layers)
    featurizer = next((str(facts[name]) for name in _FEATURIZERS if facts.get(name) is not None), ", ".join(classes))
    values = history.metric(metric)
    return StudyRun(
        name=history.info.run_name,
        log=str(history.path),
        task=str(facts.get("task") or ""),
        featurizer=featurizer,
        demand=_number(facts.get(demand)),
        state_capacity=mean_of_known(each.state_capacity for each in last),
        effective_size=mean_of_known(each.effective_size for each in last),
        entropy_size=mean_of_known(each.entropy_size for each in last),
        utilization_ratio=mean_of_known(each.utilization_ratio for each in last),
        metric=values[-1][1] if values else None,
        within_correlation=_within(history.measurements[1:], metric),
        hyperparameters=facts,
    )


def _within(measurements: Sequence[Measurement], metric: str) -> float | None:
    pairs = []
    for each in measurements:
        size = mean_of_known(reading.effective_size for reading in each.readings if reading.status == "ok")
        if size is not None and metric in each.metrics:
            pairs.append((size, each.metrics[metric]))
    return pearson([size for size, _ in pairs], [value for _, value in pairs])


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

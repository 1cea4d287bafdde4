"""Trains a run, and records all that the diagnosis of saturation can be given: readings, metrics, smaller states."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.saturation.catalog import SaturationRun
from benchmarks.saturation.sources import build_source
from benchmarks.trust.training import WARMUP_STEPS, draw, evaluate, evaluation_steps
from ess_monitor import Monitor, MonitorConfig
from ess_monitor.capture import find_layers
from ess_monitor.evidence.counterfactual import changes_of_batch, smaller_states
from ess_monitor.evidence.verdict import add_changes
from ess_monitor.featurizers import Backbone, BackboneConfig
from ess_monitor.records import Changes, Measurement
from ess_monitor.tasks import accuracy, loss

MEASURED_EVERY = 10
PROBED_EVERY = 50
PROBED_BATCHES = 8
"""As many as `EvidenceConfig.batches`."""
EVALUATED = 512
"""Sequences of an evaluation."""
KEPT = (
    *("state_capacity", "attainable_size", "effective_size", "utilization_ratio", "retention_ratio"),
    *("spectrum_end_ratio", "per_position"),
)
"""Fields of a reading that the diagnosis uses."""


class Recorder:
    """An exporter that keeps the numbers that the diagnosis needs."""

    name, inline = "recorder", True

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def start(self, run: Any, snapshot: Any) -> None:
        """Do nothing: there is nothing to open."""

    def export(self, measurement: Measurement) -> None:
        """Keep the numbers of each layer."""
        layers = {r.layer: [short(getattr(r, name)) for name in KEPT] for r in measurement.readings}
        metrics = {name: short(value) for name, value in measurement.metrics.items()}
        self.rows.append({"step": measurement.step, "metrics": metrics, "layers": layers})

    def close(self, status: Any) -> None:
        """Do nothing: there is nothing to close."""


def short(value: Any) -> Any:
    """Return a number, or each of several, with five digits."""
    if isinstance(value, tuple):
        return [short(each) for each in value]
    return None if value is None else float(f"{value:.5g}")


def train(run: SaturationRun, variant: str) -> dict[str, Any]:
    """Train one variant of a run; return its result as a JSON object."""
    torch.set_num_threads(1)
    setting, started = run.setting, time.perf_counter()
    source = build_source(setting.source, run.seed)
    torch.manual_seed(run.seed)
    model = Backbone(
        BackboneConfig(
            vocab_size=source.vocabulary,
            width=setting.model.width,
            depth=len(setting.model.featurizers),
            featurizer=setting.model.featurizers,
            state_size=setting.model.state_size * (2 if variant == "double" else 1),
            decoder="last_token" if setting.source.kind == "compression" else "every_token",
            mixer_options=setting.model.options,
        )
    )
    test = next(draw(source, 1, setting, 10 * run.seed + 2, batch=EVALUATED))
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.learning_rate, weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS))
    evaluated, evaluations = evaluation_steps(setting.steps), []
    recorder, probes = Recorder(), []
    config = MonitorConfig.load(
        every_n_steps=MEASURED_EVERY, overhead_budget_ratio=None, autopilot="off", environment=False
    )
    monitor = Monitor(model, config, exporters=[recorder]) if variant == "base" else None
    recent: list[tuple[Tensor, Tensor]] = []
    if monitor is not None:
        monitor.start()
    for step, (inputs, targets) in enumerate(draw(source, setting.steps, setting, 10 * run.seed), 1):
        batch = inputs.long(), targets.long()
        logits = model(batch[0])
        value = loss(logits, batch[1])
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if monitor is not None:
            recent = [*recent, batch][-PROBED_BATCHES:]
            metrics = {"loss": value.detach(), "accuracy": accuracy(logits.detach(), batch[1])}
            monitor.step(metrics if monitor.sample_due or monitor.armed else None)
            if step % PROBED_EVERY == 0:
                probes.append({"step": step, "layers": probe(model, recent)})
        if step in evaluated:
            evaluations.append(evaluate(model, test))
    if monitor is not None:
        monitor.flush()
        monitor.close()
    return {
        "name": run.name,
        "variant": variant,
        "kind": run.kind,
        "seed": run.seed,
        "split": run.split,
        "double": run.double,
        "settings": run.digest,
        "steps": setting.steps,
        "length": setting.source.length,
        "guess": source.entropy,
        "target": {"metric": setting.target.metric, "solved": solved(run, source.entropy)},
        "loss": short(sum(value for value, _ in evaluations) / len(evaluations)),
        "accuracy": short(sum(share for _, share in evaluations) / len(evaluations)),
        "rows": recorder.rows,
        "probes": probes,
        "seconds": round(time.perf_counter() - started, 2),
    }


def solved(run: SaturationRun, entropy: float) -> float:
    """Return the value of the metric from which the task counts as solved."""
    target = run.setting.target
    return target.solved * (entropy if target.metric == "loss" else 1.0)


def probe(model: Backbone, batches: list[tuple[Tensor, Tensor]]) -> dict[str, list[float]]:
    """Return the sums of `Changes` with a smaller state in each layer, without its kind."""
    counterfactuals = {layer.name: smaller_states(layer) for layer in find_layers(model)}
    sums = {name: Changes(kind="state_loss") for name in counterfactuals}
    for inputs, targets in batches:
        replay = partial(_loss_of, model, inputs, targets)
        for name, changes in changes_of_batch(model, counterfactuals, replay, gives_loss=True):
            sums[name] = add_changes(sums[name], changes)
    return {name: [short(number) for number in changes[:-1]] for name, changes in sums.items()}


def _loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return loss(model(inputs), targets)

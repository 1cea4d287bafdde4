"""Trains one variant of a run under a monitor, and returns what happened as plain values."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.detector import treat
from benchmarks.trust.models import build_model
from benchmarks.trust.settings import Setting, TrustRun, Variant, monitor_config, thresholds_digest
from benchmarks.trust.sources import Source, build_source
from ess_monitor import Monitor
from ess_monitor.diagnosis import DiagnosisConfig, Tracker
from ess_monitor.records import Measurement
from ess_monitor.tasks import IGNORED, accuracy, loss

WARMUP_STEPS = 50
RESTART_STEPS = 600
EVALUATIONS = 5
"""Evaluations whose mean is the final loss and accuracy. They are spread over the last tenth of the run."""
EVALUATED = 512
"""Sequences of an evaluation."""

Batch = tuple[Tensor, Tensor]


class SecondDiagnosis:
    """Diagnoses the same measurements with the task's metric, as an exporter, to see whether it proposes anything."""

    name, inline = "second_diagnosis", True

    def __init__(self, config: DiagnosisConfig) -> None:
        self._tracker: Tracker | None = None
        self._config = config
        self.proposes = False
        """Whether a layer was suspected, or called collapsed, at any measurement."""

    def start(self, run: Any, snapshot: Any) -> None:
        """Do nothing: there is nothing to open."""

    def export(self, measurement: Measurement) -> None:
        """Diagnose one measurement."""
        if self._tracker is None:
            self._tracker = Tracker(self._config, examined={reading.layer: "" for reading in measurement.readings})
        found = self._tracker.observe(measurement.readings, measurement.metrics, measurement.step)
        self.proposes |= bool(self._tracker.suspects) or any(one.condition == "collapsed" for one in found)

    def close(self, status: Any) -> None:
        """Do nothing: there is nothing to close."""


def train(run: TrustRun, variant: Variant) -> dict[str, Any]:
    """Train one variant of a run; return its result as a JSON object."""
    torch.set_num_threads(1)
    setting, started = run.setting, time.perf_counter()
    source = build_source(setting.source, run.seed)
    first = None if setting.first is None else build_source(setting.first, run.seed)
    before = None if setting.pretrained is None else build_source(setting.pretrained, run.seed)
    torch.manual_seed(run.seed)
    model = build_model(setting.model, max(part.vocabulary for part in (source, first, before) if part is not None))
    data_seed = 10 * run.seed + (5 if variant == "repeat" else 0)  # + 0 to 4: the parts of the data
    if before is not None:
        _pretrain(model, setting, draw(before, setting.pretrained_steps, setting, data_seed + 3))
    parts = [draw(source, setting.steps - setting.first_steps, setting, data_seed)]
    if first is not None:
        parts.insert(0, draw(first, setting.first_steps, setting, data_seed + 1))
    test = next(draw(source, 1, setting, 10 * run.seed + 2, batch=EVALUATED))
    target = setting.target
    solved = target.solved * (source.entropy if target.metric == "loss" else 1.0)
    mode = "min" if target.metric == "loss" else "max"
    with_metric = {"metric": target.metric, "metric_solved": solved, "metric_mode": mode}
    config = monitor_config(variant, {} if variant == "auto" else with_metric)
    second = SecondDiagnosis(monitor_config(variant, with_metric).diagnosis)

    batches = [batch for part in parts for batch in part]
    digest = hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in (*batches[0], *model.parameters())))
    optimizer, schedule = optimizer_and_schedule(model, setting, setting.steps)
    evaluated = evaluation_steps(setting.steps)
    evaluations = []
    with Monitor(model, config, exporters=[second] if variant == "auto" else []) as monitor:
        for step, (inputs, targets) in enumerate(batches):
            inputs, targets = inputs.long(), targets.long()
            if variant == "remedy":
                treat(step, model)
            logits = model(inputs)
            value = loss(logits, targets)
            _update(model, value, optimizer, schedule)
            metrics = {"loss": value.detach(), "accuracy": accuracy(logits.detach(), targets)}
            monitor.step(metrics, optimizer=optimizer, replay=partial(_loss_of, model, inputs, targets))
            if step + 1 in evaluated:
                evaluations.append((step + 1, *evaluate(model, test)))
        monitor.flush()
        snapshot, findings, actions = monitor.snapshot(), monitor.findings, monitor.actions
        conditions = monitor.conditions
    calm = not any(action.outcome == "applied" for action in actions)
    stands_for = ["control"] if variant in ("auto", "auto_metric") and calm else []
    if variant == "auto" and calm and not second.proposes:
        stands_for.append("auto_metric")
    return {
        "name": run.name,
        "variant": variant,
        "kind": run.kind,
        "label": run.label,
        "seed": run.seed,
        "split": run.split,
        "settings": run.digest,
        "thresholds": thresholds_digest(),
        "start": digest.hexdigest()[:12],
        "steps": setting.steps,
        "target": {"metric": target.metric, "solved": solved},
        "loss": _finite(sum(row[1] for row in evaluations) / len(evaluations)),
        "accuracy": sum(row[2] for row in evaluations) / len(evaluations),
        "evaluations": [[step, _finite(value), share] for step, value, share in evaluations],
        "findings": [
            {
                "step": finding.step,
                "layer": finding.layer,
                "condition": finding.condition,
                "previous": finding.previous,
                "evidence": None if finding.evidence is None else finding.evidence.model_dump(mode="json"),
            }
            for finding in findings
        ],
        "actions": [
            {
                "step": action.step,
                "layer": action.layer,
                "action": action.action,
                "outcome": action.outcome,
                "strength": action.strength,
                "message": action.message,
            }
            for action in actions
        ],
        "conditions": conditions,
        "stands_for": stands_for,
        "seconds": round(time.perf_counter() - started, 2),
        "monitor_seconds": round(sum(phase.total_seconds for phase in snapshot.overhead_seconds.values()), 3),
    }


def draw(source: Source, steps: int, setting: Setting, seed: int, *, batch: int | None = None) -> Iterator[Batch]:
    """Yield the batches of a part of the run, int16."""
    batch = setting.batch if batch is None else batch
    inputs_NL, targets_NL = source.draw(steps * batch, seed)
    if setting.noise:
        generator = torch.Generator().manual_seed(seed)
        replaced_NL = torch.rand(targets_NL.shape, generator=generator) < setting.noise
        random_NL = torch.randint(source.vocabulary, targets_NL.shape, generator=generator, dtype=torch.int16)
        targets_NL = torch.where(replaced_NL & (targets_NL != IGNORED), random_NL, targets_NL)
    yield from zip(inputs_NL.split(batch), targets_NL.split(batch), strict=True)


def evaluate(model: nn.Module, test: Batch) -> tuple[float, float]:
    """Return loss and accuracy on a batch, in evaluation mode."""
    inputs, targets = (part.long() for part in test)
    model.eval()
    with torch.no_grad():
        logits = model(inputs)
    model.train()
    return float(loss(logits, targets)), float(accuracy(logits, targets))


def evaluation_steps(steps: int) -> list[int]:
    """Return the steps of the evaluations: evenly spaced, the last one at the end."""
    return sorted({steps - round(k * steps / 10 / EVALUATIONS) for k in range(EVALUATIONS)})


def optimizer_and_schedule(
    model: nn.Module, setting: Setting, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return AdamW and its learning-rate schedule, both called at every step."""

    def rate(step: int) -> float:
        factor = min(1.0, (step + 1) / WARMUP_STEPS)
        if setting.schedule == "constant":
            return factor
        period = steps if setting.schedule == "cosine" else RESTART_STEPS
        return factor * 0.5 * (1 + math.cos(math.pi * (step % period) / period))

    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.learning_rate, weight_decay=0.1)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def _pretrain(model: nn.Module, setting: Setting, batches: Iterator[Batch]) -> None:
    optimizer, schedule = optimizer_and_schedule(model, setting, setting.pretrained_steps)
    for inputs, targets in batches:
        _update(model, _loss_of(model, inputs.long(), targets.long()), optimizer, schedule)


def _loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return loss(model(inputs), targets)


def _update(
    model: nn.Module,
    value: Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    optimizer.zero_grad()
    value.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

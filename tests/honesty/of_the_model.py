"""`ess_monitor`, `ess_monitor.capture`, `ess_monitor.diagnosis`, `ess_monitor.interventions`, `ess_monitor.runtime`."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import torch
from torch.distributed import HashStore

import ess_monitor
from ess_monitor import Monitor, analysis, capture, diagnosis, distributed, interventions, runtime
from ess_monitor.capture import find_layers
from ess_monitor.diagnosis import DiagnosisConfig
from tests.honesty.case import Case
from tests.honesty.data import (
    EVIDENCE,
    FINDING,
    MEASUREMENT,
    READING,
    RUN,
    STATE_EVIDENCE,
    floats,
    layer_with_alpha,
    model,
    sgd,
)

OF_THE_MODEL = "belongs to the model's own forward, whose errors are passed on"

NO_GRADIENTS = (RuntimeError, "torch has no backward pass on the device without memory")


def _train(monitor: Monitor, **step: Any) -> None:
    """Two steps with a sample, and the end."""
    with monitor:
        for _ in range(2):
            monitor.arm(any_pass=True)
            monitor.model(floats(2, 6, 8))
            monitor.step(**step)
        monitor.flush()


def _stepped(**given: Any) -> None:
    monitor = Monitor(model(), ess_monitor.MonitorConfig(every_n_steps=1))
    _train(monitor, **given)


def _running(use: Any) -> Any:
    def call(**given: Any) -> None:
        with Monitor(model()) as monitor:
            monitor.arm(any_pass=True)
            monitor.model(floats(2, 6, 8))
            use(monitor, **given)

    return call


def _sampled(monitor: Monitor, **given: Any) -> None:
    with monitor.sample(**given):
        monitor.model(floats(2, 6, 8))
    monitor.flush()


def _armed(**given: Any) -> None:
    sampler = capture.Sampler(**given)
    sampler.arm()
    sampler.remove()


class _Own(torch.nn.Module):
    """A layer of somebody's own."""


def _loaded(state: Any) -> None:
    Monitor(model()).load_state_dict(state)


PACKAGE: dict[str, Case] = {
    "Action": Case(
        ess_monitor.Action,
        lambda: {
            "step": 1,
            "layer": "a",
            "action": "advise",
            "outcome": "dry_run",
            "finding": "low",
            "message": "would",
        },
    ),
    "Evidence": Case(ess_monitor.Evidence, EVIDENCE.model_dump),
    "StateEvidence": Case(ess_monitor.StateEvidence, STATE_EVIDENCE.model_dump),
    "Finding": Case(ess_monitor.Finding, FINDING.model_dump),
    "LayerInfo": Case(ess_monitor.LayerInfo, RUN.layers[0].model_dump),
    "Measurement": Case(ess_monitor.Measurement, MEASUREMENT.model_dump),
    "Reading": Case(ess_monitor.Reading, READING.model_dump),
    "AutopilotConfig": Case(ess_monitor.AutopilotConfig),
    "CaptureConfig": Case(ess_monitor.CaptureConfig),
    "DiagnosisConfig": Case(ess_monitor.DiagnosisConfig),
    "EvidenceConfig": Case(ess_monitor.EvidenceConfig),
    "LayerFilter": Case(ess_monitor.LayerFilter),
    "LayerFilter.matches": Case(ess_monitor.LayerFilter().matches, lambda: {"name": "a"}),
    "MonitorConfig": Case(ess_monitor.MonitorConfig),
    "MonitorConfig.load": Case(lambda **given: ess_monitor.MonitorConfig.load(**{"environment": False, **given})),
    "RuntimeConfig": Case(ess_monitor.RuntimeConfig),
    "Monitor": Case(lambda **given: _train(Monitor(**given)), lambda: {"model": model()}),
    "Monitor.step": Case(_stepped, lambda: {"metrics": {"loss": 1.0}, "step": 3}),
    "Monitor.flush": Case(_running(Monitor.flush), lambda: {"timeout_seconds": 5.0}),
    "Monitor.close": Case(_running(Monitor.close), lambda: {"status": "finished", "timeout_seconds": 5.0}),
    "Monitor.disarm": Case(_running(Monitor.disarm), lambda: {"metrics": {"loss": 1.0}}),
    "Monitor.sample": Case(_running(_sampled), lambda: {"metrics": {"loss": 1.0}}),
    "Monitor.arm": Case(_running(Monitor.arm), lambda: {"any_pass": True}),
    "Monitor.note": Case(_running(Monitor.note), lambda: {"metrics": {"loss": 1.0}}),
    "Monitor.evaluates": Case(_running(Monitor.evaluates), lambda: {"now": True}),
    "Monitor.load_state_dict": Case(_loaded, lambda: {"state": Monitor(model()).state_dict()}),
    "capture_operators": Case(
        lambda model, inputs: ess_monitor.capture_operators(model, inputs),
        lambda: {"model": model(), "inputs": floats(2, 6, 8)},
        exempt={"inputs": OF_THE_MODEL},
    ),
    "describe": Case(ess_monitor.describe, lambda: {"model": model()}),
    "profile": Case(
        lambda model, inputs, **given: ess_monitor.profile(model, inputs, **given),
        lambda: {"model": model(), "inputs": floats(2, 6, 8)},
        exempt={"inputs": OF_THE_MODEL},
    ),
    "register_capture": Case(
        lambda **given: ess_monitor.register_capture(**given)(lambda *call: None),  # type: ignore[arg-type,return-value]
        lambda: {
            "layer": _Own,
            "state_capacity": lambda layer: 1,
            "channels": lambda layer: 1,
            "mixed": lambda *call: (call[-1], call[-1]),
        },
    ),
    "CaptureCheck": Case(ess_monitor.CaptureCheck, lambda: {"difference": 1e-6, "problem": "", "compared": "u"}),
    "check_capture": Case(
        lambda layer, inputs: ess_monitor.check_capture(layer, inputs),
        lambda: {"layer": layer_with_alpha(), "inputs": floats(2, 6, 8)},
        exempt={"inputs": OF_THE_MODEL},
    ),
}


def _one(model: Any) -> dict[str, float]:
    return {"loss": 1.0}


def _taken(layer: str, size: int, student: Any) -> None:
    assert layer
    assert size


ANALYSIS: dict[str, Case] = {
    "StudentTraining": Case(analysis.StudentTraining),
    "compressibility": Case(
        lambda model, inputs, **given: analysis.compressibility(model, inputs, **given),
        lambda: {
            "model": model(),
            "inputs": floats(2, 6, 8),
            "student_states": [1, 2],
            "trial": analysis.StudentTraining(operator_steps=0, activation_steps=0),
            "on_student": _taken,
            "progress": iter,
        },
        exempt={"inputs": OF_THE_MODEL},
    ),
    "correlate": Case(
        analysis.correlate, lambda: {"runs": [analysis.StudyRun(name="a", metric=1.0, effective_size=2.0)]}
    ),
    "hybrid_advice": Case(
        lambda model, inputs, **given: analysis.hybrid_advice(model, inputs, **given),
        lambda: {"model": model(), "inputs": floats(2, 6, 8)},
        exempt={"inputs": OF_THE_MODEL},
    ),
    "length_profile": Case(
        lambda model, inputs, **given: analysis.length_profile(model, inputs, **given),
        lambda: {"model": model(), "inputs": floats(2, 6, 8), "lengths": [3, 6], "progress": iter},
        exempt={"inputs": OF_THE_MODEL},
    ),
    "minimal_state": Case(
        lambda model, inputs, **given: analysis.minimal_state(model, inputs, **given),
        lambda: {"model": model(), "inputs": floats(2, 6, 8), "relative_errors": [0.1], "progress": iter},
        exempt={"inputs": OF_THE_MODEL},
    ),
    "reduce": Case(
        lambda model, inputs, **given: analysis.reduce(model, inputs, **given),
        lambda: {"model": model(), "inputs": floats(2, 6, 8), "state": 1, "evaluate": _one, "progress": iter},
        exempt={"inputs": OF_THE_MODEL},
    ),
}


def _modulated(model: Any, tokens: Any, **given: Any) -> Any:
    return analysis.state_modulation(model, tokens, **given)


ANALYSIS["state_modulation"] = Case(
    _modulated,
    lambda: {
        "model": torch.nn.Sequential(torch.nn.Embedding(8, 8), model()),
        "tokens": torch.arange(24).remainder(8)[None],
        "separators": [7],
        "substitutes": [3],
        "tolerances": [0.1],
        "progress": iter,
    },
    named={"tokens": "tokens|separators"},
)

ANALYSIS["shots_profile"] = Case(
    lambda model, prompts, **given: analysis.shots_profile(model, prompts, **given),
    lambda: {
        "model": torch.nn.Sequential(torch.nn.Embedding(8, 8), model()),
        "prompts": [torch.arange(12).remainder(8), torch.arange(24).remainder(8)],
        "question": 6,
        "progress": iter,
    },
)

CAPTURE: dict[str, Case] = {
    "CaptureConfig": PACKAGE["CaptureConfig"],
    "ModulationConfig": Case(capture.ModulationConfig, lambda: {"separators": [0]}),
    "LayerFilter": PACKAGE["LayerFilter"],
    "Sampler": Case(
        _armed,
        lambda: {"layers": find_layers(model()), "config": capture.CaptureConfig()},
        exempt={"off": "a set that the monitor's circuit breaker keeps", "turns": "an object of the run, or None"},
    ),
    "TokenProbe": Case(
        lambda **given: capture.TokenProbe(**given).run(0), lambda: {"model": torch.nn.Embedding(4, 2), "samples": 2}
    ),
    "CaptureCheck": PACKAGE["CaptureCheck"],
    "capture_operators": PACKAGE["capture_operators"],
    "check_capture": PACKAGE["check_capture"],
    "find_layers": Case(capture.find_layers, lambda: {"model": model()}),
    "layer_infos": Case(capture.layer_infos, lambda: {"model": model()}),
    "register_capture": PACKAGE["register_capture"],
}

DIAGNOSIS: dict[str, Case] = {
    "DiagnosisConfig": PACKAGE["DiagnosisConfig"],
    "Tracker": Case(diagnosis.Tracker),
    "Tracker.observe": Case(
        lambda **given: diagnosis.Tracker(DiagnosisConfig(metric="loss", metric_solved=0.1)).observe(**given),
        lambda: {"readings": [READING], "metrics": {"loss": 1.0}, "step": 3},
    ),
    "Tracker.load_state_dict": Case(
        lambda **given: diagnosis.Tracker().load_state_dict(**given),
        lambda: {"state": diagnosis.Tracker().state_dict()},
    ),
    "judge": Case(
        diagnosis.judge, lambda: {"reading": READING, "context": diagnosis.Context(), "config": DiagnosisConfig()}
    ),
    "thresholds": Case(diagnosis.thresholds, lambda: {"config": DiagnosisConfig()}),
}


def _pull(**given: Any) -> None:
    layer, handle = given["layer"], given["handle"]
    pull = interventions.IdentityPull(**given)
    pull.attach()
    try:
        (model_ := layer)(floats(2, 6, 8)).sum().backward()
        assert model_ is not None
        assert handle is not None
    finally:
        pull.detach()


def _collected(**given: Any) -> Any:
    with interventions.collect_penalties(**given) as penalties:
        given["model"](floats(2, 6, 8))
    return penalties.total()


def _pull_arguments() -> dict[str, Any]:
    [layer] = find_layers(model())
    return {"layer": layer.module, "handle": layer.spec.decay, "strength": 0.5, "grad_scale": lambda: 1.0}


def _with_gradient(log_decay: Any, strength: Any) -> Any:
    if isinstance(log_decay, torch.Tensor) and (log_decay.is_floating_point() or log_decay.is_complex()):
        log_decay = log_decay.requires_grad_()
    result = interventions.add_penalty_gradient(log_decay, strength)
    return result.abs().sum().backward()


def _alpha_arguments() -> dict[str, Any]:
    layer = layer_with_alpha()
    return {"layer": layer, "factor": 10.0, "optimizer": sgd(layer)}


def _restore_arguments() -> dict[str, Any]:
    layer = layer_with_alpha()
    return {"layer": layer, "copy": interventions.rescale_alpha(layer, 10.0), "optimizer": sgd(layer)}


INTERVENTIONS: dict[str, Case] = {
    "Autopilot": Case(
        lambda **given: interventions.Autopilot(**given).state_dict(),
        lambda: {"config": ess_monitor.AutopilotConfig(), "layers": find_layers(model())},
    ),
    "AutopilotConfig": PACKAGE["AutopilotConfig"],
    "IdentityPull": Case(_pull, _pull_arguments),
    "Penalties": Case(interventions.Penalties),
    "add_penalty_gradient": Case(
        _with_gradient,
        lambda: {"log_decay": -torch.rand(1, 2, 6, 3), "strength": 0.5},
        allowed={"log_decay": NO_GRADIENTS},
    ),
    "advise_alpha": Case(
        interventions.advise_alpha,
        lambda: {
            "build": lambda n: layer_with_alpha(),
            "state_sizes": (2, 4),
            "factors": (1.0, 10.0),
            "width": 8,
            "length": 8,
        },
        exempt={"build": "a function of the caller; what it raises is passed on"},
    ),
    "collect_penalties": Case(_collected, lambda: {"model": model()}),
    "identity_penalty": Case(interventions.identity_penalty, lambda: {"log_decay": -torch.rand(1, 2, 6, 3)}),
    "rescale_alpha": Case(interventions.rescale_alpha, _alpha_arguments),
    "restore_alpha": Case(interventions.restore_alpha, _restore_arguments),
}


def _computed(**given: Any) -> None:
    backend = runtime.HostBackend(**given)
    backend.launch(runtime.Task(backend, (), dict))


def _executed(**given: Any) -> None:
    executor: runtime.Executor[runtime.Job] = runtime.Executor(**given)
    executor.submit(runtime.Job())
    with closing(executor):
        executor.drain(1.0)


RUNTIME: dict[str, Case] = {
    "Breaker": Case(runtime.Breaker),
    "Cadence": Case(runtime.Cadence, lambda: {"every_n_steps": 10, "budget_ratio": 0.1}),
    "Executor": Case(_executed, lambda: {"config": runtime.RuntimeConfig()}),
    "Guard": Case(runtime.Guard, lambda: {"part": "capture"}),
    "HostBackend": Case(_computed, lambda: {"threads": 1}),
    "MetricReader": Case(runtime.MetricReader),
    "RuntimeConfig": PACKAGE["RuntimeConfig"],
    "SampleSizeBackoff": Case(runtime.SampleSizeBackoff),
    "backend_for": Case(runtime.backend_for, lambda: {"device": torch.device("cpu"), "threads": 1}),
}

DISTRIBUTED: dict[str, Case] = {
    "StoreConsensus": Case(
        distributed.StoreConsensus,
        lambda: {"store": HashStore(), "rank": 0, "world_size": 2, "measuring": [0, 1], "limit_seconds": 1.0},
    ),
    "DistributedConfig": Case(distributed.DistributedConfig),
    "measuring_ranks": Case(distributed.measuring_ranks, lambda: {"ranks": 3, "world_size": 8, "acts": False}),
}

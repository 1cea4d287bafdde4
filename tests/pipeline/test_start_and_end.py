"""What a monitor does before its start, after its end, in copies of its model, and in a run that is resumed."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
import socket
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ess_monitor import ConfigError, ExporterError, Monitor, MonitorConfig
from ess_monitor.evidence.call_recorder import CallRecorder
from ess_monitor.exporters import (
    PrometheusConfig,
    PrometheusExporter,
    TerminalExporter,
    TextfileConfig,
    TextfileExporter,
)
from ess_monitor.integrations.step_loss import StepLoss
from tests.eager import EAGER_DIAGNOSIS, NO_EVIDENCE


class Model(nn.Module):
    """Attention of torch's own, so that a file of it names nothing but torch and this test."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 8)
        self.mixer = nn.MultiheadAttention(8, 2, batch_first=True)
        self.monitor: Any = None

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embed(tokens)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        output: Tensor = self.mixer(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return output


TOKENS = torch.arange(12).remainder(8).reshape(2, 6)
METRICS = {"loss": 1.0, "accuracy": 0.5}
FAST = {"every_n_steps": 1, "overhead_budget_ratio": None}


def step(model: nn.Module, monitor: Monitor, **options: Any) -> None:
    model(TOKENS).square().mean().backward()
    monitor.step(**options)


def by_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    assert b"ess_monitor" not in file.getvalue()
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def by_pickle(model: nn.Module) -> nn.Module:
    data = pickle.dumps(model)
    assert b"ess_monitor" not in data
    loaded: nn.Module = pickle.loads(data)
    return loaded


@pytest.mark.parametrize("copied", [by_torch, by_pickle, copy.deepcopy])
@pytest.mark.parametrize("source", ["train", "validation", "random_tokens"])
def test_a_copy_of_a_sampled_model_holds_nothing_of_the_monitor(
    source: str, copied: Callable[[nn.Module], nn.Module]
) -> None:
    model = Model()
    with Monitor(model, MonitorConfig(**FAST, capture={"source": source})) as monitor:
        model.monitor = monitor
        if source == "validation":
            monitor.arm()
        loss, recorder = StepLoss(model), CallRecorder(model)
        recorder.attach()
        assert model._forward_pre_hooks
        twin = copied(model)
        recorder.detach()
        loss.take()
        before = monitor.armed, monitor.snapshot()
        assert torch.equal(twin(TOKENS), model.eval()(TOKENS))
    assert twin.monitor is None
    assert before[0] == (source != "random_tokens")
    # The copy is a model like any other: a monitor of its own measures it.
    twin.train()
    with Monitor(twin, MonitorConfig(**FAST)) as other:
        step(twin, other)
        assert [reading.status for reading in other.flush()] == ["ok"]


def test_a_copy_can_be_compiled_as_a_whole() -> None:
    model = Model()
    with Monitor(model, MonitorConfig(**FAST)):
        twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="eager", fullgraph=True)
    assert torch.equal(compiled(TOKENS), model(TOKENS))


CALLS: list[Callable[[Monitor], Any]] = [Monitor.step, Monitor.arm, Monitor.flush, lambda m: m.sample().__enter__()]


@pytest.mark.parametrize("call", CALLS)
def test_a_monitor_that_was_not_started_says_how_to(call: Callable[[Monitor], Any]) -> None:
    monitor = Monitor(Model())
    with pytest.raises(ConfigError, match=r"not started.*`with Monitor"):
        call(monitor)
    monitor.load_state_dict(monitor.state_dict())  # as a run that resumes does before its start
    monitor.evaluates(False)
    monitor.close()


def test_calls_after_the_end_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    with Monitor(model, MonitorConfig(**FAST)) as monitor:
        step(model, monitor)
    hooks = len(model._forward_pre_hooks)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            step(model, monitor)
        with monitor.sample():
            model(TOKENS)
        monitor.close()
        readings = monitor.flush()
    told = [record.message for record in caplog.records if "closed" in record.message]
    assert len(told) == 1
    assert "step" in told[0]
    assert (monitor.snapshot().steps_total, hooks, len(readings)) == (1, 0, 1)


@pytest.mark.parametrize("modes", [("off", "off"), ("auto", "auto"), ("auto", "advise"), ("advise", "auto")])
def test_new_settings_hold_from_the_resume_on(modes: tuple[str, str]) -> None:
    def monitor_of(model: nn.Module, every: int, mode: str, lag: int) -> Monitor:
        autopilot = {"mode": mode, **({"lag_steps": lag, "loss": "loss"} if mode == "auto" else {})}
        settings = {"diagnosis": EAGER_DIAGNOSIS, "evidence": NO_EVIDENCE, "overhead_budget_ratio": None}
        return Monitor(model, MonitorConfig(every_n_steps=every, autopilot=autopilot, **settings))

    model = Model()
    with monitor_of(model, 1000, modes[0], 500) as first:
        for _ in range(7):
            step(model, first, metrics=METRICS)
        state = first.state_dict()
    with monitor_of(model, 4, modes[1], 2) as second:
        second.load_state_dict(state)
        armed = []
        for _ in range(9):
            armed.append((second._step, second.armed))
            step(model, second, metrics=METRICS)
    taken = [number for number, is_armed in armed if is_armed]
    # In lockstep the sample of step 0 is judged first, at the next step.
    assert taken == ([8, 12] if modes == ("auto", "auto") else [7, 11, 15])


def hooks_in(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def interrupted_cell(model: nn.Module, steps: int = 2, **settings: Any) -> Monitor:
    """What a notebook's cell leaves behind that was interrupted between start and close."""
    monitor = Monitor(model, MonitorConfig(**FAST, **settings))
    monitor.start()
    for _ in range(steps):
        step(model, monitor)
    return monitor


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_monitor_that_was_left_open_leaves_the_model_to_the_next_one(
    wrapped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = Model()
    left = interrupted_cell(model)
    assert left.armed
    again = interrupted_cell(nn.Sequential(model) if wrapped else model)
    assert left.snapshot().status == "failed"
    assert ("never closed" in caplog.text, "its model" in caplog.text) == (True, True)
    assert [reading.status for reading in again.flush()] == ["ok"]
    again.close()
    assert hooks_in(model) == 0


def test_a_monitor_that_was_dropped_while_it_was_open_leaves_no_hook() -> None:
    model = Model()
    left = interrupted_cell(model)
    assert hooks_in(model) > 0
    gone = weakref.ref(left)
    del left
    gc.collect()
    assert gone() is None
    assert hooks_in(model) == 0
    model(TOKENS)


def test_monitors_of_one_model_run_side_by_side_where_somebody_will_close_them() -> None:
    model = Model()
    with Monitor(model, MonitorConfig(**FAST)) as outer:
        step(model, outer)
        with Monitor(model, MonitorConfig(**FAST, capture={"source": "validation"})) as inner, inner.sample():
            model(TOKENS)
        assert outer.snapshot().status == "running"
    first, second = interrupted_cell(model, steps=0), interrupted_cell(model, steps=0)
    step(model, first)
    step(model, second)
    other = interrupted_cell(Model())
    assert [each.snapshot().status for each in (first, second, other)] == ["running"] * 3
    for each in (first, second, other):
        each.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def serving(port: int, linger_seconds: float = 0.0) -> Monitor:
    endpoint = {"kind": "prometheus", "port": port, "linger_seconds": linger_seconds}
    return Monitor(Model(), MonitorConfig(**FAST, exporters=(endpoint,)))


@pytest.mark.parametrize("linger_seconds", [0.0, 60.0])
def test_a_training_that_begins_again_takes_the_port_of_one_that_was_never_closed(
    linger_seconds: float, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    left = serving(port, linger_seconds)
    left.start()
    step(left.model, left)
    with serving(port) as again:
        assert left.snapshot().status == "failed"
        assert [f":{port}/" in (exporter.url or "") for exporter in again.exporters] == [True]  # type: ignore[attr-defined]
    assert "never closed" in caplog.text


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_monitor_that_runs_beside_another_is_not_closed_but_named(elsewhere: bool) -> None:
    """It is about to begin, or belongs to another thread."""
    port = free_port()
    first, second = serving(port), serving(port)
    if elsewhere:
        thread = threading.Thread(target=lambda: (first.start(), step(first.model, first)))
        thread.start()
        thread.join()
    else:
        first.start()
    with pytest.raises(ExporterError, match=rf"port {port} is in use by another monitor of this process.*close\(\)"):
        second.start()
    assert first.snapshot().status != "failed"
    first.close()
    second.start()
    second.close()


def test_exporters_that_serve_a_second_run_begin_anew(tmp_path: Path) -> None:
    tables: list[str] = []
    endpoint, file = (
        PrometheusExporter(PrometheusConfig(port=0)),
        TextfileExporter(TextfileConfig(path=tmp_path / "x.prom")),
    )
    seen, table = list[str](), TerminalExporter(write=tables.append)
    for run in range(2):
        model = Model()
        with Monitor(model, MonitorConfig(every_n_steps=9), exporters=[endpoint, file, table]) as monitor:
            step(model, monitor)
            monitor.flush()
            seen += [exporter.identity.run_id for exporter in (endpoint, file) if exporter.identity is not None]
        assert ["step 0" in text for text in tables] == [True] * (run + 1)
    assert seen[0] == seen[1] != seen[2] == seen[3]


@pytest.mark.parametrize(
    "wrong", [torch.tensor(0.5), 0.5, "loss", [("loss", 0.5)]], ids=["tensor", "number", "name", "pairs"]
)
def test_a_loss_in_the_place_of_the_metrics_is_answered_with_the_right_call(wrong: object) -> None:
    with Monitor(Model()) as monitor:
        for call in ("step", "note", "disarm"):
            with pytest.raises(ConfigError, match=rf'^metrics: an? .*given; .*as in {call}\(\{{"loss": loss\}}\)'):
                getattr(monitor, call)(wrong)
        with pytest.raises(ConfigError, match="metrics"), monitor.sample(wrong):  # type: ignore[arg-type]
            raise AssertionError("the block must not run")
        assert monitor.snapshot().steps_total == 0

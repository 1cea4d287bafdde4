"""Faults of the training loop: clocks that jump, interrupts, several monitors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

import ess_monitor.capture.sampler as sampler
import ess_monitor.pipeline.queue as measuring
from ess_monitor import Monitor, MonitorConfig
from tests.faults.harness import (
    SETTINGS,
    Collecting,
    Injection,
    Outcome,
    backbone,
    batches,
    case,
    hooks_of,
    loss_of,
    state_bytes,
    train,
    watch,
)


@case("the wall clock jumps back by a day at its 20th reading")
def wall_clock_jumps_back(injection: Injection) -> Outcome:
    clock = _jumping(1e9, 1.0, back=86_400.0, at=20)
    run = watch(wall_clock=clock)
    times = [m.timestamp_seconds for m in run.sink.measurements]
    return Outcome(
        run.unchanged,
        {
            "timestamps show it": any(b < a for a, b in itertools.pairwise(times)),
            "goes on, status ok": run.sink.steps == [0, 2, 4, 6, 8, 10] and set(run.statuses) == {"ok"},
        },
    )


@case("the performance clock jumps back by an hour at its 20th reading")
def performance_clock_jumps_back(injection: Injection) -> Outcome:
    clock = _jumping(0.0, 0.001, back=3600.0, at=20)
    run = watch(settings={"overhead_budget_ratio": 1.0}, clock=clock)
    costs = [histogram.total_seconds for histogram in run.snapshot.overhead_seconds.values()]
    return Outcome(
        run.unchanged,
        {
            "no time is negative": min(costs) >= 0 and run.snapshot.step_seconds.total_seconds >= 0,
            "overhead stays a share": 0 <= run.snapshot.overhead_ratio < 10,
            "sampling goes on": len(run.sink.steps) >= 2 and run.snapshot.interval_steps < 1000,
        },
    )


def _jumping(start: float, tick: float, *, back: float, at: int) -> Callable[[], float]:
    """Return a clock that advances by `tick` at every reading, and jumps back once."""
    readings = itertools.count()

    def clock() -> float:
        number = next(readings)
        return start + tick * number - (back if number >= at else 0.0)

    return clock


@case("Ctrl-C arrives while a hook copies a layer's tensors; the loop goes on with the same batch")
def interrupt_in_a_hook(injection: Injection) -> Outcome:
    return _interrupted(injection, sampler, "part_of")


@case("Ctrl-C arrives while the sample is handed to the worker; the loop goes on")
def interrupt_in_the_submission(injection: Injection) -> Outcome:
    # Called for each layer that is handed over, and never when results are read, whenever that is.
    return _interrupted(injection, measuring.MeasurementQueue, "_task")


def _interrupted(injection: Injection, module: Any, name: str) -> Outcome:
    expected, interrupts, calls = train(backbone()), [], itertools.count()
    original = getattr(module, name)

    def interrupted(*args: Any, **named: Any) -> Any:
        if next(calls) == 5:  # the second layer of the third sample
            raise KeyboardInterrupt
        return original(*args, **named)

    injection.patch.setattr(module, name, interrupted)
    model, sink, losses = backbone(), Collecting(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with Monitor(model, MonitorConfig.load(environment=False, **SETTINGS), exporters=[sink]) as monitor:
        for tokens in batches():
            try:
                loss = loss_of(model, tokens)
            except KeyboardInterrupt:
                interrupts.append("forward")
                loss = loss_of(model, tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            try:
                monitor.step({"loss": loss})
            except KeyboardInterrupt:
                interrupts.append("step")
    return Outcome(
        expected.endswith(state_bytes(model)) and not hooks_of(model),
        {
            "the interrupt reaches the loop": len(interrupts) == 1,
            "later samples ok": {6, 8, 10} <= set(sink.steps)
            and {r.status for m in sink.measurements for r in m.readings} == {"ok"},
            "status finished": sink.closed == ["finished"],
        },
    )


@case("Ctrl-C in the middle of a sample ends the run")
def interrupt_ends_the_run(injection: Injection) -> Outcome:
    def interrupt(*args: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    data, sink, model = batches(), Collecting(), backbone()
    expected = train(backbone(), data[:4])
    reached = False
    try:
        with Monitor(model, MonitorConfig.load(environment=False, **SETTINGS), exporters=[sink]) as monitor:

            def after_step(step: int, loss: torch.Tensor) -> None:
                monitor.step({"loss": loss})
                if step == 3:
                    injection.patch.setattr(sampler, "part_of", interrupt)

            train(model, data, after_step=after_step)
    except KeyboardInterrupt:
        reached = True
    return Outcome(
        expected.endswith(state_bytes(model)) and not hooks_of(model),
        {"the interrupt reaches the caller": reached, "status failed": sink.closed == ["failed"]},
    )


@case("two monitors watch one model, at different steps")
def two_monitors_on_one_model(injection: Injection) -> Outcome:
    expected = train(backbone())
    model, sinks = backbone(), (Collecting(), Collecting())
    first, second = (
        Monitor(model, MonitorConfig.load(environment=False, **{**SETTINGS, "every_n_steps": steps}), exporters=[sink])
        for steps, sink in zip((2, 3), sinks, strict=True)
    )

    def after_step(step: int, loss: torch.Tensor) -> None:
        first.step({"loss": loss})
        second.step({"loss": loss})

    with first, second:
        result = train(model, after_step=after_step)
    together = zip((m for m in sinks[0].measurements if m.step in (0, 6)), sinks[1].measurements[::2], strict=True)
    return Outcome(
        result == expected and not hooks_of(model),
        {
            "each samples its own steps": [s.steps for s in sinks] == [[0, 2, 4, 6, 8, 10], [0, 3, 6, 9]],
            "the same step, the same readings": [a.readings[0].per_head for a, _ in together] != [],
        },
    )


@case("two monitors patch one op of transformers' Mamba, and the first one closes first")
def two_monitors_on_one_op(injection: Injection) -> Outcome:
    import transformers

    def build() -> Any:
        torch.manual_seed(0)
        config = transformers.MambaConfig(vocab_size=16, hidden_size=16, num_hidden_layers=2, use_cache=False)
        return transformers.MambaForCausalLM(config)

    module = transformers.models.mamba.modeling_mamba
    before = dict(vars(module))
    data = batches(6)
    expected = train(build(), data)
    model, sinks = build(), (Collecting(), Collecting())
    settings = MonitorConfig.load(environment=False, **{**SETTINGS, "every_n_steps": 1})
    first, second = (Monitor(model, settings, exporters=[sink]) for sink in sinks)

    def after_step(step: int, loss: torch.Tensor) -> None:
        second.step({"loss": loss})
        if step == 3:
            first.close()
        first.step({"loss": loss})

    first.start()
    with second:
        result = train(model, data, after_step=after_step)
    statuses = [{r.status for m in sink.measurements for r in m.readings} for sink in sinks]
    return Outcome(
        result == expected and not hooks_of(model),
        {
            "both measure": statuses == [{"ok"}, {"ok"}],
            "the one that stays goes on": sinks[1].steps == [0, 1, 2, 3, 4, 5] and len(sinks[0].steps) < 6,
            "the library's functions are back": all(vars(module)[name] is value for name, value in before.items()),
        },
    )

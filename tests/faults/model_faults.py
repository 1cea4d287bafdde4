"""Faults of the monitored model: NaN and Inf, layers that cannot be captured, a model that is edited."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import nn

from ess_monitor import Monitor
from ess_monitor.capture import Layer, Sampler
from ess_monitor.ess import DiagonalRecurrence
from tests.faults.harness import ROOT, Injection, Outcome, backbone, case, watch
from tests.programs import run_program


def _wait(step: int, monitor: Monitor) -> None:
    """Wait for the worker, so that a sample is judged at most one sample later."""
    monitor.flush(30.0)


@case("NaN is written into a weight of the second layer at step 5")
def NaN_in_weights(injection: Injection) -> Outcome:
    return _poisoned(injection, math.nan)


@case("Inf is written into a weight of the second layer at step 5")
def Inf_in_weights(injection: Injection) -> Outcome:
    return _poisoned(injection, math.inf)


def _poisoned(injection: Injection, value: float) -> Outcome:
    def edit(step: int, model: nn.Module) -> None:
        if step == 5:
            with torch.no_grad():
                next(model.get_submodule("blocks.1.mixer").parameters()).view(-1)[0] = value

    run = watch(edit=edit)
    before, after = run.sink.measurements[:3], run.sink.measurements[3:]
    return Outcome(
        run.unchanged,
        {
            "status ok before": {r.status for m in before for r in m.readings} == {"ok"},
            "status nonfinite": all(r.status == "nonfinite" for m in after for r in m.readings if "1" in r.layer),
            "nonfinite_total": run.snapshot.nonfinite_total["blocks.1.mixer"] == len(after) == 3,
        },
    )


@case("the input of the second layer's recurrence is NaN in one forward pass")
def NaN_in_activations(injection: Injection) -> Outcome:
    return _poisoned_activations(math.nan)


@case("the input of the second layer's recurrence is Inf in one forward pass")
def Inf_in_activations(injection: Injection) -> Outcome:
    return _poisoned_activations(math.inf)


def _poisoned_activations(value: float) -> Outcome:
    handles = []

    def edit(step: int, model: nn.Module) -> None:
        core = model.get_submodule("blocks.1.mixer.core")
        if step == 4:
            handles.append(core.register_forward_pre_hook(lambda m, args: (args[0] * value, *args[1:])))
        if step == 5:
            handles.pop().remove()

    run = watch(edit=edit)
    statuses = {m.step: [r.status for r in m.readings] for m in run.sink.measurements}
    return Outcome(
        run.unchanged,
        {
            "status nonfinite": statuses[4] == ["ok", "nonfinite"],
            "nonfinite_total": run.snapshot.nonfinite_total["blocks.1.mixer"] >= 1,
        },
    )


@case("the capture of all layers raises, at every sample")
def layers_raise_in_capture(injection: Injection) -> Outcome:
    def explode(*args: object, **kwargs: object) -> None:
        raise RuntimeError("injected")

    injection.patch.setattr(DiagonalRecurrence, "select", explode)
    run = watch(meanwhile=_wait, steps=14)
    counts, health = run.snapshot.measurements_total, run.snapshot.health
    return Outcome(
        run.unchanged,
        {
            "status failed, why": set(run.statuses) == {"failed"}
            and all("RuntimeError: injected" in r.message for m in run.sink.measurements for r in m.readings),
            "five failed, then skipped": (counts["failed"], counts["ok"]) == (5, 0) and counts["skipped"] >= 1,
            "part_failures_total": health.part_failures_total["capture"] == 10,
            "layers_off": len(health.layers_off) == 2,
            "log, once": injection.said("capture failed (layer blocks.0.mixer: RuntimeError: injected)") == 1
            and injection.said("Attach a new monitor to turn it on again") == 1,
        },
    )


@case("the capture of one layer raises, at every sample")
def one_layer_raises_in_capture(injection: Injection) -> Outcome:
    original = Sampler._take

    def take(self: Sampler, layer: Layer, call: Any) -> Any:
        if layer.name == "blocks.1.mixer":
            raise RuntimeError("injected")
        return original(self, layer, call)

    injection.patch.setattr(Sampler, "_take", take)
    run = watch(meanwhile=_wait, steps=16)
    of_it = [r for m in run.sink.measurements for r in m.readings if r.layer == "blocks.1.mixer"]
    health = run.snapshot.health
    return Outcome(
        run.unchanged,
        {
            "five readings failed": [r.status for r in of_it] == ["failed"] * 5,
            "the fifth says how to go on": "attach a new monitor to turn it on again" in of_it[-1].message,
            "layers_off": health.layers_off == ("blocks.1.mixer",) and health.parts_off == (),
            "log, once": injection.said("layer blocks.1.mixer failed in 5 samples in a row and is off") == 1,
            "the other goes on": [r.status for m in run.sink.measurements for r in m.readings if r not in of_it]
            == ["ok"] * 8,
        },
    )


@case("the second layer's parameters are frozen at step 5")
def layer_frozen(injection: Injection) -> Outcome:
    def edit(step: int, model: nn.Module) -> None:
        if step == 5:
            model.get_submodule("blocks.1").requires_grad_(False)

    run = watch(edit=edit)
    return Outcome(run.unchanged, {"goes on, status ok": set(run.statuses) == {"ok"} and len(run.sink.steps) == 6})


@case("the second block is taken out of the model at step 5")
def layer_removed(injection: Injection) -> Outcome:
    def edit(step: int, model: nn.Module) -> None:
        if step == 5:
            del model.blocks[1]  # type: ignore[union-attr, operator]

    return _unseen_after(watch(edit=edit))


@case("the second layer is replaced by a new one at step 5")
def layer_replaced(injection: Injection) -> Outcome:
    def edit(step: int, model: nn.Module) -> None:
        if step == 5:
            torch.manual_seed(5)
            model.blocks[1].mixer = backbone().blocks[1].mixer  # type: ignore[union-attr, index]

    return _unseen_after(watch(edit=edit))


def _unseen_after(run) -> Outcome:
    """Check a run in which a layer is no longer called after step 5."""
    late = [m for m in run.sink.measurements if m.step > 5]
    return Outcome(
        run.unchanged,
        {
            "status failed, why": all(
                [r.status for r in m.readings] == ["ok", "failed"] and "was not called" in m.readings[1].message
                for m in late
            )
            and len(late) == 3
        },
    )


@case("the model becomes double precision at step 5")
def dtype_changed(injection: Injection) -> Outcome:
    def edit(step: int, model: nn.Module) -> None:
        if step == 5:
            model.double()

    # SGD has no moments: moments in single precision would be a fault of the loop.
    run = watch(edit=edit, make_optimizer=torch.optim.SGD)
    return Outcome(run.unchanged, {"goes on, status ok": set(run.statuses) == {"ok"} and len(run.sink.steps) == 6})


@case("the model moves to a second device (simulated) at step 5, and back at step 9")
def device_changed(injection: Injection) -> Outcome:
    # A process of its own, because a device stays registered in torch.
    run = run_program(["-m", "tests.faults.second_device"], injection.folder, cwd=ROOT)
    return Outcome(**json.loads(run.stdout))


@case("a block is added to the model at step 5")
def layer_added(injection: Injection) -> Outcome:
    def edit(step: int, model: nn.Module) -> None:
        if step == 5:
            torch.manual_seed(5)
            model.blocks.append(backbone().blocks[0])  # type: ignore[union-attr, operator]

    run = watch(edit=edit)
    return Outcome(
        run.unchanged,
        {
            "the others go on, status ok": set(run.statuses) == {"ok"} and len(run.sink.steps) == 6,
            "log, once": injection.said("layer blocks.2.mixer was added to the model after the monitor was attached")
            == 1,
        },
    )

"""Whatever a checkpoint holds as the monitor's state, it is loaded and usable, or a CheckpointError."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ess_monitor import CheckpointError, Monitor, MonitorConfig
from ess_monitor.featurizers import GLAS6
from ess_monitor.integrations.common import CallbackBase, LoopFacts
from ess_monitor.integrations.json_state import from_json, to_json
from ess_monitor.records import Changes, Reading
from tests.fuzz.inputs import SCALARS, damaged, fuzz, is_short, nested

CONFIG = MonitorConfig.load(
    environment=False,
    every_n_steps=4,
    runtime={"queue_length": 4},
    diagnosis={"warmup_steps": 0},
    autopilot={"mode": "auto", "lag_steps": 2},
)


def model() -> GLAS6:
    return GLAS6(8, 2)


def treatment(action: str) -> dict[str, Any]:
    saved = {"tensor": torch.zeros(2), "moments": {"exp_avg": torch.zeros(2)}} if action == "rescale_alpha" else None
    return {
        "layer": "model", "action": action, "finding": "low", "rung": 0, "strength": 0.5, "step": 3, "first_step": 3,
        "recovered_step": None, "loss_at_start": 1.0, "utilization_before": 0.1, "retention_before": 0.5, "trial": None,
        "copy": saved, "factor": 10.0,
    }  # fmt: skip


def with_moments(moments: dict[str, Any]) -> dict[str, Any]:
    return {**treatment("rescale_alpha"), "copy": {"tensor": torch.zeros(2), "moments": moments}}


def with_setting(**changed: Any) -> dict[str, Any]:
    return {**STATE["replays"], "settings": {**STATE["replays"]["settings"], **changed}}


def whole_state() -> dict[str, Any]:
    state = Monitor(model(), CONFIG).state_dict()
    reading = Reading(step=4, layer="model", status="ok", effective_size=1.0)
    layer = {"name": "model", "condition": "healthy", "candidate": "healthy", "streak": 0, "utilizations": [0.5]}
    layer |= {"evidence": None, "evidence_age": 0, "obstacle": ""}
    layer |= {"state_evidence": None, "state_evidence_age": 0, "state_obstacle": "", "full_streak": 0}
    layer |= {"suspected": None}
    changes = Changes(2, 3.0, 0.1, 0.2, 0.3, 0.01)._asdict()
    return {
        **state,
        "evidence": {
            "step": 4,
            "readings": [reading.model_dump(mode="json")],
            "metrics": {"loss": 1.0},
            "nonfinite": [],
            "changes": {"model": changes},
            "slowness": {"model": 1.5},
        },
        "judge_at": 6,
        "autopilot": {**state["autopilot"], "given_up": ["model"], "treatments": [treatment("rescale_alpha")]},
        "cadence": {**state["cadence"], "steps": [0.1, 0.2]},
        "diagnosis": {**state["diagnosis"], "metrics": [0.5], "layers": [layer]},
    }


STATE = whole_state()
VALUES = nested(st.one_of(SCALARS, st.just(torch.zeros(3)), st.just(torch.tensor(float("nan")))))
DAMAGED = damaged(STATE, VALUES)
MONITOR = Monitor(model(), CONFIG)


def cyclic() -> dict[str, Any]:
    state = copy.deepcopy(STATE)
    state["diagnosis"]["metrics"] = state["ledger"]["nonfinite"] = state
    return state


def deep(levels: int = 20_000) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def check(state: Any) -> None:
    """Refused with our error; or taken, and then every part of the monitor that reads it works."""
    MONITOR.load_state_dict(STATE)
    before = str(MONITOR.state_dict())
    try:
        MONITOR.load_state_dict(state)
    except CheckpointError as error:
        is_short(str(error), 2000)
        assert str(MONITOR.state_dict()) == before, "half of a state was loaded"
        return
    MONITOR.snapshot().model_dump_json()
    again = MONITOR.state_dict()
    json.dumps(to_json(again))  # as the next checkpoint has it
    MONITOR.load_state_dict(again)
    assert MONITOR._context.cadence.due(10) in (True, False)
    MONITOR._context.cadence.spent(0.1)
    MONITOR._context.cadence.sampled(10)


def test_a_whole_state_is_loaded_as_it_is() -> None:
    MONITOR.load_state_dict(STATE)
    assert str(MONITOR.state_dict()) == str(STATE)


@fuzz(usual=250, long=8000)
@given(state=DAMAGED)
@example(state={**STATE, "version": torch.zeros(2)})
@example(state={**STATE, "version": 10**5000})
@example(state={**STATE, "step": float("inf")})
@example(state={**STATE, "autopilot": {**STATE["autopilot"], "spent": 10**5000}})
@example(state={**STATE, "autopilot": {**STATE["autopilot"], "treatments": [with_moments({"step": [-(10**5000)]})]}})
@example(state={**STATE, "diagnosis": {**STATE["diagnosis"], "version": 10**5000}})
@example(state={**STATE, "cadence": {**STATE["cadence"], "sample_cost": 1e308, "steps": [1e-320]}})
@example(state={**STATE, "ledger": {**STATE["ledger"], "measurements": {"ok": "many"}}})
@example(state={**STATE, "autopilot": {**STATE["autopilot"], "spent": 3}, "diagnosis": {"version": 2}})
@example(state={**STATE, "diagnosis": {**STATE["diagnosis"], "metrics": [0.25]}, "autopilot": {"version": 2}})
@example(
    state={**STATE, "autopilot": {**STATE["autopilot"], "treatments": [{**treatment("rescale_alpha"), "rung": "x"}]}}
)
def test_a_damaged_state_is_refused_or_leaves_a_monitor_that_works(state: Any) -> None:
    check(state)


@fuzz(usual=150, long=4000)
@given(
    state=st.one_of(VALUES, st.dictionaries(st.sampled_from(list(STATE)), VALUES).map(lambda s: {"version": 1, **s}))
)
def test_any_value_is_refused_or_leaves_a_monitor_that_works(state: Any) -> None:
    check(state)


@fuzz(usual=60, long=3000)
@given(state=st.one_of(DAMAGED, VALUES))
@example(state={**STATE, "autopilot": {**STATE["autopilot"], "version": 2}})
@example(state={**STATE, "diagnosis": {**STATE["diagnosis"], "version": 2}})
@example(state={**STATE, "replays": with_setting(enabled=torch.zeros(3))})
def test_a_callback_refuses_a_damaged_state_before_it_watches_anything(state: Any) -> None:
    callback, watched = CallbackBase(CONFIG, table=False), model()
    facts = LoopFacts(0, 0, 1, strategy="single", precision="32", grad_scale=lambda: 1.0)
    try:
        callback.load_state_dict(state)
        callback._open(watched, facts, list)
    except CheckpointError as error:
        is_short(str(error), 2000)
        assert callback.monitor is None
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in watched.modules())
        return
    callback._close("finished")


TENSOR = to_json(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
ATTRIBUTES = st.sampled_from(
    ["float64", "int8", "bool", "load", "nn", "_C", "Tensor", "quint8", "complex32", "", None, 3]
)
SHAPES = st.one_of(st.lists(st.one_of(NUMBER := st.integers(-3, 2**70), st.none()), max_size=4), NUMBER, st.text())


@fuzz(usual=200, long=6000)
@given(
    value=st.one_of(
        damaged({"copy": [TENSOR, TENSOR]}, VALUES),
        st.fixed_dictionaries({"tensor:base64": SCALARS, "dtype": ATTRIBUTES, "shape": SHAPES}),
        st.fixed_dictionaries(
            {"tensor:base64": st.just(TENSOR["tensor:base64"]), "dtype": ATTRIBUTES, "shape": SHAPES}
        ),
    )
)
def test_json_is_read_or_refused(value: Any) -> None:
    try:
        from_json(value)
    except CheckpointError as error:
        is_short(str(error), 2000)


@pytest.mark.parametrize("mode", ["off", "advise"])
def test_a_treatment_is_checked_in_every_mode(mode: str) -> None:
    monitor = Monitor(model(), MonitorConfig(autopilot=mode))  # type: ignore[arg-type]
    state = {**STATE, "judge_at": None, "evidence": None}
    monitor.load_state_dict(state)
    broken = {**state["autopilot"], "treatments": [{**treatment("rescale_alpha"), "strength": "strong"}]}
    with pytest.raises(CheckpointError, match=r"autopilot.*strength"):
        monitor.load_state_dict({**state, "autopilot": broken})


BOTTOMLESS = {
    "a state in itself": cyclic,
    "lists alone": deep,
    "lists as the evidence": lambda: {**STATE, "evidence": deep()},
    "lists as a loss": lambda: {**STATE, "diagnosis": {**STATE["diagnosis"], "metrics": deep()}},
}


@pytest.mark.parametrize("name", BOTTOMLESS)
def test_a_state_without_a_bottom_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="state"):
        MONITOR.load_state_dict(BOTTOMLESS[name]())


def test_json_without_a_bottom_is_refused() -> None:
    with pytest.raises(CheckpointError, match="nested too deep"):
        from_json(deep())

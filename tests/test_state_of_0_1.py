"""A checkpoint state that version 0.1 saved loads, and is saved again as it was, beside what has been added since.

The files in tests/data hold `Monitor.state_dict()` of the loops in tests/pipeline/test_autopilot.py, written with
torch.save by 0.1 after 13 steps (mode auto) and 21 (advise).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pipeline.test_autopilot import Loop, config

DATA = Path(__file__).with_name("data")


def saved(mode: str, featurizer: str) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(DATA / f"state_0.1_{mode}_{featurizer}.pt", weights_only=True)
    return state


def plain(value: Any) -> Any:
    """The same with tensors as lists, so that two states can be compared."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def part_of(new: Any, old: Any) -> Any:
    """What `new` has under the keys of `old`, at every depth."""
    if isinstance(new, dict) and isinstance(old, dict):
        return {name: part_of(new[name], item) for name, item in old.items()}
    if isinstance(new, list) and isinstance(old, list) and len(new) == len(old):
        return [part_of(*pair) for pair in zip(new, old, strict=True)]
    return new


@pytest.mark.parametrize(("mode", "featurizer"), [("auto", "wla"), ("auto", "gla_s6"), ("advise", "wla")])
def test_it_loads_and_is_saved_again_as_it_was(mode: str, featurizer: str) -> None:
    state, loop = saved(mode, featurizer), Loop(config(mode), featurizer)
    loop.monitor.load_state_dict(state)
    again = loop.monitor.state_dict()
    assert again.keys() - state.keys() == {"replays", "layer_turns", "undecayed"}
    assert part_of(plain(again), plain(state)) == plain(state)
    loop.monitor.close()


def test_what_0_1_only_advised_on_is_treated_after_a_resume_in_mode_auto() -> None:
    state, loop = saved("advise", "wla"), Loop(config("auto"), "wla")
    assert state["autopilot"]["told"] == {"blocks.1.mixer": True}
    loop.monitor.load_state_dict(state)
    loop.step = state["step"]
    loop.run(8)
    assert ("blocks.1.mixer", "applied") in [(action.layer, action.outcome) for action in loop.monitor.actions]
    loop.monitor.close()


@pytest.mark.parametrize(
    ("featurizer", "action"), [("wla", "pull_to_identity"), ("gla_s6", "rescale_alpha")], ids=["pull", "alpha"]
)
def test_a_treatment_goes_on_and_its_sample_is_judged_at_its_step(featurizer: str, action: str) -> None:
    state, loop = saved("auto", featurizer), Loop(config("auto"), featurizer)
    assert [(each["layer"], each["action"]) for each in state["autopilot"]["treatments"]] == [
        ("blocks.1.mixer", action)
    ]
    assert state["evidence"]["readings"]
    loop.monitor.load_state_dict(state)
    loop.step = state["step"]
    while loop.step < state["judge_at"]:
        assert loop.monitor.readings == ()
        loop.run(1)
    assert {reading.step for reading in loop.monitor.readings} == {state["evidence"]["step"]}
    assert loop.monitor.snapshot().interventions_active[action] == 1
    loop.monitor.close()


def test_a_monitor_that_is_closed_before_its_start_leaves_no_treatment_behind() -> None:
    def gradients(loop: Loop) -> list[torch.Tensor]:
        loop.model.zero_grad()
        loop.model(torch.arange(24).reshape(2, 12) % 4).square().mean().backward()
        return [parameter.grad.clone() for parameter in loop.model.parameters() if parameter.grad is not None]

    loop = Loop(config("auto"), "wla")
    before = gradients(loop)
    loop.monitor.load_state_dict(saved("auto", "wla"))
    assert not all(map(torch.equal, gradients(loop), before))
    loop.monitor.close()
    assert all(map(torch.equal, gradients(loop), before))

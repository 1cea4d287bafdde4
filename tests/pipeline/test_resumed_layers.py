"""A state finds its layers in a model that is wrapped, renamed, or has other layers than the one it was saved with."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from ess_monitor import Monitor, MonitorConfig
from ess_monitor.featurizers import WLA
from ess_monitor.pipeline.checkpoint import match_layers
from ess_monitor.records import Changes, Evidence, Reading, StateEvidence
from tests.eager import EAGER_DIAGNOSIS

CONFIG = MonitorConfig.load(
    environment=False,
    every_n_steps=4,
    overhead_budget_ratio=None,
    diagnosis=EAGER_DIAGNOSIS,
    autopilot={"mode": "auto", "lag_steps": 2},
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = WLA(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mixer(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Around(nn.Module):
    """Holds a model under a name."""

    def __init__(self, attribute: str, model: nn.Module) -> None:
        super().__init__()
        self.attribute = attribute
        self.add_module(attribute, model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = getattr(self, self.attribute)(x)
        return output


def around(*attributes: str) -> Callable[[nn.Module], nn.Module]:
    def wrapped(model: nn.Module) -> nn.Module:
        for attribute in reversed(attributes):
            model = Around(attribute, model)
        return model

    return wrapped


def around_blocks(wrapper: Callable[[nn.Module], nn.Module]) -> Callable[[Any], nn.Module]:
    def wrapped(model: Any) -> nn.Module:
        model.blocks = nn.ModuleList([wrapper(block) for block in model.blocks])
        return model  # type: ignore[no-any-return]

    return wrapped


COMPILED = partial(torch.compile, backend="eager")
WRAPPERS: dict[str, Callable[[Any], nn.Module]] = {
    "compiled": COMPILED,
    "data parallel": nn.DataParallel,
    "checkpointed blocks": around_blocks(checkpoint_wrapper),
    "compiled blocks": around_blocks(COMPILED),
    "a model in each block": around_blocks(around("model")),
    "averaged": lambda model: torch.optim.swa_utils.AveragedModel(model),
    **{
        ".".join(names): around(*names)
        for names in (
            ("model",), ("_forward_module",), ("_fsdp_wrapped_module",), ("_checkpoint_wrapped_module",), ("net",),
            ("base_model", "model"), ("module", "_orig_mod", "model"), ("pipe", "model", "module"),
        )
    },
}  # fmt: skip


def full_state(monitor: Monitor, treated: str, advised: str) -> dict[str, Any]:
    """A state that names layers wherever a state can."""
    reading = Reading(step=4, layer=treated, status="ok", effective_size=1.0).model_dump(mode="json")
    changes = Changes(2, 3.0, 0.1, 0.2, 0.3, 0.01)._asdict()
    sizes: dict[str, Any] = {"step": 4, "basis": "loss", "batches": 2, "base": 3.0, "reason": "seen"}
    decay = Evidence(layer=treated, m50=0.1, m90=0.2, cut=0.3, outcome="loud", **sizes)
    size = StateEvidence(layer=treated, quarter=0.1, half=0.2, whole=0.3, outcome="spare", **sizes)
    history = {"candidate": "collapsed", "streak": 1, "utilizations": [0.25], "full_streak": 0, "suspected": None}
    history |= {"condition": "collapsed", "evidence_age": 1, "obstacle": "", "state_evidence_age": 1}
    history |= {"state_obstacle": "", "evidence": None, "state_evidence": None}
    examined = {"evidence": decay.model_dump(mode="json"), "state_evidence": size.model_dump(mode="json")}
    treatment = {
        "layer": treated, "action": "pull_to_identity", "finding": "low", "rung": 1, "strength": 2.0, "step": 3,
        "first_step": 3, "recovered_step": None, "loss_at_start": 1.0, "utilization_before": 0.1,
        "retention_before": 0.5, "trial": None, "copy": None, "factor": 1.0,
    }  # fmt: skip
    state = monitor.state_dict()
    layers = [{"name": advised, **history}, {"name": treated, **history, **examined}]
    return {
        **state,
        "step": 5,
        "judge_at": 6,
        "evidence": {
            "step": 4, "readings": [reading], "metrics": {}, "nonfinite": [treated], "changes": {treated: changes},
            "slowness": {treated: 1.5},
        },
        "diagnosis": {**state["diagnosis"], "layers": layers},
        "autopilot": {
            **state["autopilot"], "given_up": [advised], "told": {advised: True}, "treatments": [treatment],
        },
        "ledger": {**state["ledger"], "nonfinite": {advised: 1, treated: 2}},
    }  # fmt: skip


@pytest.mark.parametrize("inward", [False, True])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_state_is_that_of_the_same_layers_whatever_the_model_is_wrapped_in(
    wrapper: str, inward: bool, caplog: pytest.LogCaptureFixture
) -> None:
    plain, wrapped = Net(), WRAPPERS[wrapper](Net())
    first, second = (Monitor(model, CONFIG) for model in ((wrapped, plain) if inward else (plain, wrapped)))
    state = full_state(first, *reversed(first.layers))
    second.load_state_dict(state)
    text = json.dumps(state)
    for old, new in zip(first.layers, second.layers, strict=True):
        text = text.replace(f'"{old}"', f'"{new}"')
    assert json.loads(json.dumps(second.state_dict())) == json.loads(text)
    assert not caplog.records
    hooks = [name for name, module in second.model.named_modules() if module._forward_pre_hooks]
    assert any("blocks.1" in name for name in hooks), "the treatment is attached to the layer that it was of"
    assert not any("blocks.0" in name for name in hooks)
    second.close()


def named(*blocks: str) -> nn.Module:
    """The same layers under other names."""
    return nn.Sequential(*(around(name)(Block()) for name in blocks))


def test_what_is_known_of_layers_that_are_gone_is_dropped_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    first = Monitor(named("early", "late", "last"), CONFIG)
    early, late, last = first.layers
    state = full_state(first, treated=late, advised=last)
    state["ledger"]["nonfinite"][early] = 3
    second = Monitor(named("early", "new", "last"), CONFIG)
    with caplog.at_level(logging.WARNING):
        second.load_state_dict(state)
    assert [record.getMessage().count(late) for record in caplog.records] == [1]
    text = str(second.state_dict())
    assert late not in text
    assert last in text
    assert second.conditions == {early: "unknown", second.layers[1]: "unknown", last: "collapsed"}
    assert second.snapshot().nonfinite_total == {early: 3, second.layers[1]: 0, last: 1}
    assert not any(module._forward_pre_hooks for module in second.model.modules())
    second.load_state_dict(second.state_dict())
    assert len(caplog.records) == 1
    second.close()


def test_a_run_that_is_resumed_in_a_wrapper_goes_on_with_its_sample() -> None:
    first = Monitor(Net(), CONFIG)
    state = full_state(first, *reversed(first.layers))
    model = around("net")(Net())
    with Monitor(model, CONFIG) as second:
        second.load_state_dict(state)
        for _ in range(2):
            model(torch.randn(2, 8, 8)).sum().backward()
            second.step({"accuracy": 0.1, "loss": 1.0})
        assert {reading.layer for reading in second.readings} == {second.layers[1]}
        assert second.readings[0].step == 4


@pytest.mark.parametrize("first_is_new", [False, True])
def test_the_first_layer_is_that_of_this_model(first_is_new: bool) -> None:
    """Spared is the first of several layers, as little as it uses. Both readings are of a collapsed layer."""
    config = MonitorConfig.load(
        environment=False, diagnosis={"warmup_steps": 0, "patience": 1}, evidence={"enabled": False}, autopilot="off"
    )
    old = Monitor(named("gone", "kept"), config)
    state = full_state(old, *old.layers)
    state["autopilot"]["treatments"], state["judge_at"], state["evidence"] = [], None, None
    for layer in state["diagnosis"]["layers"]:
        layer.update(condition="unknown", candidate="unknown", evidence=None, state_evidence=None)
    others = (
        (around("new")(Block()), around("kept")(Block())) if first_is_new else (nn.Identity(), *named("kept", "new"))
    )
    new = Monitor(nn.Sequential(*others), config)
    new.load_state_dict(state)
    low = {"status": "ok", "length": 16, "state_capacity": 4.0, "attainable_size": 4.0, "effective_size": 0.4}
    readings = [Reading(step=6, layer=name, utilization_ratio=0.1, retention_ratio=0.2, **low) for name in new.layers]
    findings = new._results._tracker.observe(readings, {}, 6)
    assert [finding.layer for finding in findings if finding.condition == "collapsed"] == [new.layers[1]]


@pytest.mark.parametrize(
    ("saved", "present", "expected"),
    [
        (["a", "b"], ["b", "a"], {"a": "a", "b": "b"}),
        (["a", "b"], ["a", "c"], {"a": "a"}),
        (["a"], ["model.a", "module.a"], {}),
        (["model.a", "base_model.a"], ["a"], {}),
        (["a"], ["a", "model.a"], {"a": "a"}),
        (["a.module.b"], ["model.a.b"], {"a.module.b": "model.a.b"}),
        (["modules.a"], ["a.modules"], {}),
        (["model"], ["module"], {"model": "module"}),
        (["model"], ["net.mixer"], {}),
        (["0.a", "1.a"], ["net.0.a", "net.1.a"], {"0.a": "net.0.a", "1.a": "net.1.a"}),
        (["net.0.a", "net.1.a"], ["0.a", "1.a", "2.a"], {"net.0.a": "0.a", "net.1.a": "1.a"}),
        (["0.a", "1.a"], ["net.0.a"], {}),
        (["0.a", "1.a"], ["net.0.a", "head.1.a"], {}),
        (["0.a"], ["encoder.0.a", "decoder.0.a"], {}),
        (["0.a"], ["10.a"], {}),
        (["0.a", "1.a"], ["0.a", "net.1.a"], {"0.a": "0.a"}),
        ([], ["a"], {}),
        (["a"], [], {}),
    ],
)
def test_names_are_matched_and_not_guessed(saved: list[str], present: list[str], expected: dict[str, str]) -> None:
    assert match_layers(saved, present) == expected

"""A regularizer that fails leaves activations and gradients as they would be without it, and is taken off."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

import ess_monitor.interventions.identity_pull as regularizer
from ess_monitor.capture import find_layers
from ess_monitor.interventions import Autopilot, AutopilotConfig, IdentityPull
from tests.interventions.helpers import DECAYING, Checkpointed, backbone, batch, gradients, last_layer, task_loss
from tests.interventions.pilots import FIRST, LAST, Run


def explode(*args: Any, **kwargs: Any) -> Any:
    raise ZeroDivisionError("injected")


WHERE = {
    "reading the decay": {"read": explode},
    "handing the decay back": {"write": explode},
    "the gradient's way in": "_with_gradient",
    "the penalty's gradient": "_penalty_gradients",
}
"""Fields of the handle, or a function of the module."""


def pulled(model: Any, failures: list[Exception], handle: dict[str, Any] | None = None, **options: Any) -> IdentityPull:
    layer = last_layer(model)
    assert layer.spec.decay is not None
    decay = dataclasses.replace(layer.spec.decay, **(handle or {}))
    return IdentityPull(layer.module, decay, 0.5, on_failure=failures.append, **options)


@pytest.mark.parametrize("where", sorted(WHERE))
@pytest.mark.parametrize("featurizer", DECAYING)
def test_a_failing_pull_leaves_losses_and_gradients_bitwise_as_they_are(
    featurizer: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare, model = backbone(featurizer), backbone(featurizer)
    failures: list[Exception] = []
    fault = WHERE[where]
    pull = pulled(model, failures, fault if isinstance(fault, dict) else None)
    pull.attach()
    if isinstance(fault, str):
        monkeypatch.setattr(regularizer, fault, explode)
    for seed in range(3):
        losses = [task_loss(m, batch(seed)) for m in (bare, model)]
        for loss in losses:
            loss.backward()
        assert torch.equal(*losses)
        assert all(map(torch.equal, gradients(model), gradients(bare)))
    assert [str(error) for error in failures] == ["injected"], "told once"
    assert pull.failure is failures[0]


def test_a_scale_that_cannot_be_asked_for_leaves_the_gradients_as_they_are() -> None:
    bare, model = backbone("gla"), backbone("gla")
    failures: list[Exception] = []
    pulled(model, failures, grad_scale=explode).attach()
    for m in (bare, model):
        task_loss(m, batch(0)).backward()
    assert all(map(torch.equal, gradients(model), gradients(bare)))
    assert len(failures) == 1


def test_after_a_failure_nothing_is_added_though_it_would_work_again(monkeypatch: pytest.MonkeyPatch) -> None:
    bare, model = backbone("gla"), backbone("gla")
    pulled(model, []).attach()
    with monkeypatch.context() as patch:
        patch.setattr(regularizer, "_penalty_gradients", explode)
        task_loss(model, batch(0)).backward()
        gradients(model)
    for m in (bare, model):
        task_loss(m, batch(1)).backward()
    assert all(map(torch.equal, gradients(model), gradients(bare)))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_failure_between_two_checkpointed_passes_does_not_break_the_recomputation(
    use_reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare, model = backbone("gla"), backbone("gla")
    pulled(model, []).attach()
    for m in (bare, model):
        m.blocks[1].mixer = Checkpointed(m.blocks[1].mixer, use_reentrant=use_reentrant)
    monkeypatch.setattr(regularizer, "_penalty_gradients", explode)
    for m in (bare, model):
        first, second = task_loss(m, batch(0)), task_loss(m, batch(1))
        first.backward()  # fails behind this one
        second.backward()
    assert all(map(torch.equal, gradients(model), gradients(bare)))


class TestUnderTheAutopilot:
    def run(self, failures: list[str], **settings: Any) -> Run:
        run = Run("gla", **settings)
        run.pilot = Autopilot(
            AutopilotConfig.model_validate({"mode": "auto", "cooldown_steps": 200, "release_steps": 300, **settings}),
            find_layers(run.model),
            retention_below=0.7,
            on_failure=lambda message, error: failures.append(f"{message} | {type(error).__name__}"),
        )
        return run

    def test_it_is_taken_off_with_an_action_that_says_why_and_tried_again_at_the_next_rung(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        failures: list[str] = []
        run = self.run(failures, strengths=[0.5, 1.0])
        collapsed = {LAST: "collapsed"}
        assert [action.outcome for action in run.measure(collapsed)] == ["applied"]
        with monkeypatch.context() as patch:
            patch.setattr(regularizer, "_penalty_gradients", explode)
            run.train(3)
        assert failures == [f"the regularizer on {LAST}: ZeroDivisionError: injected | ZeroDivisionError"]
        [action] = run.measure(collapsed)
        assert (action.outcome, action.layer, action.action) == ("failed", LAST, "pull_to_identity")
        assert "ZeroDivisionError: injected" in action.message
        assert sum(len(m._forward_pre_hooks) for m in run.model.modules()) == 0
        [action] = run.measure(collapsed)
        assert (action.outcome, action.strength) == ("applied", 1.0)
        task_loss(run.model, batch(0)).backward()
        free = copy.deepcopy(run.model)
        free.zero_grad()
        task_loss(free, batch(0)).backward()
        assert not all(map(torch.equal, gradients(run.model), gradients(free)))

    def test_a_treated_layer_that_is_no_longer_measured_is_not_escalated(self) -> None:
        run = self.run([])
        run.measure({LAST: "collapsed"})
        for _ in range(5):
            run.step += 100
            conditions = {FIRST: "healthy", LAST: "collapsed"}
            actions = run.pilot.act(run.step, [], conditions, (), {"loss": 1.0}, optimizer=run.optimizer)  # type: ignore[arg-type]
            assert actions == ()
        assert len(run.pilot.active) == 1

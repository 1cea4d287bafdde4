"""Batches that are run again inside a training: what they show, and that the training goes on as without them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import logsigmoid

from ess_monitor.capture import find_layers
from ess_monitor.errors import CaptureError
from ess_monitor.evidence.counterfactual import changes_of_batch, other_decays
from ess_monitor.interventions.gate import gate_tensors
from tests.pipeline.replaying import (
    ALL_COLLAPSED,
    LAST,
    QUICK_TRIAL,
    Loop,
    Replays,
    batch,
    bits,
    by_loss,
    by_outputs,
    loss_of,
    settings_of,
)

WAYS = {"loss": by_loss, "kl": by_outputs}


@pytest.mark.parametrize("basis", sorted(WAYS))
@pytest.mark.parametrize("featurizer", ["wla", "gla", "gla_s6", "s6"])
def test_in_mode_advise_evidence_is_taken_and_the_training_is_bitwise_that_of_mode_off(
    featurizer: str, basis: str
) -> None:
    bare = bits(Loop(None, featurizer=featurizer).run(12).training())
    off = Loop(settings_of("off"), WAYS[basis], featurizer).run(12)
    assert bits(off.training()) == bare
    off.monitor.close()
    watched = Loop(settings_of("advise"), WAYS[basis], featurizer).run(12)
    assert bits(watched.training()) == bare
    [found] = watched.evidence
    assert (found.layer, found.basis, found.batches) == (LAST, basis, 3)
    assert (found.base is None) == (basis == "kl")
    says = {"loud": "collapsed", "silent": "unused", "by_choice": "forgets_by_choice", "unclear": "unknown"}
    assert watched.monitor.conditions[LAST] == says[found.outcome]
    assert [f.evidence for f in watched.monitor.findings] == ([] if found.outcome == "unclear" else [found])
    assert watched.monitor.snapshot().health.part_failures_total["replay"] == 0
    watched.monitor.close()


# -- the numbers ------------------------------------------------------------------------------------------------------


def with_power(mixer: nn.Module, power: float) -> None:
    """Make A^power of a WLA by its parameter: A = sigmoid(logit)^(1 / beta)."""
    with torch.no_grad():
        log_sigmoid = power * logsigmoid(mixer.decay_logit)
        mixer.decay_logit.copy_(log_sigmoid - torch.log(-torch.expm1(log_sigmoid)))


@pytest.mark.parametrize("basis", sorted(WAYS))
def test_the_numbers_are_those_of_a_copy_of_the_model_whose_decay_was_changed_by_hand(basis: str) -> None:
    losses: list[list[float]] = []
    divergences: list[list[float]] = []

    def observe(loop: Loop) -> None:
        if loop.step not in (3, 4, 5):
            return
        tokens, outputs = batch(loop.step - 1), []
        for power in (1.0, 0.5, 0.1, 1e4):  # A is about 1/2, and 2^-10000 is 0
            model = copy.deepcopy(loop.model)
            with_power(model.backbone.blocks[1].mixer, power)
            with torch.random.fork_rng([]), torch.no_grad():  # the same dropout in each
                outputs.append(model(tokens))
        log_p = [logits.log_softmax(-1) for logits in outputs]
        losses.append([-p[:, :-1].gather(2, tokens[:, 1:, None]).mean().item() for p in log_p])
        divergences.append([(log_p[0].exp() * (log_p[0] - q)).sum(-1).mean().item() for q in log_p])

    loop = Loop(settings_of("auto"), WAYS[basis], dtype=torch.float64, every_step=observe).run(11)
    [found] = loop.evidence
    values = torch.tensor(losses if basis == "loss" else divergences, dtype=torch.float64)
    moved = values - values[:, :1]
    assert moved[:, 1:].abs().min() > 1e-6
    # KL is computed in float32.
    exact: dict[str, Any] = {"rel": 1e-6} if basis == "loss" else {"rel": 1e-4, "abs": 1e-7}
    assert found.base == (pytest.approx(values[:, 0].mean().item(), rel=1e-9) if basis == "loss" else None)
    assert [found.m50, found.m90, found.cut] == pytest.approx(moved.mean(0)[1:].tolist(), **exact)
    assert found.m50_error == pytest.approx(moved[:, 1].std(correction=1).item() / math.sqrt(3), **exact)
    assert found.step == 8
    loop.monitor.close()


# -- acting -----------------------------------------------------------------------------------------------------------


def test_mode_auto_only_advises_where_outputs_were_compared() -> None:
    loop = Loop(settings_of("auto", evidence=ALL_COLLAPSED), by_outputs).run(12)
    [found] = loop.evidence
    assert (found.basis, found.outcome) == ("kl", "silent")
    [action] = loop.monitor.actions
    assert (action.layer, action.action, action.outcome) == (LAST, "pull_to_identity", "dry_run")
    assert "only its outputs could be compared" in action.message
    assert "replay=" in action.message
    assert bits(loop.training()) == bits(Loop(None).run(12).training())
    loop.monitor.close()


@pytest.mark.parametrize("featurizer", ["wla", "gla_s6"])
def test_mode_auto_treats_on_evidence_by_the_loss_and_on_trial(featurizer: str) -> None:
    loop = Loop(settings_of("auto", evidence=ALL_COLLAPSED), by_loss, featurizer).run(12)
    [action] = loop.monitor.actions
    assert (action.step, action.layer, action.outcome) == (10, LAST, "applied")
    [treatment] = loop.monitor._results.autopilot.active
    assert treatment.trial is not None
    assert treatment.trial.is_silent
    assert treatment.trial.gate is not None
    loop.monitor.close()


@pytest.mark.parametrize("featurizer", ["wla", "gla_s6"])
def test_a_trial_compares_the_gate_with_that_from_before_and_leaves_no_trace(featurizer: str) -> None:
    names = {"wla": ("decay_logit",), "gla_s6": ("gate", "log_alpha")}[featurizer]
    before: dict[str, torch.Tensor] = {}
    gains, losses = [], []

    def observe(loop: Loop) -> None:
        mixer = loop.model.backbone.blocks[1].mixer
        if loop.step == 10:
            kept = {k: v.clone() for k, v in mixer.state_dict().items() if k.split(".")[0] in names}
            before.update(kept)
        if loop.step in (15, 16):
            found = []
            for state in ({}, before):
                model = copy.deepcopy(loop.model)
                model.backbone.blocks[1].mixer.load_state_dict(state, strict=False)
                with torch.random.fork_rng([]), torch.no_grad():
                    found.append(loss_of(model, batch(loop.step - 1)).item())
            losses.append(found[0])
            gains.append(found[1] - found[0])

    evidence = {**ALL_COLLAPSED, "batches": 2}
    settings = settings_of("auto", evidence=evidence, probation={**QUICK_TRIAL, "checks": (4,)})
    loop = Loop(settings, by_loss, featurizer, dtype=torch.float64, every_step=observe).run(18)
    [treatment] = loop.monitor._results.autopilot.active
    assert abs(sum(gains)) > 1e-9
    assert treatment.trial.last_gain_ratio == pytest.approx(sum(gains) / sum(losses), rel=1e-6)
    later = settings_of("auto", evidence=evidence, probation={**QUICK_TRIAL, "checks": (500,)})
    without = Loop(later, by_loss, featurizer, dtype=torch.float64).run(18)
    assert [a.outcome for a in without.monitor.actions] == [a.outcome for a in loop.monitor.actions]
    assert without.monitor.actions[0].outcome == "applied"
    assert bits(loop.training()) == bits(without.training())
    for each in (loop, without):
        each.monitor.close()


@pytest.mark.parametrize("featurizer", ["wla", "gla_s6"])
def test_a_treatment_that_is_taken_back_leaves_the_gate_as_it_was_before(featurizer: str) -> None:
    gates: dict[int, Any] = {}

    def observe(loop: Loop) -> None:
        gates[loop.step] = bits(gate_of(loop))

    harmful = {"checks": (4,), "harm_ratio": 0.0, "noise": 0.0, "silent_patience_steps": 5}
    settings = settings_of("auto", evidence={**ALL_COLLAPSED, "batches": 2}, probation=harmful)
    loop = Loop(settings, by_loss, featurizer, every_step=observe).run(18)
    assert [(a.step, a.outcome) for a in loop.monitor.actions] == [(10, "applied"), (18, "rolled_back")]
    assert gates[18] != gates[10]
    assert bits(gate_of(loop)) == gates[10]
    loop.monitor.close()


def gate_of(loop: Loop) -> dict[str, Any]:
    """The tensors that decide the decay, with what the optimizer remembers of each."""
    [layer] = [layer for layer in loop.monitor._context.layers if layer.name == LAST]
    return {name: (tensor, dict(loop.optimizer.state.get(tensor, {}))) for name, tensor in gate_tensors(layer).items()}


def test_mode_auto_leaves_a_layer_alone_whose_loss_prefers_the_forgetting() -> None:
    by_choice = {"cut_ratio": 1e-9, "m50_share": 1e-9, "silent_ratio": 1e-9}
    loop = Loop(settings_of("auto", evidence=by_choice)).run(12)
    [found] = loop.evidence
    assert found.outcome == "by_choice"
    assert loop.monitor.conditions[LAST] == "forgets_by_choice"
    assert loop.monitor.actions == ()
    loop.monitor.close()


# -- what goes wrong in a replay --------------------------------------------------------------------------------------


def raising(loop: Loop, tokens: torch.Tensor) -> Callable[[], Any]:
    def replay() -> Any:
        loss_of(loop.model, tokens)
        raise ZeroDivisionError("injected")

    return replay


def giving_nan(loop: Loop, tokens: torch.Tensor) -> Callable[[], Any]:
    return lambda: loss_of(loop.model, tokens) * math.nan


def giving_a_vector(loop: Loop, tokens: torch.Tensor) -> Callable[[], Any]:
    return lambda: loop.model(tokens)[0, 0]


def in_another_mode(loop: Loop, tokens: torch.Tensor) -> Callable[[], Any]:
    return lambda: loss_of(loop.model.eval(), tokens)


BAD: dict[str, tuple[Replays, str]] = {
    "raises": (raising, "ZeroDivisionError: injected"),
    "NaN": (giving_nan, "the loss of a batch that was run again is not finite"),
    "a vector": (giving_a_vector, "a closure returns the loss of the batch, one real number"),
    "calls nothing": (lambda loop, tokens: lambda: 1.0, "did not call it with another decay"),
}


@pytest.mark.parametrize("mode", ["advise", "auto"])
@pytest.mark.parametrize("name", sorted(BAD))
def test_a_replay_that_fails_does_no_harm_and_is_off_after_five_in_a_row(
    name: str, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    replays, message = BAD[name]
    loop = Loop(settings_of(mode, evidence={"batches": 7}), replays)
    loop.run(5)
    health = loop.monitor.snapshot().health
    assert 0 < health.part_failures_total["replay"] < 5
    assert health.parts_off == ()
    assert loop.monitor.replay_due
    loop.run(13)
    health = loop.monitor.snapshot().health
    assert (health.part_failures_total["replay"], health.parts_off) == (5, ("replay",))
    assert not loop.monitor.replay_due
    assert bits(loop.training()) == bits(Loop(None).run(18).training())
    said = [record.getMessage() for record in caplog.records]
    assert sum(message in text for text in said) == 2  # the first failure, and the end
    # The task metric must do, and mode auto does not act on it.
    [finding] = loop.monitor.findings
    assert (finding.condition, finding.evidence) == ("collapsed", None)
    assert "batches could not be run again" in finding.reason
    assert [action.outcome for action in loop.monitor.actions] == ["dry_run"]
    assert loop.evidence == []
    loop.monitor.close()


def test_a_replay_that_fails_at_times_leaves_evidence_of_the_other_batches() -> None:
    def at_times(loop: Loop, tokens: torch.Tensor) -> Callable[[], Any]:
        return (raising if loop.step == 4 else by_loss)(loop, tokens)

    loop = Loop(settings_of("auto"), at_times).run(12)
    [found] = loop.evidence
    assert found.batches == 2
    assert loop.monitor.snapshot().health.part_failures_total["replay"] == 1
    loop.monitor.close()


def test_a_replay_that_changes_the_mode_of_the_model_leaves_the_training_as_it_is() -> None:
    loop = Loop(settings_of("advise"), in_another_mode).run(12)
    assert bits(loop.training()) == bits(Loop(None).run(12).training())
    assert loop.model.training
    assert [found.batches for found in loop.evidence] == [3]
    loop.monitor.close()


def test_a_loop_that_never_calls_the_watched_model_itself_is_told_to_give_a_replay(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loop = Loop(settings_of("advise"), by_outputs)
    loop.monitor._replays._recorder.attach = lambda: None  # as where the loop calls a wrapper of it
    loop.run(12)
    assert any("give Monitor.step a replay=" in record.getMessage() for record in caplog.records)
    assert loop.evidence == []
    loop.monitor.close()


# -- when nothing is run again ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "enabled"), [("off", True), ("advise", False), ("auto", False)])
def test_no_batch_is_run_again_where_nobody_asks_for_evidence(mode: str, enabled: bool) -> None:
    calls: list[int] = []

    def counted(loop: Loop, tokens: torch.Tensor) -> Callable[[], Any]:
        return lambda: calls.append(loop.step) or loss_of(loop.model, tokens)

    loop = Loop(settings_of(mode, evidence={"enabled": enabled}), counted).run(20)
    assert calls == []
    assert loop.monitor.snapshot().overhead_seconds["replay"].count == 0
    assert loop.monitor.conditions[LAST] == "collapsed"
    loop.monitor.close()


def test_batches_are_run_again_at_the_steps_asked_for_alone() -> None:
    calls: list[int] = []

    def counted(loop: Loop, tokens: torch.Tensor) -> Callable[[], Any]:
        return lambda: calls.append(loop.step) or loss_of(loop.model, tokens)

    loop = Loop(settings_of("auto"), counted).run(26)
    assert calls == [3] * 4 + [4] * 4 + [5] * 4  # as it was, and with three other decays
    loop.monitor.close()


# -- what it costs ----------------------------------------------------------------------------------------------------


def test_the_cost_is_in_the_snapshot_and_in_the_cadence() -> None:
    now = [0.0]

    def slow(loop: Loop, tokens: torch.Tensor) -> Callable[[], Any]:
        def replay() -> Any:
            now[0] += 2.0
            return loss_of(loop.model, tokens)

        now[0] += 1.0  # a training step
        return replay

    settings = settings_of("advise").model_copy(update={"overhead_budget_ratio": 0.1})
    loop = Loop(settings, slow, clock=lambda: now[0]).run(20)
    snapshot = loop.monitor.snapshot()
    assert snapshot.overhead_seconds["replay"].count == 3
    assert snapshot.overhead_seconds["replay"].total_seconds == 3 * 4 * 2.0
    assert loop.monitor.overhead_ratio > 0.5
    # Samples cost nothing by this clock, so the interval stays; what the budget leaves over makes up for the replays.
    assert 0 < loop.monitor.state_dict()["cadence"]["debt"] <= 24.0
    loop.monitor.close()


# -- one batch --------------------------------------------------------------------------------------------------------


def test_a_layer_without_usable_numbers_keeps_the_others_from_nothing() -> None:
    """Other ranks may have numbers for it, and make as many passes."""
    loop, passes = Loop(None), []
    layers = [layer for layer in find_layers(loop.model) if layer.name.endswith("mixer")]

    def replay() -> torch.Tensor:
        passes.append(loss_of(loop.model, batch(0)))
        return passes[-1] * (math.nan if len(passes) == 3 else 1.0)

    counterfactuals = {layer.name: other_decays(layer) for layer in layers}
    found: list[str] = []
    with pytest.raises(CaptureError, match=r"layer backbone\.blocks\.0\.mixer: .* is not finite"):
        found.extend(name for name, _ in changes_of_batch(loop.model, counterfactuals, replay, gives_loss=True))
    assert found == [LAST]
    assert len(passes) == 7
    for name, changes in changes_of_batch(loop.model, counterfactuals, replay, gives_loss=True):
        assert changes.batches == 1, name
    assert len(passes) == 14

"""Batches that are run again with a smaller state: what they show, and that the training goes on as without them."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from tests.pipeline.replaying import FULL, LAST, Loop, batch, bits, by_loss, by_outputs, settings_of

WAYS = {"loss": by_loss, "kl": by_outputs}
FIRST = LAST.replace("1", "0")


def settings(mode: str = "advise", *, state_ratio: float = 1e-9, **others: Any) -> Any:
    return settings_of(
        mode,
        diagnosis={**FULL, "spare_first_layer": True},
        evidence={"state_ratio": state_ratio, "state_kl": state_ratio, **others},
    )


@pytest.mark.parametrize(
    ("featurizer", "basis"),
    [("la", "loss"), ("la", "kl"), ("wla", "loss"), ("gla", "kl"), ("gla_s6", "loss"), ("s6", "kl")],
)
def test_in_mode_advise_a_smaller_state_is_tried_and_the_training_is_bitwise_that_of_mode_off(
    featurizer: str, basis: str
) -> None:
    bare = bits(Loop(None, featurizer=featurizer).run(12).training())
    watched = Loop(settings(), WAYS[basis], featurizer).run(12)
    assert bits(watched.training()) == bare
    assert [(found.layer, found.basis, found.batches) for found in watched.state_evidence] == [
        (FIRST, basis, 3),
        (LAST, basis, 3),
    ]
    assert all((found.base is None) == (basis == "kl") for found in watched.state_evidence)
    assert all(found.whole != 0 and found.quarter_error > 0 for found in watched.state_evidence)
    assert watched.evidence == []
    assert watched.monitor.snapshot().health.part_failures_total["replay"] == 0
    assert watched.monitor.snapshot().state_evidence == {found.layer: found for found in watched.state_evidence}
    needed = [found.layer for found in watched.state_evidence if found.outcome == "needed"]
    assert [finding.layer for finding in watched.monitor.findings] == needed
    assert [finding.evidence for finding in watched.monitor.findings] == [
        found for found in watched.state_evidence if found.layer in needed
    ]
    watched.monitor.close()


def without_least_used(model: nn.Module, share: float) -> None:
    """Leave out the least used state dimensions of the last mixer of a linear attention."""

    def pre_hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        q, k, v, decay = args
        usage = k.square().mean((0, 2)) * q.square().mean((0, 2))
        left_out = usage.argsort(-1)[:, : math.ceil(share * k.shape[-1])]
        mask = torch.ones_like(usage).scatter(-1, left_out, 0.0)
        return q, k * mask[None, :, None], v, decay

    model.backbone.blocks[1].mixer.core.register_forward_pre_hook(pre_hook)


@pytest.mark.parametrize("basis", sorted(WAYS))
def test_the_numbers_are_those_of_a_copy_of_the_model_whose_state_was_made_smaller_by_hand(basis: str) -> None:
    losses: list[list[float]] = []
    divergences: list[list[float]] = []

    def observe(loop: Loop) -> None:
        if loop.step not in (3, 4, 5):
            return
        tokens, outputs = batch(loop.step - 1), []
        for share in (0.0, 0.25, 0.5, 1.0):
            model = copy.deepcopy(loop.model)
            without_least_used(model, share)
            with torch.random.fork_rng([]), torch.no_grad():  # the same dropout in each
                outputs.append(model(tokens))
        log_p = [logits.log_softmax(-1) for logits in outputs]
        losses.append([-p[:, :-1].gather(2, tokens[:, 1:, None]).mean().item() for p in log_p])
        divergences.append([(log_p[0].exp() * (log_p[0] - q)).sum(-1).mean().item() for q in log_p])

    loop = Loop(settings("auto"), WAYS[basis], "la", dtype=torch.float64, every_step=observe).run(11)
    found = loop.state_evidence[1]
    values = torch.tensor(losses if basis == "loss" else divergences, dtype=torch.float64)
    moved = values - values[:, :1]
    assert moved[:, 1:].abs().min() > 1e-6
    exact: dict[str, Any] = {"rel": 1e-6} if basis == "loss" else {"rel": 1e-4, "abs": 1e-7}  # KL is float32
    assert found.base == (pytest.approx(values[:, 0].mean().item(), rel=1e-9) if basis == "loss" else None)
    assert [found.quarter, found.half, found.whole] == pytest.approx(moved.mean(0)[1:].tolist(), **exact)
    assert found.quarter_error == pytest.approx(moved[:, 1].std(correction=1).item() / math.sqrt(3), **exact)
    loop.monitor.close()


def test_a_state_that_the_loss_does_not_need_is_healthy_and_the_evidence_is_shown() -> None:
    loop = Loop(settings(state_ratio=1e9), by_loss, "la").run(12)
    assert loop.monitor.conditions == {FIRST: "healthy", LAST: "healthy"}
    assert loop.monitor.findings == ()
    assert {found.outcome for found in loop.monitor.snapshot().state_evidence.values()} == {"spare"}
    loop.monitor.close()


def test_mode_auto_only_advises_a_larger_state() -> None:
    loop = Loop(settings("auto", state_ratio=1e-12), by_loss, "gla").run(12)
    saturated = [finding.layer for finding in loop.monitor.findings if finding.condition == "saturated"]
    assert saturated
    assert [(a.layer, a.action, a.outcome) for a in loop.monitor.actions] == [
        (layer, "advise", "dry_run") for layer in saturated
    ]
    assert bits(loop.training()) == bits(Loop(None, featurizer="gla").run(12).training())
    loop.monitor.close()


def test_without_evidence_no_batch_is_run_again() -> None:
    loop = Loop(settings(enabled=False), by_loss, "la").run(12)
    assert loop.state_evidence == []
    assert loop.monitor.snapshot().overhead_seconds["replay"].count == 0
    loop.monitor.close()


def test_a_run_that_stops_between_the_batches_goes_on_with_the_same_numbers() -> None:
    whole = Loop(settings("auto"), by_loss, "la").run(12)
    first = Loop(settings("auto"), by_loss, "la").run(4)
    saved = first.save()
    resumed = Loop(settings("auto"), by_loss, "la").load(saved).run(8)
    assert resumed.state_evidence == whole.state_evidence
    assert resumed.monitor.findings == whole.monitor.findings
    for loop in (whole, first, resumed):
        loop.monitor.close()

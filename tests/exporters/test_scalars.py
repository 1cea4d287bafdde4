"""Scalars: the tags and numbers that every logger sees."""

from __future__ import annotations

import re

import pytest

from ess_monitor.exporters import scalars
from ess_monitor.exporters.scalars import LAYER_QUANTITIES, layer_tag, scalar_tag
from ess_monitor.records import ACTION_OUTCOMES, Measurement, Reading
from tests.exporters.helpers import ODD_LAYERS, action, evidence, examined, measurement, reading


def test_a_full_measurement_gives_every_quantity_of_every_layer() -> None:
    values = scalars(measurement(layers=("a", "b")))
    full = reading()
    for layer in ("a", "b"):
        for quantity in LAYER_QUANTITIES:
            assert values.pop(f"ess_{quantity}/{layer}") == getattr(full, quantity)
    assert values == {
        "ess_layers/unknown": 0.0,
        "ess_layers/healthy": 2.0,
        "ess_layers/forgets_by_choice": 0.0,
        "ess_layers/unused": 0.0,
        "ess_layers/saturated": 0.0,
        "ess_layers/collapsed": 0.0,
        "ess_monitor/utilization_ratio": 0.25,
        "ess_monitor/overhead_ratio": 0.004,
        "ess_monitor/interval_steps": 100.0,
    }


def test_what_was_not_measured_has_no_tag() -> None:
    bare = Reading(step=1, layer="bare", status="ok", effective_size=2.0)
    failed = reading("failed", 1, status="nonfinite")
    values = scalars(measurement(1, readings=(bare, failed)))
    assert [tag for tag in values if tag.endswith(("bare", "failed"))] == ["ess_effective_size/bare"]
    assert "ess_monitor/utilization_ratio" not in values


def test_a_number_that_is_not_finite_has_no_tag() -> None:
    broken = reading("layer").model_copy(update={"entropy_size": float("nan"), "mean_decay": float("inf")})
    values = scalars(measurement(readings=(broken,)))
    assert {"ess_entropy_size/layer", "ess_mean_decay/layer"}.isdisjoint(values)
    assert values["ess_effective_size/layer"] == 4.0


def test_utilization_of_the_model_weighs_layers_by_capacity_and_leaves_growing_ones_out() -> None:
    readings = (
        reading("small", effective_size=4.0, state_capacity=4.0),
        reading("large", effective_size=0.0, state_capacity=12.0),
        reading("attention", effective_size=500.0, state_capacity=500.0, capacity_grows=True),
    )
    assert scalars(measurement(readings=readings))["ess_monitor/utilization_ratio"] == 0.25


def test_conditions_are_counted() -> None:
    conditions = {"a": "collapsed", "b": "collapsed", "c": "healthy"}
    values = scalars(Measurement(step=1, timestamp_seconds=0.0, readings=(), conditions=conditions))
    assert (values["ess_layers/collapsed"], values["ess_layers/healthy"]) == (2.0, 1.0)


def test_the_strength_of_what_was_applied_is_a_scalar_and_nothing_else_of_the_autopilot_is() -> None:
    actions = tuple(action(f"layer.{outcome}", outcome=outcome) for outcome in ACTION_OUTCOMES)
    unknown = action("silent", strength=None)
    plain = scalars(measurement())
    assert scalars(measurement(actions=(*actions, unknown))) == {**plain, "ess_interventions/layer.applied": 0.5}


def test_the_next_rung_of_a_ladder_in_one_measurement_wins() -> None:
    values = scalars(measurement(actions=(action(strength=0.5), action(strength=2.0))))
    assert values["ess_interventions/blocks.0.mixer"] == 2.0


def _of_evidence(values: dict[str, float]) -> dict[str, float]:
    return {tag: value for tag, value in values.items() if tag.startswith("ess_evidence")}


def test_evidence_by_the_loss_gives_shares_of_it_at_the_step_of_the_finding() -> None:
    values = scalars(measurement(findings=(examined("a"), examined("b", evidence("b", base=-8.0)))))
    assert _of_evidence(values) == {
        f"ess_evidence_{name}/{layer}": value
        for layer in ("a", "b")
        for name, value in (("m50_ratio", 0.125), ("m90_ratio", 0.25), ("cut_ratio", 0.5))
    }
    assert _of_evidence(scalars(measurement())) == {}


def test_evidence_by_kl_gives_nats_under_tags_of_its_own() -> None:
    found = examined("a", evidence("a", basis="kl", base=None))
    assert _of_evidence(scalars(measurement(findings=(found,)))) == {
        "ess_evidence_m50_nats/a": 1.0,
        "ess_evidence_m90_nats/a": 2.0,
        "ess_evidence_cut_nats/a": 4.0,
    }


@pytest.mark.parametrize("base", [0.0, 5e-324])
def test_a_loss_that_is_nearly_nothing_gives_no_shares(base: float) -> None:
    assert _of_evidence(scalars(measurement(findings=(examined("a", evidence("a", base=base)),)))) == {}


@pytest.mark.parametrize("layer", ODD_LAYERS)
def test_odd_layer_names_become_tags_that_every_logger_takes(layer: str) -> None:
    # The characters that MLflow, the strictest of the loggers, allows in a metric's name.
    assert re.fullmatch(r"[\w.\-/]+", layer_tag(layer), re.ASCII)


def test_a_tag_of_a_deeply_nested_layer_is_no_longer_than_mlflow_allows() -> None:
    names = ["blocks." * 60 + end for end in ("0", "1")]
    assert len({layer_tag(name) for name in names}) == 2
    assert all(len(scalar_tag("effective_size_between", name)) <= 250 for name in names)


def test_different_layers_never_share_a_tag() -> None:
    names = [*ODD_LAYERS, "a-b", "a/b", "a:b", "blocks.0"]
    assert len({layer_tag(name) for name in names}) == len(names)

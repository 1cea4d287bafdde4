from __future__ import annotations

import pytest
from pydantic import ValidationError

from ess_monitor.diagnosis import DiagnosisConfig, thresholds
from ess_monitor.diagnosis.config import contradiction
from ess_monitor.errors import ConfigError
from ess_monitor.records import CONDITIONS


def test_the_dashboard_thresholds_are_named_condition_dot_bound() -> None:
    bounds = thresholds(DiagnosisConfig(collapsed_below=0.1, collapsed_recovers_above=0.2))
    assert bounds == {
        "collapsed.upper": 0.1,
        "collapsed.recovery": 0.2,
        "saturated.lower": 0.97,
        "saturated.recovery": 0.9,
    }
    assert {name.split(".")[0] for name in bounds} <= set(CONDITIONS)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"collapsed_below": 0.4}, ["collapsed_below=0.4", "collapsed_recovers_above=0.35"]),
        ({"collapsed_recovers_above": 0.3}, ["collapsed_below=0.3", "collapsed_recovers_above=0.3"]),
        ({"saturated_recovers_below": 0.99}, ["saturated_recovers_below=0.99", "saturated_above=0.97"]),
        ({"starved_below": 0.6}, ["starved_below=0.6", "starved_recovers_above=0.55"]),
        ({"starved_recovers_above": 0.98}, ["starved_recovers_above=0.98", "saturated_above=0.97"]),
        ({"saturated_patience": 0}, ["saturated_patience", "greater than or equal to 1"]),
        ({"plateau_window": 3}, ["plateau_window", "greater than or equal to 4"]),
        ({"retention_below": 0.9}, ["retention_below=0.9", "retention_recovers_above=0.85"]),
        ({"collapsed_recovers_above": 0.98}, ["collapsed_recovers_above=0.98", "saturated_above=0.97"]),
        ({"metric": "loss"}, ["metric='loss'", "metric_solved=None"]),
        ({"metric_solved": 0.9}, ["metric_solved=0.9", "name the metric"]),
        ({"metric": "", "metric_solved": 0.9}, ["metric=''"]),
        ({"patience": 0}, ["patience", "greater than or equal to 1"]),
        ({"warmup_steps": -1}, ["warmup_steps"]),
        ({"metric": "loss", "metric_solved": float("nan")}, ["metric_solved", "finite"]),
        ({"metric_mode": "best"}, ["metric_mode", "'max' or 'min'"]),
        ({"patiense": 3}, ["patiense", "did you mean patience"]),
    ],
)
def test_an_impossible_setting_is_refused_and_the_message_names_it(
    settings: dict[str, object], named: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        DiagnosisConfig.model_validate(settings)
    for text in named:
        assert text in str(error.value)


def test_the_config_cannot_be_changed_after_it_was_made() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        DiagnosisConfig().patience = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        *(
            (name, "max")
            for name in ("loss", "val_loss", "eval/loss", "trainLoss", "loss_epoch", "Loss/train", "losses")
        ),
        *(
            (name, "max")
            for name in ("error", "error_rate", "perplexity", "valid_ppl", "wer", "test.cer", "NLL", "valMSE")
        ),
        *((name, "max") for name in ("mse", "mae", "loss1")),
        *(
            (name, "min")
            for name in ("accuracy", "val_acc", "acc@1", "top5-acc5", "macro_f1", "F1", "ROC_AUC", "auroc")
        ),
        *((name, "min") for name in ("sacrebleu/bleu", "R2", "r2_score", "valAccuracy")),
    ],
)
def test_a_mode_that_contradicts_the_name_of_the_metric_is_named_with_what_to_set(metric: str, mode: str) -> None:
    config = DiagnosisConfig(metric=metric, metric_solved=0.5, metric_mode=mode)  # type: ignore[arg-type]
    said, other = contradiction(config), "min" if mode == "max" else "max"
    assert f"metric={metric!r}" in said
    assert f"metric_mode={mode!r}" in said
    assert f'set metric_mode="{other}"' in said
    right = config.model_copy(update={"metric_mode": other})
    assert contradiction(right) == ""


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize(
    "metric",
    [
        "glossary",
        "score",
        "account",
        "answer",
        "reward",
        "f10",
        "lossless",
        "tracer",
        "neg_mse",
        "negative loss",
        "neg-log-loss",
        "accuracy_loss",
        "",
        None,
    ],
)
def test_a_name_that_says_nothing_or_both_contradicts_no_mode(metric: str | None, mode: str) -> None:
    config = DiagnosisConfig().model_copy(update={"metric": metric, "metric_solved": 0.5, "metric_mode": mode})
    assert contradiction(config) == ""

"""The labeled runs of the saturation benchmark: their labels, the replay, and the recorded results."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from benchmarks.saturation.__main__ import RECORDED, labeled_runs, main
from benchmarks.saturation.catalog import CATALOG, SaturationRun
from benchmarks.saturation.sources import KEYS, VALUES, SizedSettings, build_source
from benchmarks.saturation.training import train
from benchmarks.saturation.verdict import judge_half, label_of, label_runs, noise_by_kind, replay
from benchmarks.trust.runner import read_results
from ess_monitor.evidence import EvidenceConfig


def result(name: str, loss: float, variant: str = "base", **others: Any) -> dict[str, Any]:
    return {"name": name, "variant": variant, "kind": "pairs", "settings": name[0], "loss": loss, "guess": 2.0} | others


@pytest.mark.parametrize(
    ("gain", "noise", "label"),
    [
        (0.06, 0.0, "saturated"),
        (0.06, 0.07, "left out"),
        (0.03, 0.0, "left out"),
        (0.03, 0.04, "not"),
        (0.009, 0.0, "not"),
        (-0.4, 0.0, "not"),
        (0.05, 0.0, "saturated"),
        (0.049, 0.2, "not"),
    ],
)
def test_a_run_is_labeled_by_what_twice_its_state_gains(gain: float, noise: float, label: str) -> None:
    assert label_of(gain, noise) == label


def test_the_run_with_twice_the_state_is_the_next_of_the_chain_or_a_variant() -> None:
    runs = [
        result("a 2", 1.0, double="a 4"),
        result("a 4", 0.6, double=""),
        result("a 4", 0.5, "double", double=""),
        result("b 2", 1.0, double="b 4"),
    ]
    assert [(each.run["name"], each.gain) for each in label_runs(runs)] == [
        ("a 2", pytest.approx(0.2)),
        ("a 4", pytest.approx(0.05)),
    ]


def test_the_noise_is_that_of_a_difference_between_seeds() -> None:
    values = torch.tensor([1.0, 1.2], dtype=torch.float64)
    runs = [result(f"a {k}", value, double="") for k, value in enumerate(values.tolist())]
    expected = 2 * math.sqrt(2 * float((values / 2.0).var()))
    assert noise_by_kind(runs) == {"pairs": pytest.approx(expected)}
    assert noise_by_kind(runs[:1]) == {}


def test_half_of_the_seeds_are_held_out_and_names_are_unique() -> None:
    assert len({run.name for run in CATALOG}) == len(CATALOG)
    halves = [[run for run in CATALOG if run.split == split] for split in ("seen", "held_out")]
    assert 2 * len(halves[0]) == len(halves[1]), "one seed to choose thresholds with, two that are held out"
    assert {run.seed for run in halves[0]}.isdisjoint(run.seed for run in halves[1])
    assert all(run.double == "" or run.double in {other.name for other in CATALOG} for run in CATALOG)


def test_every_key_of_a_pair_is_asked_once_for_its_value() -> None:
    source = build_source(SizedSettings("pairs", 12, kv_pairs=6), 0)
    inputs, targets = (part.long() for part in source.draw(50, 1))
    pairs, asked = inputs[:, :6], inputs[:, 6:] - KEYS * VALUES
    assert (targets[:, :6] == -100).all()
    for row in range(50):
        values = dict(zip((pairs[row] // VALUES).tolist(), (pairs[row] % VALUES).tolist(), strict=True))
        assert sorted(values) == sorted(asked[row].tolist())
        assert [values[key] for key in asked[row].tolist()] == targets[row, 6:].tolist()


def test_the_recorded_runs_have_both_labels_in_both_halves_and_give_the_published_figures() -> None:
    runs = labeled_runs()
    assert {each.run["split"] for each in runs} == {"seen", "held_out"}
    halves = {split: judge_half(split, [replay(each) for each in labeled_runs()]) for split in ("seen", "held_out")}
    for split, half in halves.items():
        assert half.row["saturated"] + half.row["not saturated"] >= 12, split
        assert min(half.row["saturated"], half.row["not saturated"]) >= 6, split
    assert (halves["held_out"].row["precision"], halves["held_out"].row["recall"]) == (
        "12 of 13 (67 to 99 %)",
        "12 of 13 (67 to 99 %)",
    )
    assert [text.partition(" (")[0] for text in halves["held_out"].misses] == [
        "noise: 4 pairs, 40 %, gla 2, seed 303",
        "noise: 4 pairs, 40 %, gla 2, seed 301",
    ]
    assert [text.partition(" (")[0] for text in halves["seen"].misses] == ["pairs: 8, wla 2, seed 300"]


def test_without_evidence_the_readings_alone_call_states_saturated_that_need_no_more() -> None:
    alone = [replay(each, evidence=EvidenceConfig(enabled=False)) for each in labeled_runs()]
    assert sum(each.finding is not None and each.label == "not" for each in alone) >= 10
    assert all(each.finding.evidence is None for each in alone if each.finding is not None)


def test_the_tables_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "12 of 13" in capsys.readouterr().out


def test_a_training_records_what_the_diagnosis_needs() -> None:
    run = next(run for run in CATALOG if run.name.startswith("pairs: 4, wla 2"))
    short = dataclasses.replace(run, setting=dataclasses.replace(run.setting, steps=50))
    assert isinstance(short, SaturationRun)
    found = train(short, "base")
    assert [row["step"] for row in found["rows"]] == [0, 10, 20, 30, 40]
    [probe] = found["probes"]
    [sums] = probe["layers"].values()
    assert (probe["step"], sums[0]) == (50, 8)
    assert found["settings"] == short.digest != run.digest
    [recorded] = [r for r in read_results(RECORDED) if r["name"] == run.name and r["variant"] == "base"]
    assert found.keys() == recorded.keys()
    assert found["rows"][0]["layers"].keys() == recorded["rows"][0]["layers"].keys()

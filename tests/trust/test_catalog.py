"""The catalog is large enough, balanced, and every setting of it can be trained."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.detector import RUNS
from benchmarks.trust.catalog import CATALOG, COLLAPSED, HEALTHY, KINDS
from benchmarks.trust.models import build_model, is_available
from benchmarks.trust.settings import Setting, SourceSettings
from benchmarks.trust.sources import MarkovSource, build_source
from benchmarks.trust.training import draw, evaluation_steps, optimizer_and_schedule
from ess_monitor.tasks import IGNORED, loss

SETTINGS = {
    f"{kind}: {name}": setting for kind, named in HEALTHY.items() for name, setting in named.items()
} | COLLAPSED


def test_there_are_enough_healthy_runs_and_collapses() -> None:
    labels = Counter(run.label for run in CATALOG)
    assert labels["healthy"] >= 60
    assert labels["collapsed"] >= 20
    page = (Path(__file__).parents[2] / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert f"There are {labels['healthy']} healthy runs of {len(HEALTHY)}" in page
    assert f"The {labels['collapsed']} candidates of a collapse" in page


def test_every_run_has_a_name_of_its_own() -> None:
    assert len({run.name for run in CATALOG}) == len(CATALOG)


@pytest.mark.parametrize("kind", KINDS)
def test_half_of_the_seeds_of_each_kind_are_held_out(kind: str) -> None:
    splits = Counter(run.split for run in CATALOG if run.kind == kind)
    assert splits["seen"] == splits["held_out"] > 0
    seeds = {split: {run.seed for run in CATALOG if (run.kind, run.split) == (kind, split)} for split in splits}
    assert not seeds["seen"] & seeds["held_out"]


def test_the_seeds_occur_in_no_earlier_collection() -> None:
    assert not {run.seed for run in CATALOG} & ({seed for _, seed in RUNS} | set(range(20)))


def test_the_label_of_every_collapse_is_checked() -> None:
    assert all(run.setting.check_label for run in CATALOG if run.label == "collapsed")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_can_be_trained(name: str) -> None:
    setting: Setting = SETTINGS[name]
    if not is_available(setting.model):
        pytest.skip("transformers is not installed")
    assert setting.first_steps < setting.steps
    sources = [build_source(s, 100) for s in (setting.source, setting.first, setting.pretrained) if s is not None]
    torch.manual_seed(0)
    model = build_model(setting.model, max(source.vocabulary for source in sources))
    for source in sources:
        ((inputs, targets),) = draw(source, 1, setting, 0, batch=2)
        assert inputs.shape == targets.shape == (2, source.length)
        assert int(inputs.max()) < source.vocabulary
        assert math.isfinite(float(loss(model(inputs.long()), targets.long()).detach()))


@pytest.mark.parametrize("order", [1, 2])
def test_a_markov_source_has_the_entropy_of_its_table(order: int) -> None:
    source = build_source(SourceSettings("markov", 32, order=order), 100)
    assert isinstance(source, MarkovSource)
    inputs, targets = (part.long() for part in source.draw(2000, 1))
    context = inputs[:, order - 1 :]
    for back in range(1, order):
        context = context + inputs[:, order - 1 - back : inputs.shape[1] - back] * source.vocabulary**back
    likelihood = source.probability_CV[context, targets[:, order - 1 :]]
    assert float(-likelihood.log().mean()) == pytest.approx(source.entropy, rel=0.02)
    assert source.entropy < 0.85 * math.log(source.vocabulary)


def test_the_same_seed_draws_the_same_sequences() -> None:
    source = build_source(SourceSettings("recall", 16, kv_pairs=2), 100)
    first, again, other = source.draw(5000, 1), source.draw(5000, 1), source.draw(5000, 2)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0][:900], first[0][4096:4996]), "every chunk has samples of its own"


def test_a_copy_source_asks_for_the_token_before() -> None:
    inputs, targets = build_source(SourceSettings("copy", 8, back=3), 100).draw(4, 0)
    assert torch.equal(targets[:, 3:], inputs[:, :-3])
    assert bool((targets[:, :3] == IGNORED).all())


def test_noise_replaces_a_share_of_the_targets_that_are_asked() -> None:
    setting = Setting(SourceSettings("copy", 32, back=2), COLLAPSED["collapse_wla"].model, SETTINGS[KINDS[-1]].target)
    source = build_source(setting.source, 100)
    clean = next(draw(source, 1, setting, 0, batch=500))[1]
    noisy = next(draw(source, 1, Setting(**{**vars(setting), "noise": 0.5}), 0, batch=500))[1]
    asked = clean != IGNORED
    assert torch.equal(noisy[~asked], clean[~asked])
    assert float((noisy != clean)[asked].float().mean()) == pytest.approx(0.5 * 15 / 16, abs=0.02)


def test_schedules_and_evaluations_end_with_the_run() -> None:
    assert evaluation_steps(2400) == [2208, 2256, 2304, 2352, 2400]
    model = torch.nn.Linear(1, 1)
    rates = {}
    for schedule in ("constant", "cosine", "restarts"):
        setting = Setting(**{**vars(COLLAPSED["collapse_wla"]), "schedule": schedule})
        optimizer, scheduler = optimizer_and_schedule(model, setting, 1200)
        rates[schedule] = []
        for _ in range(1200):
            rates[schedule].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    assert rates["constant"][49:] == [5e-3] * 1151
    assert rates["cosine"][-1] < 1e-5 < rates["cosine"][600]
    assert rates["restarts"][599] < 1e-5 < rates["restarts"][600] == 5e-3

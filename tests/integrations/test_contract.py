"""What every integration must satisfy, whatever the loop."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.layers.mamba import hf
from ess_monitor import CheckpointError, ConfigError, MonitorConfig
from ess_monitor.capture.adapters import mamba
from ess_monitor.interventions import identity_penalty
from tests.integrations.helpers import (
    BATCHES,
    EAGER,
    LOOPS,
    LanguageModel,
    callback,
    dataset,
    hooks,
    measurements,
    train,
)

pytestmark = [
    pytest.mark.parametrize("loop", sorted(LOOPS)),
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning_fabric"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
]

STEPS_OF_ONE_EPOCH = [0, 3, 6, 9]


class Collecting:
    """An exporter that keeps what it gets."""

    name, inline = "collecting", True

    def __init__(self) -> None:
        self.measurements: list = []
        self.run = None
        self.closed: list[str] = []

    def start(self, run, snapshot) -> None:
        self.run = run

    def export(self, measurement) -> None:
        self.measurements.append(measurement)

    def close(self, status) -> None:
        self.closed.append(status)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def told(ess) -> list[tuple]:
    return [(a.step, a.layer, a.action, a.outcome, a.strength) for a in ess.monitor.actions]


@pytest.mark.parametrize("mode", ["off", "advise"])
def test_losses_and_parameters_are_bitwise_equal_with_and_without_the_monitor(
    loop: str, mode: str, tmp_path: Path
) -> None:
    bare = train(loop, tmp_path / "bare")
    ess = callback(loop, **{**EAGER, "autopilot": mode})
    watched = train(loop, tmp_path / "watched", ess)
    assert watched.losses == bare.losses
    assert len(bare.losses) == BATCHES
    assert same(watched.model, bare.model)
    assert [a.outcome for a in ess.monitor.actions] == ([] if mode == "off" else ["dry_run"])
    assert hooks(watched.model) == 0


def test_exporters_get_a_reading_of_every_layer_at_every_sampled_step(loop: str, tmp_path: Path) -> None:
    sink, log = Collecting(), tmp_path / "log.jsonl"
    ess = callback(loop, exporters=[sink, {"kind": "event_log", "path": str(log)}])
    train(loop, tmp_path, ess)
    assert [m.step for m in sink.measurements] == STEPS_OF_ONE_EPOCH
    assert [m.step for m in measurements(log)] == STEPS_OF_ONE_EPOCH
    for measurement in sink.measurements:
        assert [r.layer.removeprefix("inner.") for r in measurement.readings] == [
            "model.blocks.0.mixer",
            "model.blocks.1.mixer",
        ]
        assert {r.status for r in measurement.readings} == {"ok"}
    assert sink.closed == ["finished"]
    assert sink.run.world_size == 1


class HFMamba(LanguageModel):
    """Of mixers that one version of transformers knows how to name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = hf("Mamba", state_size=4, hidden_size=8, tie_word_embeddings=False)[0]
        self.model.register_forward_hook(lambda model, args, output: output.logits)


def test_a_library_that_moved_every_name_of_a_model_does_not_stop_its_training(
    loop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in list(mamba._OPS):
        monkeypatch.delitem(mamba._OPS, name)
    ess = callback(loop, **EAGER)
    losses = train(loop, tmp_path, ess, steps=5, model=HFMamba()).losses
    assert losses == train(loop, tmp_path / "bare", steps=5, model=HFMamba()).losses
    assert ess.monitor.layers == ess.monitor.actions == ()
    assert ess.monitor.snapshot().steps_total == 5
    told = [r.getMessage() for r in caplog.records if r.name == "ess_monitor" and r.levelname == "WARNING"]
    assert len(told) == 1
    assert "MambaMixer calls no op of a known name (transformers" in told[0]


def test_the_loss_of_the_sampled_step_reaches_the_diagnosis(loop: str, tmp_path: Path) -> None:
    sink = Collecting()
    run = train(loop, tmp_path, callback(loop, exporters=[sink]))
    assert [m.metrics["loss"] for m in sink.measurements] == pytest.approx([run.losses[k] for k in STEPS_OF_ONE_EPOCH])


def test_steps_are_optimizer_steps_while_gradients_accumulate(loop: str, tmp_path: Path) -> None:
    sink = Collecting()
    ess = callback(loop, every_n_steps=2, exporters=[sink])
    train(loop, tmp_path, ess, steps=4, accumulate=3)
    assert [m.step for m in sink.measurements] == [0, 2]
    assert ess.monitor.snapshot().steps_total == 4


def test_a_resumed_run_ends_bitwise_as_the_uninterrupted_one_with_a_regularizer_at_work(
    loop: str, tmp_path: Path
) -> None:
    def run(steps: int, resume: Path | None = None):
        ess = callback(loop, **EAGER)
        return ess, train(loop, tmp_path, ess, steps, model=LanguageModel("wla"), resume=resume)

    first, part = run(9)
    assert [a.outcome for a in first.monitor.actions] == ["applied"]
    second, rest = run(24, part.checkpoint)
    whole_ess, whole = run(24)
    assert same(rest.model, whole.model)
    assert not same(whole.model, train(loop, tmp_path / "bare", steps=24, model=LanguageModel("wla")).model)
    events = [
        (a.step, a.layer, a.action, a.outcome, a.strength) for ess in (first, second) for a in ess.monitor.actions
    ]
    assert events == [(a.step, a.layer, a.action, a.outcome, a.strength) for a in whole_ess.monitor.actions]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_regularizer_is_scaled_as_the_loss(
    loop: str, accumulate: int, scaled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first optimizer step sees once the loss scale is divided out, against the term added to the loss."""
    strength, model = 0.5, LanguageModel("wla")
    expected = _gradients_of_the_objective(copy.deepcopy(model), strength, accumulate)
    plain = _gradients_of_the_objective(copy.deepcopy(model), 0.0, accumulate)
    seen: dict[str, torch.Tensor] = {}

    def keep(optimizer: torch.optim.Optimizer, *_: object) -> None:
        if not seen:
            seen.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    ess = callback(loop, **{**EAGER, "every_n_steps": 1000, "autopilot": {"mode": "auto", "lag_steps": 2}})
    _attach_from_the_start(monkeypatch, strength)
    handle = register_optimizer_step_post_hook(keep)
    try:
        train(loop, tmp_path, ess, steps=1, model=model, accumulate=accumulate, scaled=scaled)
    finally:
        handle.remove()
    pulled = "model.blocks.1.mixer.decay_logit"
    assert (expected[pulled] - plain[pulled]).norm() > 0.1 * plain[pulled].norm()
    if scaled and loop in ("lightning", "fabric"):  # they come with autocast: float16 elsewhere in the model
        assert (seen[pulled] - expected[pulled]).norm() < 0.02 * expected[pulled].norm()
        return
    for name, gradient in expected.items():
        torch.testing.assert_close(seen[name], gradient, rtol=1e-4, atol=1e-6)


def _gradients_of_the_objective(model: LanguageModel, strength: float, accumulate: int) -> dict[str, torch.Tensor]:
    """Autograd of mean over micro-batches of (loss + strength * R of the second layer)."""
    seen: list[torch.Tensor] = []
    mixer = model.model.blocks[1].mixer
    mixer.core.register_forward_pre_hook(lambda m, args: seen.append(args[3]))
    for tokens in dataset().split(4)[:accumulate]:
        loss = model(tokens)["loss"]
        ((loss + strength * identity_penalty(seen[-1])) / accumulate).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _attach_from_the_start(monkeypatch: pytest.MonkeyPatch, strength: float) -> None:
    """The autopilot begins with the second layer under treatment, through the scale that the integration gave it."""
    from ess_monitor.interventions import Autopilot
    from ess_monitor.interventions.remedies import PullToIdentity
    from ess_monitor.interventions.treatment import Treatment

    original = Autopilot.__init__

    def treated(self, config, layers, **options) -> None:
        original(self, config, layers, **options)
        treatment = Treatment(PullToIdentity(layers[1], options["grad_scale"]), "test", None)
        treatment.start(0, strength, None, None)
        self._treatments[layers[1].name] = treatment

    monkeypatch.setattr(Autopilot, "__init__", treated)


def test_an_exception_in_training_passes_through_and_closes_the_monitor_as_failed(loop: str, tmp_path: Path) -> None:
    sink, model = Collecting(), LanguageModel(fail_at=4)
    ess = callback(loop, exporters=[sink])
    with pytest.raises(ZeroDivisionError):
        train(loop, tmp_path, ess, model=model)
    assert ess.monitor.snapshot().status == "failed"
    assert sink.closed == ["failed"]
    assert hooks(model) == 0


def test_copies_and_pickles_carry_settings_and_state(loop: str, tmp_path: Path) -> None:
    ess = callback(loop)
    train(loop, tmp_path, ess, steps=4)
    for twin in (copy.deepcopy(ess), pickle.loads(pickle.dumps(ess))):
        assert twin.config == ess.config
        assert twin.monitor is None
        assert twin.state_dict()["step"] == 4
        train(loop, tmp_path / "again", twin, steps=2)
        assert twin.monitor.snapshot().status == "finished"


def test_the_same_callback_serves_a_second_training(loop: str, tmp_path: Path) -> None:
    ess = callback(loop)
    train(loop, tmp_path / "a", ess, steps=4)
    first = ess.monitor
    train(loop, tmp_path / "b", ess, steps=4)
    assert ess.monitor is not first
    assert (first.snapshot().status, ess.monitor.snapshot().status) == ("finished", "finished")


def test_one_callback_measures_every_fold_like_the_first(loop: str, tmp_path: Path) -> None:
    sink = Collecting()
    ess = callback(loop, exporters=[sink], diagnosis={"metric": None, "warmup_steps": 2, "patience": 1})
    seen = []
    for fold in range(3):
        sink.measurements.clear()
        train(loop, tmp_path / str(fold), ess)
        seen.append(
            (
                [m.step for m in sink.measurements],
                [tuple(m.conditions.items()) for m in sink.measurements],
                ess.monitor.snapshot().steps_total,
                [(f.step, f.condition) for f in ess.monitor.findings],
            )
        )
    assert seen[0][0] == STEPS_OF_ONE_EPOCH
    assert seen[0][2] == BATCHES
    assert seen == [seen[0]] * 3


def test_a_callback_that_has_loaded_a_state_begins_the_next_training_anew(loop: str, tmp_path: Path) -> None:
    checkpoint = train(loop, tmp_path / "a", callback(loop), steps=4).checkpoint
    ess = callback(loop)
    train(loop, tmp_path / "b", ess, steps=6, resume=checkpoint)
    assert ess.monitor.snapshot().last_step == 6
    train(loop, tmp_path / "c", ess, steps=2)
    assert ess.monitor.snapshot().last_step == 2


@pytest.mark.parametrize("saved", [False, True])
def test_a_checkpoint_loads_with_the_monitor_or_without(loop: str, saved: bool, tmp_path: Path) -> None:
    bare = train(loop, tmp_path / "bare", steps=6)
    first = train(loop, tmp_path / "a", callback(loop) if saved else None, steps=4)
    sink = Collecting()
    ess = None if saved else callback(loop, exporters=[sink])
    resumed = train(loop, tmp_path / "b", ess, steps=6, resume=first.checkpoint)
    assert same(resumed.model, bare.model)
    if not saved:  # a loop that counts its steps labels the first sample with them
        first_step = 4 if loop in ("lightning", "transformers") else 0
        assert [m.step for m in sink.measurements] == [first_step]


def test_a_monitor_that_was_left_out_between_two_checkpoints_goes_on_at_the_loops_step(
    loop: str, tmp_path: Path
) -> None:
    sink, first = Collecting(), train(loop, tmp_path / "a", callback(loop), steps=3)
    between = train(loop, tmp_path / "b", steps=7, resume=first.checkpoint)
    last = train(loop, tmp_path / "c", callback(loop, exporters=[sink]), steps=9, resume=between.checkpoint)
    assert same(last.model, train(loop, tmp_path / "bare", steps=9).model)
    counts = loop in ("lightning", "transformers")
    assert [m.step for m in sink.measurements] == ([7] if counts else [0])


def test_settings_win_over_the_config_and_unknown_ones_are_refused(loop: str) -> None:
    assert callback(loop, config=MonitorConfig(tolerance=0.5), positions=7).config.tolerance == 0.5
    assert callback(loop, config={"tolerance": 0.5}).config.tolerance == 0.5
    given = MonitorConfig.model_validate({"exporters": ["prometheus", {"kind": "event_log", "path": "x"}]})
    assert callback(loop, config=given).config.exporters == given.exporters
    with pytest.raises(ConfigError, match="evry_n_steps: unknown setting"):
        callback(loop, evry_n_steps=3)
    with pytest.raises(ConfigError, match="config: a int given"):
        callback(loop, config=3)


def test_a_state_that_is_no_state_is_refused(loop: str) -> None:
    with pytest.raises(CheckpointError, match="state_dict: list given"):
        callback(loop).load_state_dict([])

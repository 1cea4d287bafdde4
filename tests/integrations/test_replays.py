"""Batches that are run again inside each loop: by which function, and that the training goes on as without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ess_monitor import Monitor
from tests.eager import EAGER_DIAGNOSIS
from tests.integrations.helpers import BATCHES, LOOPS, LanguageModel, callback, hf_trainer, hooks, train

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning_fabric"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
]

EVIDENT: dict[str, Any] = {
    "capture": {"heads": None},
    "diagnosis": EAGER_DIAGNOSIS,
    "evidence": {"batches": 2},
    "every_n_steps": 6,
}
"""A suspect at the first step, batches run again at the next two, evidence with the sample of step 6."""


@pytest.fixture(autouse=True)
def judged_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let samples be judged at once."""
    judge_at_once(monkeypatch)


def judge_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a sample be judged at the step that took it, however busy the machine is."""
    step = Monitor.step

    def step_and_flush(self: Monitor, *args: Any, **kwargs: Any) -> None:
        step(self, *args, **kwargs)
        self.flush()

    monkeypatch.setattr(Monitor, "step", step_and_flush)


def found_by(ess: Any) -> list[tuple[str, str, int]]:
    evidence = ess.monitor._results._tracker.evidence.values()
    assert ess.monitor.snapshot().health.part_failures_total["replay"] == 0
    return [
        (e.layer.split(".", 1)[1] if e.layer.startswith("inner.") else e.layer, e.basis, e.batches) for e in evidence
    ]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("loop", sorted(LOOPS))
def test_the_loss_is_compared_and_the_training_is_bitwise_that_without_a_monitor(
    loop: str, accumulate: int, tmp_path: Path
) -> None:
    bare = train(loop, tmp_path / "bare", model=LanguageModel("wla"), accumulate=accumulate)
    ess = callback(loop, **EVIDENT, autopilot="advise")
    watched = train(loop, tmp_path / "watched", ess, model=LanguageModel("wla"), accumulate=accumulate)
    assert found_by(ess) == [("model.blocks.1.mixer", "loss", 2)]
    assert len(bare.losses) == accumulate * BATCHES
    assert watched.losses == bare.losses
    assert same(watched.model, bare.model)
    assert hooks(watched.model) == 0


@pytest.mark.parametrize("loop", sorted(LOOPS))
def test_the_loss_is_not_that_of_the_loss_scaler(loop: str, tmp_path: Path) -> None:
    ess = callback(loop, **EVIDENT, autopilot="advise")
    run = train(loop, tmp_path, ess, model=LanguageModel("wla"), scaled=True)
    assert found_by(ess) == [("model.blocks.1.mixer", "loss", 2)]
    [found] = ess.monitor._results._tracker.evidence.values()
    assert found.base == pytest.approx(run.losses[2], abs=1.0)


@pytest.mark.parametrize("loop", sorted(LOOPS))
def test_mode_auto_treats_on_what_is_found(loop: str, tmp_path: Path) -> None:
    settings = {**EVIDENT, "evidence": {"batches": 2, "cut_ratio": 0.99, "silent_ratio": 0.99}}
    ess = callback(loop, **settings, autopilot={"mode": "auto", "lag_steps": 2})
    train(loop, tmp_path, ess, model=LanguageModel("wla"))
    [action] = ess.monitor.actions
    assert (action.action, action.outcome) == ("pull_to_identity", "applied")
    assert found_by(ess) == [("model.blocks.1.mixer", "loss", 2)]


# -- models of the library in its Trainer -----------------------------------------------------------------------------


def mamba() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=16, hidden_size=16, state_size=4, num_hidden_layers=2)
    )


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
        )
    )


@pytest.mark.parametrize(("smoothing", "basis"), [(0.0, "loss"), (0.1, "kl")])
def test_a_model_of_the_library_gives_its_loss_where_it_computes_one(
    smoothing: float, basis: str, tmp_path: Path
) -> None:
    ess = callback("transformers", **EVIDENT, autopilot="advise")
    watched = trained_by_trainer(mamba, tmp_path / "watched", ess, smoothing)
    assert found_by(ess) == [("backbone.layers.1.mixer", basis, 2)]
    bare = trained_by_trainer(mamba, tmp_path / "bare", None, smoothing)
    assert same(watched.model, bare.model)
    assert [entry.get("loss") for entry in watched.state.log_history] == [
        entry.get("loss") for entry in bare.state.log_history
    ]


def test_attention_has_no_decay_and_is_not_examined(tmp_path: Path) -> None:
    ess = callback("transformers", **EVIDENT, autopilot="advise")
    trained_by_trainer(llama, tmp_path, ess, 0.0)
    assert found_by(ess) == []
    assert ess.monitor.snapshot().overhead_seconds["replay"].count == 0


def trained_by_trainer(make: Callable[[], nn.Module], folder: Path, ess: Any, smoothing: float) -> Any:
    from tests.integrations.helpers import dataset

    trainer = hf_trainer(folder, make(), ess, steps=8, label_smoothing_factor=smoothing, save_strategy="no")
    trainer.train_dataset = [{"input_ids": row, "labels": row} for row in dataset()]
    trainer.train()
    return trainer

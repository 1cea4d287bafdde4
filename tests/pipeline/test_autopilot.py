"""The autopilot inside a running monitor: when it acts, what it leaves alone, and how it goes on after a resume."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import nn

from ess_monitor import ConfigError, Monitor, MonitorConfig
from ess_monitor.featurizers import Backbone, BackboneConfig
from tests.eager import EAGER_DIAGNOSIS, NO_EVIDENCE
from tests.exporters.helpers import free_port
from tests.ranks import saved_by_ranks


def config(mode: str, **autopilot: object) -> MonitorConfig:
    return MonitorConfig.load(
        every_n_steps=4,
        overhead_budget_ratio=None,
        capture={"heads": None},
        diagnosis=EAGER_DIAGNOSIS,
        evidence=NO_EVIDENCE,
        autopilot={"mode": mode, "lag_steps": 2, "cooldown_steps": 8, **autopilot},
        environment=False,
    )


def backbone(featurizer: str = "wla") -> Backbone:
    torch.manual_seed(0)
    options = {"alpha": 1.0} if featurizer == "gla_s6" else {"beta": 1.0} if featurizer in ("wla", "gla") else {}
    return Backbone(BackboneConfig(vocab_size=16, width=16, featurizer=featurizer, state_size=8, mixer_options=options))


class Loop:
    """A plain training loop that can be saved and resumed; data depend on the step alone."""

    def __init__(self, settings: MonitorConfig | None, featurizer: str = "wla", rank: int = 0, **options) -> None:
        self.model = backbone(featurizer)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.step, self.rank = 0, rank
        self.monitor = None if settings is None else Monitor(self.model, settings, **options)

    def run(self, steps: int, average=None) -> Loop:
        if self.monitor is not None:
            self.monitor.start()
        for _ in range(steps):
            generator = torch.Generator().manual_seed(1000 * self.rank + self.step)
            tokens = torch.randint(0, 16, (4, 40), generator=generator)
            logits = self.model(tokens)
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            self.optimizer.zero_grad()
            loss.backward()
            if average is not None:
                average(self.model)
            self.optimizer.step()
            self.step += 1
            if self.monitor is not None:
                self.monitor.step({"loss": loss, "accuracy": 0.1}, optimizer=self.optimizer)
        return self

    def save(self) -> io.BytesIO:
        buffer = io.BytesIO()
        assert self.monitor is not None
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "monitor": self.monitor.state_dict(),
        }
        torch.save(copy.deepcopy(state), buffer)
        return buffer

    def load(self, buffer: io.BytesIO) -> Loop:
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        assert self.monitor is not None
        self.monitor.load_state_dict(state["monitor"])
        return self


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("mode", ["off", "advise"])
@pytest.mark.parametrize("featurizer", ["wla", "gla_s6"])
def test_what_was_not_asked_to_act_changes_no_bit(mode: str, featurizer: str) -> None:
    bare = Loop(None, featurizer).run(30)
    watched = Loop(config(mode), featurizer).run(30)
    watched.monitor.flush()
    assert same(bare.model, watched.model)
    assert hooks(watched.model) <= 2  # a sample that may be armed; no pull
    outcomes = {a.outcome for a in watched.monitor.actions}
    assert outcomes == (set() if mode == "off" else {"dry_run"})
    watched.monitor.close()


def test_advise_says_what_auto_does() -> None:
    said = Loop(config("advise"), "wla").run(20)
    said.monitor.flush()
    done = Loop(config("auto"), "wla").run(20)
    dry, wet = said.monitor.actions[0], done.monitor.actions[0]
    assert (dry.layer, dry.action, dry.strength) == (wet.layer, wet.action, wet.strength)
    assert (dry.outcome, wet.outcome) == ("dry_run", "applied")
    said.monitor.close()
    done.monitor.close()


def test_auto_acts_on_the_deepest_collapsed_layer_at_the_agreed_step() -> None:
    loop = Loop(config("auto")).run(14)
    first = loop.monitor.actions[0]
    assert (first.step, first.layer, first.action, first.outcome) == (
        2,
        "blocks.1.mixer",
        "pull_to_identity",
        "applied",
    )
    assert not same(loop.model, Loop(None).run(14).model)
    snapshot = loop.monitor.snapshot()
    assert snapshot.autopilot_enabled
    assert snapshot.interventions_active["pull_to_identity"] == 1
    assert snapshot.interventions_total["pull_to_identity"]["applied"] == 2  # the second rung after the cool-down of 8
    assert snapshot.intervention_budget_remaining == 4
    loop.monitor.close()


def test_alpha_is_rescaled_and_its_layer_named() -> None:
    loop = Loop(config("auto", max_layers=2), "gla_s6").run(6)
    applied = [a.layer for a in loop.monitor.actions if a.outcome == "applied"]
    assert applied == ["blocks.1.mixer"]  # the first layer is spared by the diagnosis
    assert float(loop.model.blocks[1].mixer.log_alpha.exp()) == pytest.approx(100.0, rel=1e-5)
    assert float(loop.model.blocks[0].mixer.log_alpha.exp()) == pytest.approx(1.0)
    loop.monitor.close()


def test_a_closed_monitor_leaves_the_forward_pass() -> None:
    loop = Loop(config("auto")).run(10)
    assert hooks(loop.model) > 0
    loop.monitor.close()
    assert hooks(loop.model) == 0


@pytest.mark.parametrize("featurizer", ["wla", "gla", "gla_s6", "s6"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(featurizer: str) -> None:
    whole = Loop(config("auto"), featurizer).run(24)
    first = Loop(config("auto"), featurizer)
    for at in (1, 3, 9, 14):
        saved = first.run(at - first.step).save()
        rest = Loop(config("auto"), featurizer).load(saved).run(24 - at)
        assert same(rest.model, whole.model), at
        events = [(a.step, a.layer, a.action, a.outcome) for a in (*first.monitor.actions, *rest.monitor.actions)]
        assert events == [(a.step, a.layer, a.action, a.outcome) for a in whole.monitor.actions], at
        rest.monitor.close()
    whole.monitor.close()
    first.monitor.close()


def test_a_loss_that_is_not_finite_takes_the_treatment_back() -> None:
    loop = Loop(config("auto"), "gla_s6").run(6)
    before = float(loop.model.blocks[1].mixer.log_alpha)
    assert before > 1
    monitor = loop.monitor
    for _ in range(8):
        loop.model(torch.randint(0, 16, (4, 40))).sum().backward()
        monitor.step({"loss": torch.tensor(float("nan")), "accuracy": 0.1}, optimizer=loop.optimizer)
    assert [a.outcome for a in monitor.actions if a.outcome == "rolled_back"] == ["rolled_back"]
    assert float(loop.model.blocks[1].mixer.log_alpha) == 0.0
    monitor.close()


def test_a_fault_in_the_autopilot_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*args: object, **kwargs: object) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr("ess_monitor.interventions.Autopilot.act", explode)
    loop = Loop(config("auto")).run(20)
    assert same(loop.model, Loop(None).run(20).model)
    loop.monitor.close()


def test_a_lag_as_long_as_the_interval_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"every_n_steps=4 must be above autopilot\.lag_steps=4"):
        config("auto", lag_steps=4)


def average_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= torch.distributed.get_world_size()


def one_rank(rank: int, folder: str, port: int, featurizer: str) -> None:
    import os

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    loop = Loop(config("auto"), featurizer, rank=rank)
    loop.run(20, average=average_gradients)
    actions = [(a.step, a.layer, a.action, a.strength, a.outcome) for a in loop.monitor.actions]
    readings = [r.effective_size for r in loop.monitor.readings]
    loop.monitor.close()
    torch.save({"model": loop.model.state_dict(), "actions": actions, "sizes": readings}, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("featurizer", ["wla", "gla_s6"])
def test_two_ranks_with_different_data_act_alike(featurizer: str, tmp_path: Path) -> None:
    a, b = saved_by_ranks(one_rank, tmp_path, 2, free_port(), featurizer)
    assert a["actions"] == b["actions"]
    assert a["actions"], "nothing was done, so nothing was compared"
    assert a["sizes"] == b["sizes"]
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name]), name

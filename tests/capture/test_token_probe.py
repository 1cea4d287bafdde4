from __future__ import annotations

import pytest
import torch
from torch import nn

from ess_monitor import CaptureError, Monitor, MonitorConfig
from ess_monitor.capture import TokenProbe
from ess_monitor.featurizers import GLA, Backbone, BackboneConfig

CONFIG = MonitorConfig.load(
    every_n_steps=2, overhead_budget_ratio=None, capture={"source": "random_tokens"}, environment=False
)


def backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone(BackboneConfig(vocab_size=64, width=16, state_size=8))


def repetitive() -> torch.Tensor:
    """Two distinct tokens: the rank of any operator on them is small."""
    return torch.arange(2).repeat(4, 16)


def train(model: nn.Module, monitor: Monitor | None, steps: int = 6) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(steps):
        loss = model(repetitive()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if monitor is not None:
            monitor.step({"loss": loss})
    return losses


def test_random_tokens_lift_the_cap_that_the_data_put_on_the_rank() -> None:
    sizes = {}
    for source in ("train", "random_tokens"):
        model = backbone()
        config = CONFIG.model_copy(update={"capture": CONFIG.capture.model_copy(update={"source": source})})
        with Monitor(model, config) as monitor:
            train(model, monitor)
            sizes[source] = [r.effective_size for r in monitor.flush()]
    assert all(a > b for a, b in zip(sizes["random_tokens"], sizes["train"], strict=True))


class Counting(nn.Module):
    """Writes to a buffer, an attribute and a generator of its own in each forward pass, in eval mode as well."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls, self.generator = backbone(), 0, torch.Generator().manual_seed(1)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y = self.inner(tokens)
        self.calls += 1
        self.mean.lerp_(y.detach().mean(), 0.1)
        return y * torch.rand(1, generator=self.generator) + self.mean


def test_the_probe_leaves_no_trace_in_a_model_that_keeps_a_state() -> None:
    bare, watched = Counting(), Counting()
    expected = train(bare, None)
    with Monitor(watched, CONFIG) as monitor:
        assert train(watched, monitor) == expected
        assert {reading.status for reading in monitor.flush()} == {"ok"}
    assert (watched.calls, watched.mean) == (bare.calls, bare.mean)


def test_the_probe_changes_nothing_in_the_training() -> None:
    bare, watched = backbone(), backbone()
    expected = train(bare, None)
    with Monitor(watched, CONFIG) as monitor:
        state = torch.get_rng_state()
        losses = train(watched, monitor)
        assert torch.equal(torch.get_rng_state(), state)
    assert losses == expected
    assert watched.training
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in watched.modules()) == 0


def test_the_same_turn_draws_the_same_tokens() -> None:
    model, seen = backbone(), []
    probe = TokenProbe(model, samples=2)
    probe.watch()
    model(repetitive())
    model.embedding.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    assert probe.run(3)
    assert probe.run(3)
    assert probe.run(4)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert seen[0].shape == (2, 32)


def test_tokens_by_name_and_inside_a_wrapper_that_takes_more_than_tokens() -> None:
    class Task(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = backbone()

        def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return self.net(tokens_BL=tokens).square().mean() + targets.sum()

    task = Task()
    probe = TokenProbe(task, samples=2)
    probe.watch()
    task(repetitive(), torch.zeros(4))
    assert probe.run(0)


def test_a_probe_that_has_seen_no_call_says_so() -> None:
    assert not TokenProbe(backbone(), samples=2).run(0)


def test_a_model_without_an_embedding_is_refused_at_the_start() -> None:
    with pytest.raises(CaptureError, match=r"has no torch\.nn\.Embedding"):
        Monitor(nn.Sequential(GLA(16, 2)), CONFIG)


def test_the_cost_of_a_probe_is_counted_once() -> None:
    model = backbone()
    with Monitor(model, CONFIG) as monitor:
        train(model, monitor)
        monitor.flush()
        snapshot = monitor.snapshot()
    assert snapshot.overhead_seconds["capture"].count == snapshot.measurements_total["ok"] > 0

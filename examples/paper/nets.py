"""Small nets, trained on synthetic tasks: two blocks of width 32, two heads, TSS 16, if nothing else is said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ess_monitor import MonitorConfig, profile
from ess_monitor.capture import CaptureConfig
from ess_monitor.featurizers import Backbone, BackboneConfig
from ess_monitor.interventions import collect_penalties
from ess_monitor.records import Reading
from ess_monitor.tasks import MQAR, MQARConfig, SyntheticTask, accuracy, loss

BATCH = 32
TEST_SAMPLES = 1024
TEST_SEED = 10_000
"""Added to a seed, it gives that of the samples with which a net is tested."""


def recall_task(seed: int, *, length: int, kv_pairs: int, vocab_size: int = 32, samples: int = 1_000_000) -> MQAR:
    """Return multi-query associative recall, the paper's task MQAR."""
    return MQAR(MQARConfig(length=length, kv_pairs=kv_pairs, vocab_size=vocab_size, samples=samples, seed=seed))


def net(seed: int, **settings: Any) -> Backbone:
    """Return a net with random weights; `settings` are those of `BackboneConfig`."""
    torch.manual_seed(seed)
    return Backbone(BackboneConfig(**{"vocab_size": 32, **settings}))


@dataclass
class Training:
    """A net in training: AdamW, 50 warm-up steps, then a constant rate, gradients clipped to norm 1.

    `copy.deepcopy` forks it: both go on with the same weights, moments and data.
    """

    model: nn.Module
    task: SyntheticTask
    learning_rate: float = 5e-3
    pull: float = 0.0
    """lambda of the A->I regularizer."""
    pulled: Sequence[str] = ()
    """Names of the layers that it pulls."""
    step: int = 0
    batch: int = BATCH

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate, weight_decay=0.1)

    def run(self, until: int, every: int | None = None, look: Callable[[Training], None] | None = None) -> None:
        """Train up to step `until`; call `look` before every `every`-th step, and at the end."""
        while self.step < until:
            if look is not None and every is not None and self.step % every == 0:
                look(self)
            self._once()
        if look is not None:
            look(self)

    def _once(self) -> None:
        self.model.train()
        tokens, targets = self.task.batch(range(self.batch * self.step, self.batch * (self.step + 1)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * min(1.0, (self.step + 1) / 50)
        if self.pull:
            with collect_penalties(self.model, layers=list(self.pulled)) as penalties:
                value = loss(self.model(tokens), targets)
            value = value + self.pull * penalties.total()
        else:
            value = loss(self.model(tokens), targets)
        self.optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1


@torch.no_grad()
def evaluate(model: nn.Module, task: SyntheticTask, samples: int = TEST_SAMPLES) -> tuple[float, float]:
    """Return accuracy and loss on the first samples of a task, in eval mode."""
    was_training = model.training
    model.eval()
    tokens, targets = task.batch(range(samples))
    logits = model(tokens)
    model.train(was_training)
    return float(accuracy(logits, targets)), float(loss(logits, targets))


def readings(model: nn.Module, inputs: Tensor, **settings: Any) -> tuple[Reading, ...]:
    """Return a reading of every layer: 8 samples, all heads; `settings` are those of `MonitorConfig`."""
    given = {"positions": 3, "capture": CaptureConfig(samples=8, heads=None), **settings}
    return profile(model, inputs, config=MonitorConfig(**given)).readings

"""A plain training loop whose batches can be run again, and settings under which that happens within a few steps."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ess_monitor import Monitor, MonitorConfig
from ess_monitor.featurizers import Backbone, BackboneConfig
from ess_monitor.records import Evidence, StateEvidence
from tests.eager import EAGER_DIAGNOSIS

LAST = "backbone.blocks.1.mixer"
"""The layer that is examined: the first one is spared by the diagnosis."""

ALL_COLLAPSED: dict[str, Any] = {"cut_ratio": 0.99, "silent_ratio": 0.99, "kl_silent": 1e9}
"""Settings `evidence` under which whatever is found supports a collapse."""

FULL: dict[str, Any] = {
    "collapsed_below": 0.01,
    "collapsed_recovers_above": 0.02,
    "starved_below": 0.03,
    "starved_recovers_above": 0.04,
    "saturated_recovers_below": 0.05,
    "full_above": 0.06,
    "saturated_spectrum_end": 0.0,
}
"""Settings `diagnosis` under which every layer is full."""

QUICK_TRIAL: dict[str, Any] = {"checks": (4, 13), "harm_ratio": 1e3, "gain_ratio": 1e3}
"""Two comparisons, of which nothing follows."""


def settings_of(
    mode: str = "advise",
    *,
    evidence: dict[str, Any] | None = None,
    diagnosis: dict[str, Any] | None = None,
    ranks: Any = None,
    **autopilot: Any,
) -> MonitorConfig:
    """A sample every 8 steps: a suspect at step 2, batches run again at steps 3 to 5, a decision at step 10."""
    return MonitorConfig.load(
        environment=False,
        every_n_steps=8,
        overhead_budget_ratio=None,
        capture={"heads": None},
        diagnosis={**EAGER_DIAGNOSIS, **(diagnosis or {})},
        distributed={"ranks": ranks},
        evidence={"batches": 3, **(evidence or {})},
        autopilot={"mode": mode, "lag_steps": 2, "cooldown_steps": 16, "probation": QUICK_TRIAL, **autopilot},
    )


class Net(nn.Module):
    """A backbone with what a forward pass can leave traces in: batch statistics and dropout."""

    def __init__(self, featurizer: str = "wla") -> None:
        super().__init__()
        options = {"alpha": 1.0} if featurizer == "gla_s6" else {"beta": 1.0} if featurizer in ("wla", "gla") else {}
        self.backbone = Backbone(
            BackboneConfig(vocab_size=16, width=16, featurizer=featurizer, state_size=8, mixer_options=options)
        )
        self.norm = nn.BatchNorm1d(16)
        self.dropout = nn.Dropout(0.2)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.dropout(self.norm(self.backbone(tokens).mT).mT)
        return logits


def batch(step: int, rank: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randint(0, 16, (4, 40), generator=generator)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


Replays = Callable[["Loop", Tensor], "Callable[[], Any] | None"]
"""Gives the replay of a loop's batch."""


def by_loss(loop: Loop, tokens: Tensor) -> Callable[[], Any]:
    return lambda: loss_of(loop.called, tokens)


def by_outputs(loop: Loop, tokens: Tensor) -> None:
    """Leave it to the monitor to call the model again."""


class Loop:
    """A training whose data depend on the step alone, and dropout on torch's generator."""

    def __init__(
        self,
        settings: MonitorConfig | None,
        replays: Replays = by_loss,
        featurizer: str = "wla",
        *,
        dtype: torch.dtype = torch.float32,
        rank: int = 0,
        wrap: Callable[[Any], Any] = lambda model: model,
        every_step: Callable[[Loop], None] = lambda loop: None,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model = Net(featurizer).to(dtype)
        self.called, self.rank = wrap(self.model), rank
        self.optimizer = torch.optim.AdamW(self.called.parameters(), lr=1e-2)
        self.step, self.replays, self.every_step = 0, replays, every_step
        self.monitor = Monitor(self.called, settings, **options) if settings is not None else None

    def run(self, steps: int) -> Loop:
        if self.monitor is not None:
            self.monitor.start()
        for _ in range(steps):
            tokens = batch(self.step, self.rank)
            loss = loss_of(self.called, tokens)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.step += 1
            self.every_step(self)
            if self.monitor is not None:
                replay = self.replays(self, tokens)
                self.monitor.step({"loss": loss, "accuracy": 0.1}, optimizer=self.optimizer, replay=replay)
                if self.monitor.config.autopilot.mode != "auto":
                    self.monitor.flush()  # a sample is judged at once, on any machine
        return self

    def training(self) -> dict[str, Any]:
        """All that the training goes on from."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "step": self.step,
        }

    def save(self) -> io.BytesIO:
        buffer = io.BytesIO()
        assert self.monitor is not None
        torch.save(copy.deepcopy({**self.training(), "monitor": self.monitor.state_dict()}), buffer)
        return buffer

    def load(self, buffer: io.BytesIO) -> Loop:
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        self.step = state["step"]
        assert self.monitor is not None
        self.monitor.load_state_dict(state["monitor"])
        return self

    @property
    def evidence(self) -> list[Evidence]:
        """The latest on each layer that was examined."""
        assert self.monitor is not None
        return list(self.monitor._results._tracker.evidence.values())

    @property
    def state_evidence(self) -> list[StateEvidence]:
        """The latest on each layer whose state was made smaller."""
        assert self.monitor is not None
        return list(self.monitor._results._tracker.state_evidence.values())


def bits(value: Any) -> Any:
    """A copy of nested values whose tensors can be compared with ==."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.detach().cpu().contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    return [bits(item) for item in value] if isinstance(value, (list, tuple)) else value

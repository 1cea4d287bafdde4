"""An autopilot on a small real model, told what it would have measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ess_monitor.capture import find_layers
from ess_monitor.interventions import Autopilot, AutopilotConfig
from ess_monitor.records import Action, Condition, Finding, Reading
from tests.interventions.helpers import backbone, batch, task_loss

FIRST, LAST = "blocks.0.mixer", "blocks.1.mixer"
QUICK: dict[str, Any] = {"mode": "auto", "cooldown_steps": 200, "release_steps": 300}
"""Measured every 100 steps, so that every wait is a few measurements long."""


def reading(step: int, layer: str, *, retention: float | None = 0.5, utilization: float = 0.15) -> Reading:
    return Reading(
        step=step,
        layer=layer,
        status="ok",
        state_capacity=4,
        effective_size=4 * utilization,
        utilization_ratio=utilization,
        retention_ratio=retention,
    )


class Run:
    """A run in which one measurement is made every 100 steps."""

    def __init__(self, featurizer: str | tuple[str, ...], **settings: Any) -> None:
        self.model = backbone(featurizer)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.pilot = self.new_pilot(**settings)
        self.step = 0

    def new_pilot(self, **settings: Any) -> Autopilot:
        config = AutopilotConfig.model_validate({**QUICK, **settings})
        return Autopilot(config, find_layers(self.model), retention_below=0.7)

    def train(self, steps: int = 1) -> None:
        """Optimizer steps on fresh data."""
        for number in range(steps):
            task_loss(self.model, batch(seed=self.step + number)).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def measure(
        self,
        conditions: Mapping[str, Condition] | None = None,
        *,
        retention: float | Mapping[str, float | None] | None = 0.5,
        loss: float | None = 1.0,
        broken: bool = False,
        findings: tuple[Finding, ...] = (),
        times: int = 1,
    ) -> tuple[Action, ...]:
        """The actions of the last of `times` measurements. By default both layers are collapsed."""
        conditions = {FIRST: "collapsed", LAST: "collapsed"} if conditions is None else conditions
        actions: tuple[Action, ...] = ()
        for _ in range(times):
            self.step += 100
            of = retention if isinstance(retention, Mapping) else dict.fromkeys(conditions, retention)
            actions = self.pilot.act(
                self.step,
                [reading(self.step, name, retention=of.get(name)) for name in conditions],
                conditions,
                findings,
                {} if loss is None else {"loss": loss},
                loss_broken=broken,
                optimizer=self.optimizer,
            )
        return actions

    @property
    def pulled(self) -> list[str]:
        """Layers with a hook of ours in their forward pass."""
        return [
            layer.name for layer in find_layers(self.model) if any(m._forward_pre_hooks for m in layer.module.modules())
        ]


def weights(module: nn.Module) -> dict[str, bytes]:
    """Parameters and buffers, for comparison bit for bit."""
    return {name: tensor.detach().numpy().tobytes() for name, tensor in module.state_dict().items()}


def said(actions: tuple[Action, ...]) -> list[tuple[str, str, str, float | None]]:
    """Layer, action, outcome and strength of each."""
    return [(a.layer, a.action, a.outcome, a.strength) for a in actions]

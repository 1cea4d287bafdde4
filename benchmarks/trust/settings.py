"""Defines what a run is made of: the source of its data, its model, its training and its task metric."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ess_monitor import MonitorConfig

Label = Literal["healthy", "collapsed"]
Split = Literal["seen", "held_out"]
Variant = Literal["auto", "auto_metric", "control", "remedy", "repeat"]

SPLITS: tuple[Split, ...] = ("seen", "held_out")
VARIANTS: tuple[Variant, ...] = ("auto", "auto_metric", "control", "remedy", "repeat")
"""How a run is trained. All variants of a run have the same initial weights, and all but `repeat` the same data:

auto         mode auto, and the diagnosis is given no metric
auto_metric  mode auto, and the diagnosis is given the task's metric
control      mode off
remedy       mode off, and the last mixer is treated from step 500 on, whatever its condition: checks the label
repeat       mode off with other samples of the same source: the noise between two controls

`benchmarks.trust.plan` says which of them a run needs.
"""


@dataclass(frozen=True)
class SourceSettings:
    """Settings of a source of sequences (`benchmarks.trust.sources`)."""

    kind: Literal["text", "windows", "markov", "copy", "recall", "memoryless"]
    length: int = 32
    order: int = 1
    """Tokens of context that decide the next one (text, markov)."""
    back: int = 1
    """Distance of the token to repeat (copy)."""
    kv_pairs: int = 4
    """Pairs to remember (recall)."""
    stream: int = 0
    """Selects another table of the same kind (markov)."""


@dataclass(frozen=True)
class ModelSettings:
    """Settings of a model (`benchmarks.trust.models`)."""

    featurizers: tuple[str, ...] = ("gla", "gla")
    """Mixer of every block, or the class of a model of transformers twice ("Mamba", "Mamba2")."""
    options: dict[str, float] = field(default_factory=dict)
    """Options of the mixers."""
    width: int = 32
    state_size: int = 16


@dataclass(frozen=True)
class Target:
    """The metric that the diagnosis is given in the variant `auto_metric`, and its value from which a task is solved.

    A loss is given as a multiple of the source's entropy, or of the loss of guessing where the entropy is unknown.
    """

    metric: Literal["accuracy", "loss"] = "accuracy"
    solved: float = 0.9


@dataclass(frozen=True)
class Setting:
    """Settings of a run apart from its seed."""

    source: SourceSettings
    model: ModelSettings
    target: Target
    steps: int = 2400
    batch: int = 16
    learning_rate: float = 5e-3
    schedule: Literal["constant", "cosine", "restarts"] = "constant"
    noise: float = 0.0
    """Share of the targets that are replaced by random tokens."""
    first: SourceSettings | None = None
    """Source of the first `first_steps` steps, where the task changes during the run."""
    first_steps: int = 0
    pretrained: SourceSettings | None = None
    """Source of `pretrained_steps` steps before the run, without a monitor and with an optimizer of their own."""
    pretrained_steps: int = 0
    check_label: bool = False
    """Whether the remedy could help, so that the label needs evidence: the variant `remedy`."""


@dataclass(frozen=True)
class TrustRun:
    """One labeled run of the catalog."""

    name: str
    kind: str
    label: Label
    """healthy: no layer needs treatment. collapsed: expected to collapse; it counts as such only if the control ends
    unsolved and the variant `remedy` solved."""
    seed: int
    split: Split
    setting: Setting

    @property
    def digest(self) -> str:
        """A short digest of the settings: results of other settings are not this run's."""
        return _digest(asdict(self.setting))


def monitor_config(variant: Variant, diagnosis: dict[str, Any] | None = None) -> MonitorConfig:
    """Return the defaults with the mode of a variant, and without an overhead budget, which depends on the machine."""
    mode = "auto" if variant in ("auto", "auto_metric") else "off"
    return MonitorConfig.load(overhead_budget_ratio=None, autopilot=mode, diagnosis=diagnosis or {}, environment=False)


def thresholds_digest() -> str:
    """Return a short digest of the settings that decide what is called collapsed and what is treated.

    Results carry it: it shows that the thresholds did not change between the seen and the held-out half. What is called
    saturated has no part in it: nothing is treated for that.
    """
    settings = monitor_config("auto").model_dump(mode="json")
    deciding = {name: settings[name] for name in ("every_n_steps", "diagnosis", "evidence", "autopilot")}
    for name in ("diagnosis", "evidence"):
        deciding[name] = {key: value for key, value in deciding[name].items() if "satura" not in key}
    return _digest(deciding)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

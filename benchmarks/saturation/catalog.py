"""Lists the runs: tasks that need less, about as much or more than the state, and full states that need no more.

What a run is labeled is measured (`benchmarks.saturation.verdict`), and stands nowhere here. The runs of a chain differ
in the size of their state alone: each is the run with twice the state of the one before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.saturation.sources import SizedSettings
from benchmarks.trust.settings import ModelSettings, Setting, SourceSettings, Split, Target

SEEDS = (300, 301, 303)
"""Seeds of a chain. The odd ones are held out: the thresholds were chosen with the other."""


@dataclass(frozen=True)
class SaturationRun:
    """One run of the catalog."""

    name: str
    kind: str
    seed: int
    split: Split
    setting: Setting
    double: str
    """Name of the run with a state twice as large; empty at the end of a chain."""

    @property
    def variants(self) -> tuple[str, ...]:
        """base: the run itself, under a monitor. double: with a state twice as large, where that is no run itself."""
        return ("base",) if self.double else ("base", "double")

    @property
    def digest(self) -> str:
        """A short digest of the settings: results of other settings are not this run's."""
        return hashlib.sha256(json.dumps(asdict(self.setting), sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Chain:
    """Settings with states of several sizes."""

    setting: Setting
    sizes: tuple[int, ...] = (2,)
    """State sizes of the runs, each twice the one before."""


def _setting(
    source: SourceSettings, featurizer: str, target: Target, *, depth: int = 1, options: Any = None, **others: Any
) -> Setting:
    model = ModelSettings((featurizer,) * depth, options or {}, width=16)
    return Setting(source, model, target, **{"steps": 400, "batch": 16, "learning_rate": 1e-2, **others})


def _pairs(count: int) -> SourceSettings:
    return SizedSettings("pairs", 2 * count, kv_pairs=count)


ACCURATE, UNREACHABLE = Target("accuracy", 0.99), Target("loss", 0.8)
"""The second is 0.8 of the least possible loss, or of that of guessing: users set targets that no model can reach."""
SLOW, LARGE_ALPHA = {"beta": 16.0}, {"alpha": 100.0}
COMPRESSION = SizedSettings("compression", 8)
LONGER = {"steps": 500, "learning_rate": 3e-2}
"""So that the runs come to their plateau."""

CHAINS: dict[str, dict[str, Chain]] = {
    "pairs": {
        "8, gla": Chain(_setting(_pairs(8), "gla", ACCURATE, options=SLOW, **LONGER)),
        "8, wla": Chain(_setting(_pairs(8), "wla", ACCURATE, options=SLOW, **LONGER)),
        "8, gla_s6": Chain(_setting(_pairs(8), "gla_s6", ACCURATE, options=LARGE_ALPHA, **LONGER)),
        "6, gla": Chain(_setting(_pairs(6), "gla", ACCURATE, options=SLOW, **LONGER)),
        "6, wla": Chain(_setting(_pairs(6), "wla", ACCURATE, options=SLOW, **LONGER)),
        "4, wla": Chain(_setting(_pairs(4), "wla", ACCURATE, options=SLOW, **LONGER)),
    },
    "compression": {
        "gla": Chain(_setting(COMPRESSION, "gla", ACCURATE, options=SLOW)),
        "wla": Chain(_setting(COMPRESSION, "wla", ACCURATE, options=SLOW)),
    },
    "noise": {
        "4 pairs, 40 %, gla": Chain(_setting(_pairs(4), "gla", ACCURATE, options=SLOW, noise=0.4)),
        "8 pairs, all, wla": Chain(_setting(_pairs(8), "wla", ACCURATE, options=SLOW, noise=1.0)),
    },
    "small steps": {
        "8 pairs, gla": Chain(_setting(_pairs(8), "gla", ACCURATE, options=SLOW, learning_rate=1e-5)),
    },
    "tokens": {
        "copy 4, wla": Chain(_setting(SourceSettings("copy", 24, back=4), "wla", ACCURATE)),
        "markov, wla": Chain(_setting(SourceSettings("markov", 24), "wla", UNREACHABLE)),
        "trigram, gla": Chain(_setting(SourceSettings("markov", 24, order=2), "gla", UNREACHABLE, options=SLOW)),
        "text 2, wla": Chain(_setting(SourceSettings("text", 24, order=2), "wla", UNREACHABLE, options=SLOW)),
    },
}
"""Kind -> name -> chain."""


def _runs(kind: str, name: str, chain: Chain, seed: int) -> Iterator[SaturationRun]:
    def named(size: int) -> str:
        return f"{kind}: {name} {size}, seed {seed}"

    for size in chain.sizes:
        setting = replace(chain.setting, model=replace(chain.setting.model, state_size=size))
        double = named(2 * size) if 2 * size in chain.sizes else ""
        yield SaturationRun(named(size), kind, seed, "held_out" if seed % 2 else "seen", setting, double)


CATALOG: tuple[SaturationRun, ...] = tuple(
    run
    for seed in SEEDS
    for kind, chains in CHAINS.items()
    for name, chain in chains.items()
    for run in _runs(kind, name, chain, seed)
)

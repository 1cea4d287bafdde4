"""Figures 5a and 26: a decay below 1 forgets, so ESS falls with the length. Nothing is trained."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from ess_monitor.analysis import length_profile
from examples.paper.experiment import SEEDS, Experiment, Finding, Run, Table, interval, shown
from examples.paper.nets import net, recall_task
from examples.paper.plots import curves

ARMS: dict[str, dict[str, Any]] = {
    "LA": {"featurizer": "la"},
    "GLA": {"featurizer": "gla", "mixer_options": {"beta": 16.0}},
    "WLA": {"featurizer": "wla", "mixer_options": {"beta": 16.0}},
}
LENGTHS = (64, 128, 256, 512, 1024)
KV_PAIRS, VOCAB_SIZE = 16, 64
KEPT, LOST = 0.8, 0.5
"""Of the ESS of the shortest sequence, LA keeps at least, gated layers at most, this share at the longest."""


def runs(seeds: Sequence[int], short: bool) -> list[Run]:
    """Return a run for each arm and seed."""
    return [
        {"arm": arm, "seed": seed, "lengths": list(LENGTHS[:2] if short else LENGTHS)} for seed in seeds for arm in ARMS
    ]


def run(settings: Run) -> Run:
    """Measure one net with random weights on recall of every length."""
    model = net(settings["seed"], vocab_size=VOCAB_SIZE, **ARMS[settings["arm"]])
    found: Run = {"ess_kv": [], "norm": []}
    for length in settings["lengths"]:
        task = recall_task(settings["seed"], length=length, kv_pairs=KV_PAIRS, vocab_size=VOCAB_SIZE)
        layers = length_profile(model, task.batch(range(8))[0], lengths=[length]).layers
        found["ess_kv"].append([(layer.lengths[0].effective_size or 0.0) / KV_PAIRS for layer in layers])
        found["norm"].append([layer.lengths[0].decay_product_norm or 0.0 for layer in layers])
    return found


def findings(rows: list[Run]) -> list[Finding]:
    """Compare by how much ESS and the norm fall in each arm."""
    of_arm = {arm: [row for row in rows if row["arm"] == arm] for arm in ARMS}
    lengths = rows[0]["lengths"]
    kept = {
        arm: [statistics.fmean(row["ess_kv"][-1]) / statistics.fmean(row["ess_kv"][0]) for row in of_arm[arm]]
        for arm in ARMS
    }
    falls = [all(share <= LOST for share in kept[arm]) for arm in ("GLA", "WLA")]
    stays = all(share >= KEPT for share in kept["LA"])
    return [
        Finding(
            name="Figure 5a",
            claim="ESS and the norm of the product of all A fall with the length in GLA and WLA. In LA, whose A is the "
            "identity, they stay.",
            source="section 4.2, figures 5a and 26",
            setting=f"Nets with random weights, TSS 16, beta 16, MQAR with {KV_PAIRS} pairs and {lengths[0]} to "
            f"{lengths[-1]} tokens; tolerance-ESS (1e-3) at the midpoint, mean over 2 samples and all heads.",
            rule=f"Reproduced: in every seed, from the shortest to the longest sequence, the ESS of LA keeps "
            f"{KEPT:.0%} at least, that of GLA and of WLA {LOST:.0%} at most. Partly: LA and one of the two.",
            verdict="reproduced" if stays and all(falls) else "partly" if stays and any(falls) else "not reproduced",
            result="Share of ESS that is left: " + ", ".join(f"{arm} {shown(kept[arm])}" for arm in ARMS) + ".",
            tables=(
                Table(
                    "ESS / kv of layer 0, of layer 1, and norm of the product of A in layer 1",
                    ("", *(f"{length} tokens" for length in lengths)),
                    tuple(
                        (arm, *(_cell(of_arm[arm], place) for place in range(len(lengths)))) for arm in ARMS
                    ),
                ),
            ),
            figures=(
                curves(
                    "ESS / kv over the length, mean of both layers",
                    {
                        arm: [
                            (length, *interval(statistics.fmean(row["ess_kv"][place]) for row in of_arm[arm]))
                            for place, length in enumerate(lengths)
                        ]
                        for arm in ARMS
                    },
                    x_label="tokens",
                    y_label="ESS / kv",
                    log_x=True,
                ),
            ),
        )
    ]  # fmt: skip


def _cell(rows: list[Run], place: int) -> str:
    sizes = [statistics.fmean(row["ess_kv"][place][layer] for row in rows) for layer in (0, 1)]
    norm = statistics.fmean(row["norm"][place][1] for row in rows)
    return f"{sizes[0]:.2f}, {sizes[1]:.2f}, {norm:.1e}"


EXPERIMENT = Experiment("memory_decay", runs, run, findings, SEEDS)

"""Compares runs with the autopilot and controls without interventions, over several seeds.

    python examples/rescue.py --seeds 8 [--first-seed K] [--featurizer wla|gla|gla_s6] [--json FILE]

Both runs of a seed have the same data and the same initial weights. They are the same run, bit by bit, until the
autopilot acts. The control has the same monitor in mode `advise`. Every run is a plain training loop in a process of
its own with one thread. The accuracy is measured on 1024 new samples at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ess_monitor import Monitor, MonitorConfig
from ess_monitor.exporters import Exporter
from ess_monitor.featurizers import Backbone, BackboneConfig
from ess_monitor.tasks import MQAR, MQARConfig, accuracy, loss

SETTINGS: dict[str, dict[str, Any]] = {
    "wla": {"length": 32, "kv_pairs": 4, "steps": 2000, "options": {"beta": 1.0}},
    "gla": {"length": 64, "kv_pairs": 8, "steps": 2600, "options": {"beta": 1.0}},
    "gla_s6": {"length": 64, "kv_pairs": 8, "steps": 2600, "options": {"alpha": 1.0}},
}
"""Settings in which a layer collapses. All have two mixers and two SwiGLU MLPs of width 32, two heads, state 16,
vocabulary 32 and batch 32."""

MONITOR = {
    "every_n_steps": 50,
    "overhead_budget_ratio": None,
    "diagnosis": {"metric": "accuracy", "metric_solved": 0.9, "warmup_steps": 300},
}
TREATED = "blocks.1.mixer"
LOW = ("collapsed", "unused")
"""Conditions in which a layer is treated here. "unused": nothing of the past reaches the loss, which is unsolved."""


def batch_loss(model: torch.nn.Module, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the loss of a batch; the monitor calls it to see what the loss says of a layer that looks collapsed."""
    return loss(model(tokens), targets)


def train(
    setting: dict[str, Any],
    seed: int,
    config: MonitorConfig,
    *,
    exporters: Iterable[Exporter] = (),
    before_step: Callable[[int, Backbone], None] | None = None,
) -> tuple[Monitor, float]:
    """Train under a monitor; return the closed monitor and the accuracy on 1024 new samples.

    `before_step` is called with the step and the model before each forward pass.
    """
    task = {"length": setting["length"], "kv_pairs": setting["kv_pairs"], "vocab_size": 32}
    torch.manual_seed(seed)
    model = Backbone(
        BackboneConfig(
            vocab_size=32,
            featurizer=setting["featurizer"],
            state_size=setting.get("state_size", 16),
            mixer_options=setting["options"],
        )
    )
    data = MQAR(MQARConfig(samples=setting["steps"] * 32, seed=seed, **task))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    with Monitor(model, config, exporters=exporters) as monitor:
        for step in range(setting["steps"]):
            if before_step is not None:
                before_step(step, model)
            tokens, targets = data.batch(range(32 * step, 32 * (step + 1)))
            logits = model(tokens)
            value = loss(logits, targets)
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            metrics = {"loss": value, "accuracy": accuracy(logits, targets)} if monitor.armed else None
            monitor.step(metrics, optimizer=optimizer, replay=partial(batch_loss, model, tokens, targets))
        monitor.flush()
    model.eval()
    with torch.no_grad():
        tokens, targets = MQAR(MQARConfig(samples=1024, seed=seed + 10_000, **task)).batch(range(1024))
        return monitor, float(accuracy(model(tokens), targets))


def run(featurizer: str, seed: int, arm: str, steps: int | None = None) -> dict[str, Any]:
    """Train one arm of one seed; return its row of the table."""
    torch.set_num_threads(1)
    setting = {**SETTINGS[featurizer], "featurizer": featurizer}
    setting["steps"] = steps or setting["steps"]
    config = MonitorConfig.load(**MONITOR, autopilot="auto" if arm == "autopilot" else "advise", environment=False)
    monitor, final = train(setting, seed, config)
    reading = next(r for r in monitor.readings if r.layer == TREATED)
    findings = [f for f in monitor.findings if f.layer == TREATED]
    found = next((f for f in findings if f.condition in LOW), None)
    recovered = [f.step for f in findings if f.previous in LOW]
    return {
        "seed": seed,
        "featurizer": featurizer,
        "arm": arm,
        "accuracy": final,
        "utilization": reading.utilization_ratio,
        "retention": reading.retention_ratio,
        "evidence_step": found.evidence.step if found and found.evidence else None,
        "diagnosed_step": found.step if found else None,
        "recovered_step": recovered[0] if recovered else None,
        "actions": [f"{a.step} {a.layer} {a.action} {a.strength or ''} {a.outcome}" for a in monitor.actions],
    }


def main() -> None:
    """Run the arms, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--featurizer", choices=sorted(SETTINGS), default="wla")
    parser.add_argument("--steps", type=int, help="overrides the steps of the setting")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    arguments = parser.parse_args()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        futures = [
            pool.submit(run, arguments.featurizer, seed, arm, arguments.steps)
            for seed in seeds
            for arm in ("control", "autopilot")
        ]
        rows = [future.result() for future in futures]
    table = Table(title=f"{arguments.featurizer}: control against autopilot at equal steps", title_justify="left")
    columns = (
        "seed",
        "arm",
        "accuracy",
        "utilization",
        "retention",
        "evidence_step",
        "diagnosed_step",
        "recovered_step",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        cells = (row[column] for column in columns)
        table.add_row(*("-" if c is None else f"{c:.3f}" if isinstance(c, float) else str(c) for c in cells))
    console = Console()
    console.print(table)
    for row in rows:
        if row["arm"] == "autopilot":
            console.print(f"seed {row['seed']}: " + ("; ".join(row["actions"]) or "no action"), highlight=False)
    for arm in ("control", "autopilot"):
        values = [row["accuracy"] for row in rows if row["arm"] == arm]
        console.print(f"{arm}: median accuracy {statistics.median(values):.3f}, lowest {min(values):.3f}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

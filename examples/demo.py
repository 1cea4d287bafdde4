"""The main job: a recall run whose second layer forgets, found and rescued while it trains.

    make demo        or        python examples/demo.py [--steps 2000] [--seed 0] [--json FILE]

A weighted linear attention is trained on associative recall in a setting in which the memory of its second mixer
collapses (see recall.py). The run is watched live: a table of the layers beside Lightning's progress bar, the same
numbers in TensorBoard and in an event log, and at http://127.0.0.1:9464/metrics for Prometheus. The autopilot finds
the collapse, pulls the layer's decay towards the identity, and lets go once the layer has recovered. Then the same seed
is trained again and left alone: it is the same run, bit by bit, up to the step of the intervention.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from recall import Recall, RecallModule
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from ess_monitor import Monitor
from ess_monitor.integrations.lightning import ESSMonitorCallback

LAYER = "model.blocks.1.mixer"


def train(arguments: argparse.Namespace, mode: str, exporters: list[Any]) -> dict[str, Any]:
    """One run, with the autopilot in `mode`; what became of it."""
    module = RecallModule(Recall(seed=arguments.seed, steps=arguments.steps))
    logger = TensorBoardLogger(arguments.out, name=mode)
    events = Path(logger.log_dir) / "ess_events.jsonl"
    callback = ESSMonitorCallback(
        every_n_steps=50,
        overhead_budget_ratio=0.05,
        # A short run: judged after 300 steps, believed after five measurements that agree.
        diagnosis={"metric": "accuracy", "metric_solved": 0.9, "warmup_steps": 300},
        autopilot=mode,
        exporters=[*exporters, {"kind": "event_log", "path": str(events)}],
        table=mode == "auto",
    )
    trainer = pl.Trainer(
        max_steps=arguments.steps,
        accelerator="cpu",
        logger=logger,
        callbacks=[callback],
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    started = time.perf_counter()
    trainer.fit(module)
    monitor = callback.monitor
    assert monitor is not None
    reading = next(r for r in monitor.readings if r.layer == LAYER)
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "accuracy": float(trainer.callback_metrics["accuracy"]),
        "utilization": reading.utilization_ratio,
        "retention": reading.retention_ratio,
        "condition": monitor.conditions[LAYER],
        "findings": [f.model_dump() for f in monitor.findings],
        "actions": [a.model_dump() for a in monitor.actions],
        "overhead_ratio": monitor.overhead_ratio,
        "tensorboard": logger.log_dir,
        "event_log": str(events),
        "story": story(monitor),
    }


def story(monitor: Monitor) -> list[str]:
    """What was found and done, in order."""
    lines = [(f.step, 0, f"{f.layer} is [bold]{f.condition}[/bold]: {f.reason}") for f in monitor.findings]
    lines += [(a.step, 1, f"{a.layer}: {a.action} [bold]{a.outcome}[/bold]. {a.message}") for a in monitor.actions]
    return [f"step {step}: {line}" for step, _, line in sorted(lines)]


def main() -> None:
    """Train both runs, compare them, say where the logs are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=9464, help="of the Prometheus endpoint; 0 takes a free one")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the logs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the summary here")
    arguments = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
    torch.set_num_threads(1)  # the tensors are small: a second thread would only wait, and the worker has its own

    console = Console()
    console.rule("with the autopilot")
    rescued = train(arguments, "auto", [{"kind": "prometheus", "port": arguments.port}])
    console.rule("the same seed, left alone")
    alone = train(arguments, "advise", [])

    table = Table(title=f"{LAYER} after {arguments.steps} steps, seed {arguments.seed}", title_justify="left")
    for column in ("run", "accuracy", "utilization", "retention", "condition"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, result in (("left alone", alone), ("autopilot", rescued)):
        numbers = (f"{result[key]:.2f}" for key in ("accuracy", "utilization", "retention"))
        table.add_row(name, *numbers, result["condition"])
    console.print(table)
    console.print("A guess among the four values is right one time in four: accuracy 0.25.\n")
    seconds = rescued["seconds"] + alone["seconds"]
    lines = [
        *rescued["story"],
        "",
        f"both runs took {seconds:.0f} s, {rescued['overhead_ratio']:.1%} of the first one for the monitor",
        f"TensorBoard   tensorboard --logdir {arguments.out}   (custom scalars, and ess_* under scalars)",
        f"event log     {rescued['event_log']}",
        f"Prometheus    http://127.0.0.1:{arguments.port}/metrics while it trained; names: docs/metrics.md",
    ]
    console.print(Panel("\n".join(lines), title="what the run's memory did", title_align="left"), soft_wrap=False)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"autopilot": rescued, "control": alone}, indent=2) + "\n")


if __name__ == "__main__":
    main()

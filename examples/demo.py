"""The main job: a recall run whose second layer forgets, watched live.

    make demo        or        python examples/demo.py [--steps 2000] [--json FILE]

A weighted linear attention is trained on associative recall in a setting in which the memory of its second mixer
collapses (see recall.py). While it trains, a table of the layers is shown beside Lightning's progress bar, the same
numbers go to TensorBoard and to an event log, and Prometheus can scrape them from http://127.0.0.1:9464/metrics.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from recall import Recall, RecallModule
from rich.console import Console
from rich.panel import Panel

from ess_monitor.integrations.lightning import ESSMonitorCallback


def main() -> None:
    """Train, then say what was found and where the logs are."""
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

    module = RecallModule(Recall(seed=arguments.seed, steps=arguments.steps))
    logger = TensorBoardLogger(arguments.out, name=None)
    events = Path(logger.log_dir) / "ess_events.jsonl"
    callback = ESSMonitorCallback(
        every_n_steps=50,
        overhead_budget_ratio=0.05,
        # A short run: judged after 500 steps, believed after five measurements that agree.
        diagnosis={"metric": "accuracy", "metric_solved": 0.9, "warmup_steps": 500},
        exporters=[{"kind": "prometheus", "port": arguments.port}, {"kind": "event_log", "path": str(events)}],
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
    seconds = time.perf_counter() - started

    monitor = callback.monitor
    assert monitor is not None
    accuracy = float(trainer.callback_metrics["accuracy"])
    summary = {
        "seconds": round(seconds, 1),
        "accuracy": accuracy,
        "findings": [f.model_dump() for f in monitor.findings],
        "conditions": monitor.conditions,
        "utilization": {r.layer: r.utilization_ratio for r in monitor.readings},
        "retention": {r.layer: r.retention_ratio for r in monitor.readings},
        "overhead_ratio": monitor.overhead_ratio,
        "tensorboard": logger.log_dir,
        "event_log": str(events),
    }
    lines = [f"{arguments.steps} steps in {seconds:.0f} s, accuracy {accuracy:.2f} (a guess among the values is 0.25)"]
    for finding in monitor.findings:
        lines.append(f"step {finding.step}: {finding.layer} is [bold]{finding.condition}[/bold]. {finding.reason}")
        lines.append(f"  {finding.advice}")
    if not monitor.findings:
        lines.append("nothing found")
    lines += [
        f"the monitor took {monitor.overhead_ratio:.1%} of the training time",
        "",
        f"TensorBoard   tensorboard --logdir {logger.log_dir}   (custom scalars, and ess_* under scalars)",
        f"event log     {events}",
        f"Prometheus    http://127.0.0.1:{arguments.port}/metrics while it trained; docs/metrics.md explains the names",
    ]
    Console().print(Panel("\n".join(lines), title="what the run's memory did", title_align="left"))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()

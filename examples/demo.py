"""Trains a recall model whose second layer forgets, and rescues the layer while it trains.

    make demo        or        python examples/demo.py [--steps 2000] [--seed 0] [--json FILE]

A weighted linear attention is trained on associative recall in a setting in which the memory of its second mixer
collapses (see recall.py). The monitor prints a table of the layers beside Lightning's progress bar. It writes the same
numbers to TensorBoard and an event log, and serves them at http://127.0.0.1:9464/metrics for Prometheus. The autopilot
acts on the collapse: it pulls the layer's decay towards the identity, and releases it once the layer has recovered.
Then the same seed is trained again without interventions. This control is the same run, bit by bit, up to the step of
the first action.
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
    """Train one run with the autopilot in `mode`, and return its results."""
    module = RecallModule(Recall(seed=arguments.seed, steps=arguments.steps))
    logger = TensorBoardLogger(arguments.out, name=mode)
    events = Path(logger.log_dir) / "ess_events.jsonl"
    callback = ESSMonitorCallback(
        every_n_steps=50,
        overhead_budget_ratio=None,  # a run this short needs its measurements, however busy the machine is
        # A short run: it is judged after 300 steps. Five measurements in a row must agree, the default.
        diagnosis={"metric": "accuracy", "metric_solved": 0.9, "warmup_steps": 300},
        autopilot=mode,
        exporters=exporters,
        table=mode == "auto",
    )
    trainer = pl.Trainer(
        max_epochs=1,
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
        "history": history(monitor),
    }


def history(monitor: Monitor) -> list[str]:
    """Return the findings and actions of a run as lines of text, in order."""
    lines = [(f.step, 0, f"{f.layer} is [bold]{f.condition}[/bold]: {f.reason}") for f in monitor.findings]
    lines += [(a.step, 1, f"{a.layer}: {a.action} [bold]{a.outcome}[/bold]. {a.message}") for a in monitor.actions]
    return [f"step {step}: {line}" for step, _, line in sorted(lines)]


def in_plain_words(evidence: dict[str, Any]) -> str:
    """Return what the evidence says, for somebody who has not met the terms."""
    base, more, nothing = evidence["base"], evidence["m50"], evidence["cut"]
    conclusion = {
        "loud": "The model needs its past, and would lose nothing by remembering more: the layer forgets by accident.",
        "silent": "Nothing the layer remembers reaches the loss: the layer forgets by accident.",
        "by_choice": "The model wants it to forget: nothing to treat.",
    }.get(evidence["outcome"], "This does not tell whether the layer should remember more.")
    return (
        f"[bold]What the loss says of this layer at step {evidence['step']}.[/bold] {evidence['batches']} training "
        "batches were run again, without learning from them:\n"
        f"  as it is                                    loss {base:.3f}\n"
        f"  if the layer forgot half as fast            {more:+.3f}\n"
        f"  if it remembered nothing                    {nothing:+.3f}\n"
        f"{conclusion}"
    )


def main() -> None:
    """Train both runs, print a comparison and the paths of the logs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=9464, help="port of the Prometheus endpoint; 0 takes a free one")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the logs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the summary here")
    arguments = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
    torch.set_num_threads(1)  # the tensors are small, and the monitor's worker needs the other core

    console = Console()
    console.rule("with the autopilot")
    rescued = train(arguments, "auto", [{"kind": "prometheus", "port": arguments.port}])
    console.rule("control: the same seed without interventions")
    control = train(arguments, "advise", [])

    table = Table(title=f"{LAYER} after {arguments.steps} steps, seed {arguments.seed}", title_justify="left")
    for column in ("run", "accuracy", "utilization", "retention", "condition"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, result in (("control", control), ("autopilot", rescued)):
        numbers = (f"{result[key]:.2f}" for key in ("accuracy", "utilization", "retention"))
        table.add_row(name, *numbers, result["condition"])
    console.print(table)
    console.print("Guessing among the four values gives an accuracy of 0.25.\n")
    for finding in rescued["findings"]:
        if finding["evidence"] is not None:
            console.print(in_plain_words(finding["evidence"]) + "\n")
    seconds = rescued["seconds"] + control["seconds"]
    lines = [
        *rescued["history"],
        "",
        f"both runs took {seconds:.0f} s; the monitor took {rescued['overhead_ratio']:.1%} of the first one",
        f"TensorBoard   tensorboard --logdir {arguments.out}   (custom scalars, and ess_* under scalars)",
        f"event log     {rescued['event_log']}",
        f"Prometheus    http://127.0.0.1:{arguments.port}/metrics during the run; names: docs/metrics.md",
    ]
    console.print(Panel("\n".join(lines), title="findings and actions", title_align="left"), soft_wrap=False)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"autopilot": rescued, "control": control}, indent=2) + "\n")


if __name__ == "__main__":
    main()

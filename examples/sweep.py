"""Trains a grid of tasks, sequence mixers and seeds on Ray, and shows which of them leave their memory unused.

    python examples/sweep.py [--tasks mqar,compression] [--models gla,wla] [--seeds 2] [--steps 300]
                             [--address auto|ray://HOST:10001] [--folder runs/sweep] [--file-sd DIR] [--json FILE]

Every run trains a small network in a process of its own, with its own monitor and run id. As many runs train at a time
as Ray has cores. Without `--address` Ray is started on this machine and stopped with the sweep. The result of a run is
written to FOLDER/RUN_ID.json when the run ends. To resume an interrupted sweep, give the same command again: runs that
have a result with the same settings are skipped, and runs that failed are repeated.

Every run also writes an event log, FOLDER/RUN_ID/events.jsonl, with its task, mixer and sizes as hyperparameters:
`ess-monitor study FOLDER` says how ESS and TSS go along with accuracy over all of them.

With `--file-sd DIR` Prometheus can scrape every run: the run opens /metrics on a free port of its machine, and writes
its address for file-based service discovery to DIR.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # the sweep sends no data to anyone

from functools import partial

import ray
from rich.console import Console
from rich.table import Table

TASKS: dict[str, dict[str, Any]] = {
    "mqar": {"length": 32, "kv_pairs": 4, "vocab_size": 32},
    "selective_copying": {"length": 32, "tokens_to_copy": 4, "vocab_size": 16},
    "compression": {"length": 16, "vocab_size": 16},
}
MODELS = ("gla", "gla_s6", "la", "s6", "sa", "wla")
BATCH, STATE_SIZE, TEST_SAMPLES = 32, 16, 512


def grid(tasks: list[str], models: list[str], seeds: int, steps: int) -> list[dict[str, Any]]:
    """Return the settings of every run, with a run id that is unique to them."""
    settings = []
    for task, model, seed in itertools.product(tasks, models, range(seeds)):
        one = {"task": task, "model": model, "seed": seed, "steps": steps, **TASKS[task]}
        digest = hashlib.sha256(json.dumps(one, sort_keys=True).encode()).hexdigest()[:8]
        settings.append({**one, "run_id": f"{task}-{model}-{seed}-{digest}"})
    return settings


def train(run: dict[str, Any], file_sd: str | None, folder: str) -> dict[str, Any]:
    """Train one run under a monitor in a worker of Ray; return its result."""
    import torch

    from ess_monitor import Monitor, MonitorConfig
    from ess_monitor.featurizers import Backbone, BackboneConfig
    from ess_monitor.tasks import (
        MQAR,
        Compression,
        CompressionConfig,
        MQARConfig,
        SelectiveCopying,
        SelectiveCopyingConfig,
        accuracy,
        loss,
    )

    torch.set_num_threads(1)
    kinds: dict[str, Any] = {
        "mqar": (MQAR, MQARConfig),
        "selective_copying": (SelectiveCopying, SelectiveCopyingConfig),
        "compression": (Compression, CompressionConfig),
    }
    task, config = kinds[run["task"]]
    shape = TASKS[run["task"]]

    def data(samples: int, seed: int) -> Any:
        return task(config(samples=samples, seed=seed, **shape))

    torch.manual_seed(run["seed"])
    model = Backbone(BackboneConfig(vocab_size=shape["vocab_size"], featurizer=run["model"], state_size=STATE_SIZE))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    log = Path(folder, run["run_id"], "events.jsonl")
    log.unlink(missing_ok=True)  # of an attempt that failed
    exporters: list[dict[str, Any]] = [{"kind": "event_log", "path": str(log)}]
    if file_sd is not None:
        exporters.append({"kind": "prometheus", "port": 0, "run_id": run["run_id"], "file_sd_dir": file_sd})
    settings = MonitorConfig.load(
        every_n_steps=max(1, run["steps"] // 10),
        diagnosis={"metric": "accuracy", "metric_solved": 0.9},
        exporters=exporters,
        run_name=run["run_id"],
        hyperparameters={**run, "featurizer": run["model"], "state_size": STATE_SIZE},
    )
    batches = data(run["steps"] * BATCH, run["seed"])

    def batch_loss(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return loss(model(inputs), targets)

    with Monitor(model, settings) as monitor:
        for step in range(run["steps"]):
            inputs, targets = batches.batch(range(BATCH * step, BATCH * (step + 1)))
            logits = model(inputs)
            value = loss(logits, targets)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            metrics = {"loss": value, "accuracy": accuracy(logits, targets)} if monitor.armed else None
            monitor.step(metrics, optimizer=optimizer, replay=partial(batch_loss, inputs, targets))
        readings = monitor.flush()
        conditions = monitor.conditions
        overhead = monitor.overhead_ratio
    model.eval()
    with torch.no_grad():
        inputs, targets = data(TEST_SAMPLES, run["seed"] + 10_000).batch(range(TEST_SAMPLES))
        final = float(accuracy(model(inputs), targets))
    return {
        **run,
        "accuracy": final,
        "loss": float(value.detach()),
        "utilization": {r.layer: r.utilization_ratio for r in readings},
        "conditions": conditions,
        "overhead_ratio": overhead,
    }


def finished(path: Path, run: dict[str, Any]) -> dict[str, Any] | None:
    """Return the result of an earlier sweep, or None if it is invalid, failed or has other settings."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(result, dict) and all(result.get(name) == value for name, value in run.items())
    return result if same and "error" not in result else None


def keep(path: Path, result: dict[str, Any]) -> None:
    """Write a result atomically: an interruption leaves the whole file or none."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def results(
    train: Callable[..., dict[str, Any]], runs: list[dict[str, Any]], *arguments: Any
) -> Iterator[dict[str, Any]]:
    """Yield `train(run, *arguments)` of each run, in the order in which they end."""
    # A run that raises has a result with its error. A run whose process dies is tried once more.
    remote = ray.remote(num_cpus=1, max_retries=1)(train)
    pending = {remote.remote(run, *arguments): run for run in runs}
    while pending:
        (done, *_), _ = ray.wait(list(pending))
        run = pending.pop(done)
        try:
            yield ray.get(done)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            yield {**run, "error": f"{type(cause).__name__}: {cause}".splitlines()[0]}


def show(console: Console, rows: list[dict[str, Any]], missing: int) -> None:
    """Print one table of all runs."""
    table = Table(title=f"{len(rows)} runs" + (f", {missing} to do" if missing else ""), title_justify="left")
    for column in ("task", "model", "seed", "accuracy", "loss", "utilization by layer", "condition by layer"):
        table.add_column(column, justify="left" if column in ("task", "model") or "layer" in column else "right")
    for row in sorted(rows, key=lambda row: (row["task"], row["model"], row["seed"])):
        cells = [row["task"], row["model"], str(row["seed"])]
        if "error" in row:
            table.add_row(*cells, "failed", "", row["error"], "", style="red")
            continue
        used = "  ".join("-" if value is None else f"{value:.2f}" for value in row["utilization"].values())
        cells += [f"{row['accuracy']:.3f}", f"{row['loss']:.3f}", used, "  ".join(row["conditions"].values())]
        table.add_row(*cells)
    console.print(table)


def choice(known: tuple[str, ...]) -> Any:
    """Return a type for argparse: a comma-separated selection of `known`."""

    def read(text: str) -> list[str]:
        names = list(dict.fromkeys(name.strip() for name in text.split(",")))
        wrong = [name for name in names if name not in known]
        if wrong:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r} is not one of {', '.join(known)}")
        return names

    return read


def positive(text: str) -> int:
    """Parse a whole number of at least 1, as a type for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def main() -> int:
    """Run what is missing and print the table; return 1 if a run failed, 130 after an interruption."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=choice(tuple(TASKS)), default=["mqar", "compression"])
    parser.add_argument("--models", type=choice(MODELS), default=["gla", "wla"])
    parser.add_argument("--seeds", type=positive, default=2, help="seeds 0, 1, ... for every task and model")
    parser.add_argument("--steps", type=positive, default=300)
    parser.add_argument("--address", help="address of a Ray cluster; without it Ray runs on this machine")
    parser.add_argument("--folder", type=Path, default=Path("runs/sweep"), help="folder of the results")
    parser.add_argument(
        "--file-sd", type=Path, metavar="DIR", help="serve /metrics for every run, and write its address to DIR"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows of the table to FILE")
    arguments = parser.parse_args()

    arguments.folder.mkdir(parents=True, exist_ok=True)
    file_sd = None
    if arguments.file_sd is not None:
        arguments.file_sd.mkdir(parents=True, exist_ok=True)
        file_sd = str(arguments.file_sd.resolve())
    runs = grid(arguments.tasks, arguments.models, arguments.seeds, arguments.steps)
    kept = {run["run_id"]: finished(arguments.folder / f"{run['run_id']}.json", run) for run in runs}
    rows = [result for result in kept.values() if result is not None]
    missing = [run for run in runs if kept[run["run_id"]] is None]
    console = Console()
    print(f"{len(runs)} runs, {len(rows)} of them done before; results in {arguments.folder}", flush=True)
    interrupted = False
    if missing:
        local = {} if arguments.address else {"include_dashboard": False}
        ray.init(address=arguments.address, log_to_driver=False, logging_level="ERROR", **local)
        try:
            for result in results(train, missing, file_sd, str(arguments.folder.resolve())):
                keep(arguments.folder / f"{result['run_id']}.json", result)
                rows.append(result)
                summary = result.get("error") or f"accuracy {result['accuracy']:.3f}"
                print(f"{len(rows)} of {len(runs)}: {result['run_id']}: {summary}", flush=True)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            with contextlib.suppress(KeyboardInterrupt):
                ray.shutdown()
    show(console, rows, len(runs) - len(rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if interrupted:
        print("interrupted; give the same command again to resume")
        return 130
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())

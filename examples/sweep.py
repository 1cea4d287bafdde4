"""Trains a grid of tasks, sequence mixers and seeds on Ray, and shows which of them leave their memory unused.

    python examples/sweep.py [--tasks mqar,compression] [--models gla,wla:beta=1] [--state-sizes 4,16] [--kv-pairs 4,8]
                             [--tokens-to-copy 4,8] [--vocab-sizes 8,32] [--seeds 2] [--steps 300]
                             [--learning-rate 0.002] [--warmup-steps 0] [--clip-norm NORM]
                             [--address auto|ray://HOST:10001] [--folder runs/sweep] [--file-sd DIR] [--json FILE]

A model is a featurizer, and options of it: `gla`, `gla:beta=1`, `gla:beta=1:gate_rank=8`. `examples/paper` runs
Findings 1 to 3 of the paper over such a grid.

Every run trains a small network in a process of its own, with its own monitor and run id. As many runs train at a time
as Ray has cores. Without `--address` Ray is started on this machine and stopped with the sweep. The result of a run is
written to FOLDER/RUN_ID.json when the run ends. To resume an interrupted sweep, give the same command again: runs that
have a result with the same settings are skipped, and runs that failed are repeated.

Every run also writes an event log, FOLDER/RUN_ID/events.jsonl, with its task, mixer and sizes as hyperparameters:
`ess-monitor study FOLDER` says how ESS and TSS go along with accuracy over all of them. Accuracy is that of held-out
samples; ESS is of training batches, whose samples are each seen once.

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
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # the sweep sends no data to anyone

from functools import partial

import ray
from rich.console import Console
from rich.table import Table

from ess_monitor.errors import ConfigError

TASKS: dict[str, dict[str, Any]] = {
    "mqar": {"length": 32, "kv_pairs": 4, "vocab_size": 32},
    "selective_copying": {"length": 32, "tokens_to_copy": 4, "vocab_size": 16},
    "compression": {"length": 16, "vocab_size": 16},
}
DEMANDS = {"mqar": "kv_pairs", "selective_copying": "tokens_to_copy", "compression": "vocab_size"}
"""What makes a task harder: what ESS and TSS are divided by (appendix C.3)."""
MODELS = ("gla", "gla_s6", "la", "s6", "sa", "wla")
BATCH, TEST_SAMPLES = 32, 512
TEST_SEED = 10_000
"""Added to a seed, it gives that of the held-out samples."""
OPTIMIZER: dict[str, Any] = {"learning_rate": 2e-3, "warmup_steps": 0, "clip_norm": None}


def grid(
    tasks: Iterable[str],
    models: Iterable[str],
    seeds: Iterable[int],
    steps: int,
    *,
    state_sizes: Iterable[int] = (16,),
    demands: Mapping[str, Iterable[int]] | None = None,
    **optimizer: Any,
) -> list[dict[str, Any]]:
    """Return the settings of every run, with a run id that is unique to them; `demands` are those of each task."""
    settings = []
    shapes = [
        (task, {**TASKS[task], DEMANDS[task]: demand})
        for task in tasks
        for demand in (demands or {}).get(task, (TASKS[task][DEMANDS[task]],))
    ]
    for (task, shape), model, size, seed in itertools.product(shapes, models, state_sizes, seeds):
        one = {"task": task, "model": model, "state_size": size, "seed": seed, "steps": steps}
        one |= {**OPTIMIZER, **optimizer, **shape}
        digest = hashlib.sha256(json.dumps(one, sort_keys=True).encode()).hexdigest()[:8]
        name = re.sub(r"[^a-z0-9_.]+", "-", model)
        settings.append({**one, "run_id": f"{task}-{name}-{seed}-{digest}"})
    return settings


def mixer(model: str) -> tuple[str, dict[str, float]]:
    """Return the featurizer and the options that the name of a model stands for.

    >>> mixer("gla:beta=1:gate_rank=8")
    ('gla', {'beta': 1.0, 'gate_rank': 8})
    """
    featurizer, *options = model.split(":")
    if featurizer not in MODELS:
        raise ValueError(f"{featurizer!r} is not one of {', '.join(MODELS)}")
    values = {}
    for option in options:
        name, _, value = option.partition("=")
        try:
            values[name] = int(value) if name == "gate_rank" else float(value)
        except ValueError:
            raise ValueError(f"{option!r} in {model!r} is not an option with a number, such as beta=16") from None
    return featurizer, values


def network(run: dict[str, Any]) -> Any:
    """Return the net of a run, with random weights of its seed."""
    import torch

    from ess_monitor.featurizers import Backbone, BackboneConfig

    featurizer, options = mixer(run["model"])
    torch.manual_seed(run["seed"])
    return Backbone(
        BackboneConfig(
            vocab_size=run["vocab_size"],
            featurizer=featurizer,
            state_size=run["state_size"],
            mixer_options=options,
            decoder="last_token" if run["task"] == "compression" else "every_token",
        )
    )


def data(run: dict[str, Any], samples: int, seed: int) -> Any:
    """Return the task of a run, with samples of a seed."""
    from ess_monitor import tasks

    kinds: dict[str, Any] = {
        "mqar": (tasks.MQAR, tasks.MQARConfig),
        "selective_copying": (tasks.SelectiveCopying, tasks.SelectiveCopyingConfig),
        "compression": (tasks.Compression, tasks.CompressionConfig),
    }
    task, config = kinds[run["task"]]
    return task(config(samples=samples, seed=seed, **{name: run[name] for name in TASKS[run["task"]]}))


def train(run: dict[str, Any], file_sd: str | None, folder: str) -> dict[str, Any]:
    """Train one run under a monitor in a worker of Ray; return its result."""
    import torch

    from ess_monitor import Monitor, MonitorConfig
    from ess_monitor.tasks import accuracy, loss

    torch.set_num_threads(1)
    model = network(run)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run["learning_rate"], weight_decay=0.1)
    log = Path(folder, run["run_id"], "events.jsonl")
    log.unlink(missing_ok=True)  # of an attempt that failed
    exporters: list[dict[str, Any]] = [{"kind": "event_log", "path": str(log)}]
    if file_sd is not None:
        exporters.append({"kind": "prometheus", "port": 0, "run_id": run["run_id"], "file_sd_dir": file_sd})
    featurizer, options = mixer(run["model"])
    settings = MonitorConfig.load(
        every_n_steps=max(1, run["steps"] // 10),
        overhead_budget_ratio=None,  # ten samples in every run, however short its steps are
        diagnosis={"metric": "accuracy", "metric_solved": 0.9},
        exporters=exporters,
        run_name=run["run_id"],
        hyperparameters={**run, "featurizer": run["model"], "mixer": featurizer, **options},
    )
    batches = data(run, run["steps"] * BATCH, run["seed"])
    test = data(run, TEST_SAMPLES, run["seed"] + TEST_SEED).batch(range(TEST_SAMPLES))

    def batch_loss(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return loss(model(inputs), targets)

    @torch.no_grad()
    def test_accuracy() -> float:
        model.eval()
        found = float(accuracy(model(test[0]), test[1]))
        model.train()
        return found

    with Monitor(model, settings) as monitor:
        for step in range(run["steps"]):
            for group in optimizer.param_groups:
                group["lr"] = run["learning_rate"] * min(1.0, (step + 1) / max(1, run["warmup_steps"]))
            inputs, targets = batches.batch(range(BATCH * step, BATCH * (step + 1)))
            value = batch_loss(inputs, targets)
            optimizer.zero_grad()
            value.backward()
            if run["clip_norm"] is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), run["clip_norm"])
            optimizer.step()
            metrics = {"loss": value, "accuracy": test_accuracy()} if monitor.armed else None
            monitor.step(metrics, optimizer=optimizer, replay=partial(batch_loss, inputs, targets))
        readings = monitor.flush()
        conditions = monitor.conditions
        overhead = monitor.overhead_ratio
    return {
        **run,
        "accuracy": test_accuracy(),
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


@contextlib.contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Start Ray on this machine, or connect to a cluster, for as long as the block lasts."""
    local = {} if address else {"include_dashboard": False}
    ray.init(address=address, log_to_driver=False, logging_level="ERROR", **local)
    try:
        yield
    finally:
        with contextlib.suppress(KeyboardInterrupt):
            ray.shutdown()


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


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["task"], row["model"], row["state_size"], row[DEMANDS[row["task"]]], row["seed"]


def resumed(
    train: Callable[..., dict[str, Any]], runs: list[dict[str, Any]], folder: Path, *arguments: Any
) -> tuple[list[dict[str, Any]], Iterator[dict[str, Any]]]:
    """Return the results that `folder` has, and an iterator that does the other runs and keeps their results there."""
    kept = {run["run_id"]: finished(folder / f"{run['run_id']}.json", run) for run in runs}
    missing = [run for run in runs if kept[run["run_id"]] is None]

    def others() -> Iterator[dict[str, Any]]:
        for result in results(train, missing, *arguments):
            keep(folder / f"{result['run_id']}.json", result)
            yield result

    return [result for result in kept.values() if result is not None], others()


def show(console: Console, rows: list[dict[str, Any]], missing: int) -> None:
    """Print one table of all runs."""
    table = Table(title=f"{len(rows)} runs" + (f", {missing} to do" if missing else ""), title_justify="left")
    numbers = ("TSS", "demand", "seed", "accuracy", "loss")
    for column in ("task", "model", *numbers, "utilization by layer", "condition by layer"):
        table.add_column(column, justify="right" if column in numbers else "left")
    for row in sorted(rows, key=_place):
        demand = row[DEMANDS[row["task"]]]
        cells = [row["task"], row["model"], str(row["state_size"]), str(demand), str(row["seed"])]
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


def models(text: str) -> list[str]:
    """Parse models with options, as a type for argparse."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    try:
        for name in names:
            mixer(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return names


def positive(text: str) -> int:
    """Parse a whole number of at least 1, as a type for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def sizes(text: str) -> list[int]:
    """Parse whole numbers of at least 1 with commas between them, as a type for argparse."""
    return list(dict.fromkeys(positive(each) for each in text.split(",")))


def above_zero(text: str) -> float:
    """Parse a number above 0, as a type for argparse."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is not a number above 0")
    return value


def main() -> int:
    """Run what is missing and print the table; return 1 if a run failed, 130 after an interruption."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=choice(tuple(TASKS)), default=["mqar", "compression"])
    parser.add_argument("--models", type=models, default=["gla", "wla"], help="with options: gla:beta=1")
    parser.add_argument("--state-sizes", type=sizes, default=[16], help="TSS per channel")
    parser.add_argument("--kv-pairs", type=sizes, default=[4], help="of mqar, with 32 tokens: 8 at most")
    parser.add_argument("--tokens-to-copy", type=sizes, default=[4], help="of selective_copying: 15 at most")
    parser.add_argument("--vocab-sizes", type=sizes, default=[16], help="of compression")
    parser.add_argument("--seeds", type=positive, default=2, help="seeds 0, 1, ... for every task and model")
    parser.add_argument("--steps", type=positive, default=300)
    parser.add_argument("--learning-rate", type=above_zero, default=OPTIMIZER["learning_rate"], help="of AdamW")
    parser.add_argument("--warmup-steps", type=int, default=OPTIMIZER["warmup_steps"], help="then the rate is constant")
    parser.add_argument("--clip-norm", type=above_zero, help="of the gradient; without it nothing is clipped")
    parser.add_argument("--address", help="address of a Ray cluster; without it Ray runs on this machine")
    parser.add_argument("--folder", type=Path, default=Path("runs/sweep"), help="folder of the results")
    parser.add_argument(
        "--file-sd", type=Path, metavar="DIR", help="serve /metrics for every run, and write its address to DIR"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows of the table to FILE")
    arguments = parser.parse_args()

    demands = {
        "mqar": arguments.kv_pairs, "selective_copying": arguments.tokens_to_copy, "compression": arguments.vocab_sizes
    }  # fmt: skip
    runs = grid(
        arguments.tasks, arguments.models, range(arguments.seeds), arguments.steps, demands=demands,
        state_sizes=arguments.state_sizes, learning_rate=arguments.learning_rate,
        warmup_steps=arguments.warmup_steps, clip_norm=arguments.clip_norm,
    )  # fmt: skip
    try:
        for run in runs:
            network(run), data(run, 1, 0)
    except ConfigError as error:
        parser.error(f"{run['run_id']}: {error}")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    file_sd = None
    if arguments.file_sd is not None:
        arguments.file_sd.mkdir(parents=True, exist_ok=True)
        file_sd = str(arguments.file_sd.resolve())
    rows, others = resumed(train, runs, arguments.folder, file_sd, str(arguments.folder.resolve()))
    console = Console()
    print(f"{len(runs)} runs, {len(rows)} of them done before; results in {arguments.folder}", flush=True)
    interrupted = False
    if len(rows) < len(runs):
        with cluster(arguments.address):
            try:
                for result in others:
                    rows.append(result)
                    summary = result.get("error") or f"accuracy {result['accuracy']:.3f}"
                    print(f"{len(rows)} of {len(runs)}: {result['run_id']}: {summary}", flush=True)
            except KeyboardInterrupt:
                interrupted = True
    show(console, rows, len(runs) - len(rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if interrupted:
        print("interrupted; give the same command again to resume")
        return 130
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())

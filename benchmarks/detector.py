"""Measures precision, recall and lead of the diagnosis on labeled runs, half of them held out.

    python -m benchmarks.detector [--json FILE]      replay the recorded runs through the diagnosis (seconds)
    python -m benchmarks.detector --collect          train and label the runs again (about half an hour on two cores)

The runs are small recall models of several featurizers, sizes and seeds. Their labels come from final accuracies alone,
and were fixed before any threshold was tuned:

    healthy     the run itself ends at 0.9 or better
    collapsed   it does not, but the same run does with A->I regularization (alpha times 100 on GLA-S6) of the second
                mixer from step 500 on
    saturated   neither does, but the same model with four times the state does
    other       none of these helps (left out of the counts)

Every second run of a kind is held out; the defaults of `DiagnosisConfig` were chosen with the other half only
(benchmarks/README.md says how clean that is). The recorded numbers are each run's readings and metrics at every 50th
step (benchmarks/detector_runs.json.gz).
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import Result, machine, show
from ess_monitor import MonitorConfig
from ess_monitor.diagnosis import DiagnosisConfig, Tracker
from ess_monitor.interventions import IdentityPull, rescale_alpha
from ess_monitor.records import Measurement, Reading

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from rescue import train

RECORDED = Path(__file__).with_name("detector_runs.json.gz")
COLLECTED = Path("runs/detector")
"""Folder of finished runs, from which --collect resumes after an interruption."""
SOLVED = 0.9
INTERVENE_AT = 500
EARLY = 0.4
"""Share of the training before which a collapse should be found."""
DIAGNOSIS = DiagnosisConfig(metric="accuracy", metric_solved=SOLVED)
"""The defaults with the settings that a user gives: the task's metric here, and the warm-up of each run below."""
WARMUP = 1 / 7
"""Warm-up as a share of the run's length, as `DiagnosisConfig.warmup_steps` recommends."""

KEPT = ("state_capacity", "attainable_size", "effective_size", "utilization_ratio", "retention_ratio", "per_position")


def setting(featurizer: str, length: int, kv: int, steps: int, state: int, **options: float) -> dict[str, Any]:
    """Return the settings of one recall model."""
    return {
        "featurizer": featurizer,
        "length": length,
        "kv_pairs": kv,
        "steps": steps,
        "state_size": state,
        "options": options,
    }


RUNS: list[tuple[dict[str, Any], int]] = [
    *((setting("wla", 32, 4, 2000, 16, beta=1.0), seed) for seed in range(20, 28)),
    *((setting("gla", 64, 8, 2600, 16, beta=1.0), seed) for seed in range(20, 24)),
    *((setting("gla_s6", 64, 8, 2600, 16, alpha=1.0), seed) for seed in range(20, 24)),
    *((setting("la", 32, 4, 1500, 16, rope_base=10.0), seed) for seed in range(20, 24)),
    *((setting("gla", 32, 4, 3000, 16, beta=1.0), seed) for seed in range(20, 24)),
    *((setting("gla", 32, 4, 3000, 16, beta=16.0), seed) for seed in range(20, 22)),
    *((setting("wla", 32, 8, 2000, 16, beta=16.0), seed) for seed in range(20, 24)),
    *((setting("wla", 32, 8, 2000, 8, beta=16.0), seed) for seed in range(20, 22)),
    *((setting("wla", 32, 8, 1500, 2, beta=16.0), seed) for seed in range(20, 24)),
    *((setting("gla", 32, 8, 2000, 2, beta=16.0), seed) for seed in range(20, 24)),
]


class Recorder:
    """An exporter that keeps the numbers that the diagnosis needs."""

    name, inline = "recorder", True

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def start(self, run: Any, snapshot: Any) -> None:
        """Do nothing: there is nothing to open."""

    def export(self, measurement: Measurement) -> None:
        """Keep the numbers of each layer."""
        layers = {r.layer: [_short(getattr(r, name)) for name in KEPT] for r in measurement.readings}
        self.rows.append({"step": measurement.step, "accuracy": measurement.metrics["accuracy"], "layers": layers})

    def close(self, status: Any) -> None:
        """Do nothing: there is nothing to close."""


def _short(value: Any) -> Any:
    return [round(v, 4) for v in value] if isinstance(value, tuple) else None if value is None else round(value, 4)


def collect(size: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train a run, then the same run with each remedy until one helps; or load it from an interrupted collection."""
    kept = COLLECTED / f"{name_of(size).replace(' ', '-')}-seed-{seed}.json"
    if kept.exists():
        content: dict[str, Any] = json.loads(kept.read_text())
        return content
    torch.set_num_threads(1)
    config = MonitorConfig(every_n_steps=50, overhead_budget_ratio=None, autopilot="off")
    recorder = Recorder()
    _, accuracy = train(size, seed, config, exporters=[recorder])
    accuracies = {"control": accuracy}
    label = "healthy"
    if accuracy < SOLVED:
        _, accuracies["remedy"] = train(size, seed, config, before_step=treat)
        label = "collapsed"
    if label == "collapsed" and accuracies["remedy"] < SOLVED:
        _, accuracies["larger"] = train({**size, "state_size": 4 * size["state_size"]}, seed, config)
        label = "saturated" if accuracies["larger"] >= SOLVED else "other"
    print(f"{name_of(size)} seed {seed}: {label} {accuracies}", flush=True)
    content = {"setting": size, "seed": seed, "label": label, "accuracies": accuracies, "rows": recorder.rows}
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(content))
    return content


def treat(step: int, model: Any) -> None:
    """Treat the last mixer at step `INTERVENE_AT`, whatever its condition."""
    if step != INTERVENE_AT:
        return
    from ess_monitor.capture import find_layers

    layer = find_layers(model)[-1]
    if layer.spec.alpha is not None:
        rescale_alpha(layer.module, 100.0)
    elif layer.spec.decay is not None:
        IdentityPull(layer.module, layer.spec.decay, 0.5).attach()


def name_of(size: dict[str, Any]) -> str:
    """Return a short name of a setting."""
    options = " ".join(f"{k} {v:g}" for k, v in size["options"].items())
    return f"{size['featurizer']} {options} L {size['length']} kv {size['kv_pairs']} TSS {size['state_size']}"


def replay(run: dict[str, Any], config: DiagnosisConfig = DIAGNOSIS) -> tuple[str, int | None, str]:
    """Return the condition, step and layer of the first finding in a recorded run."""
    tracker = Tracker(config.model_copy(update={"warmup_steps": round(WARMUP * run["setting"]["steps"])}))
    length = run["setting"]["length"]
    positions = tuple(round(k * length / 4) for k in (1, 2, 3))
    for row in run["rows"]:
        readings = [
            Reading(
                step=row["step"],
                layer=layer,
                status="ok",
                length=length,
                positions=positions,
                **dict(zip(KEPT, values, strict=True)),
            )
            for layer, values in row["layers"].items()
        ]
        for finding in tracker.observe(readings, {"accuracy": row["accuracy"]}, row["step"]):
            if finding.condition in ("collapsed", "saturated"):
                return finding.condition, finding.step, finding.layer
    return "healthy", None, ""


def evaluate(runs: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return precision, recall and lead of each condition, and the runs with a wrong finding."""
    results = [(run, *replay(run)) for run in runs if run["label"] != "other"]
    rows, wrong = [], []
    for condition in ("collapsed", "saturated"):
        flagged = [s for s in results if s[1] == condition]
        right = [s for s in flagged if s[0]["label"] == condition]
        labeled = [s for s in results if s[0]["label"] == condition]
        leads = [run["setting"]["steps"] - step for run, _, step, _ in right if step is not None]
        shares = [step / run["setting"]["steps"] for run, _, step, _ in right if step is not None]
        rows.append(
            {
                "condition": condition,
                "runs": len(labeled),
                "flagged": len(flagged),
                "precision": len(right) / len(flagged) if flagged else "-",
                "recall": len(right) / len(labeled) if labeled else "-",
                "median lead, steps": statistics.median(leads) if leads else "-",
                "latest, share of training": max(shares) if shares else "-",
                f"found before {EARLY:.0%}": f"{sum(s < EARLY for s in shares)} of {len(labeled)}",
            }
        )
    healthy = [s for s in results if s[0]["label"] == "healthy"]
    alarms = [s for s in healthy if s[1] != "healthy"]
    rows.append({"condition": "healthy", "runs": len(healthy), "flagged": len(alarms)})
    for run, condition, step, layer in results:
        if condition != run["label"]:
            where = "" if step is None else f" at step {step} in {layer}"
            wrong.append(
                f"{name_of(run['setting'])} seed {run['seed']}: {run['label']}, reported as {condition}{where}"
            )
    return rows, wrong


def split(runs: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Hold out every second run of each setting; return the half for tuning and the held-out half."""
    halves: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    seen: dict[str, int] = {}
    for run in runs:
        name = name_of(run["setting"])
        halves[seen.get(name, 0) % 2].append(run)
        seen[name] = seen.get(name, 0) + 1
    return halves


def main() -> int:
    """Replay the recorded runs, after training them again with --collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", action="store_true", help="train and label the runs again")
    parser.add_argument("--jobs", type=int, default=2, help="number of processes of --collect")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    arguments = parser.parse_args()
    if arguments.collect:
        with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
            runs = list(pool.map(collect, *zip(*RUNS, strict=True)))
        RECORDED.write_bytes(gzip.compress(json.dumps(runs).encode(), mtime=0))
    runs = json.loads(gzip.decompress(RECORDED.read_bytes()))
    tuned, held_out = split(runs)
    labels = {
        label: sum(run["label"] == label for run in runs) for label in ("healthy", "collapsed", "saturated", "other")
    }
    notes = [f"{len(runs)} runs: " + ", ".join(f"{count} {label}" for label, count in labels.items())]
    results = []
    for title, half in (("held-out half", held_out), ("half that the thresholds were tuned on", tuned)):
        rows, wrong = evaluate(half)
        result = Result(f"Diagnosis on the {title} ({len(half)} runs)", rows, notes + wrong)
        notes = []
        show(result)
        results.append(vars(result))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

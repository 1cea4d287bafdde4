"""Trains labeled runs, and reports precision and recall of saturation on them.

    python -m benchmarks.saturation                 replay the recorded runs through the diagnosis (seconds)
    python -m benchmarks.saturation --collect       train them again (some five minutes on one quiet core)

Tasks need less, about as much or more than the state of their models; the label of a run is measured: what the same
seed gains with twice the state (benchmarks/saturation/verdict.py). To resume a collection, give the same command again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import Result, machine, show
from benchmarks.saturation.catalog import CATALOG, SaturationRun
from benchmarks.saturation.verdict import Labeled, judge_half, label_runs, replay
from benchmarks.trust.runner import read_results
from ess_monitor.evidence import EvidenceConfig

RECORDED = Path(__file__).parents[1] / "saturation_runs.jsonl.gz"
OUT = Path("runs/saturation/results.jsonl")
TITLES = {"held_out": "held-out half", "seen": "half that the thresholds were chosen with"}


def collect(runs: Sequence[SaturationRun], out: Path) -> None:
    """Train the runs that have no result with the same settings, and append each result to `out`, a line of JSON."""
    from benchmarks.saturation.training import train

    out.parent.mkdir(parents=True, exist_ok=True)
    done = {(result["name"], result["variant"], result["settings"]) for result in read_results(out)}
    with out.open("a", encoding="utf-8") as file:
        for run in runs:
            for variant in run.variants:
                if (run.name, variant, run.digest) in done:
                    continue
                result = train(run, variant)
                file.write(f"\n{json.dumps(result)}\n")  # a line that an interruption has cut off ends here
                file.flush()
                print(f"{run.name} [{variant}]: loss {result['loss']:.4g}, {result['seconds']:.0f} s", flush=True)


def record(runs: Sequence[SaturationRun], out: Path, path: Path = RECORDED) -> int:
    """Write the results of these runs, gzipped and in the order of the catalog; return how many there are."""
    keys = [(run.name, variant, run.digest) for run in runs for variant in run.variants]
    found = {(each["name"], each["variant"], each["settings"]): each for each in read_results(out)}
    lines = [json.dumps(found[key]) + "\n" for key in keys if key in found]
    path.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    return len(lines)


def labeled_runs(path: Path = RECORDED) -> list[Labeled]:
    """Return the recorded runs of the catalog, with their labels."""
    digests = {run.name: run.digest for run in CATALOG}
    return label_runs(result for result in read_results(path) if digests.get(result["name"]) == result["settings"])


def tables(path: Path = RECORDED) -> list[Result]:
    """Return a table for each half, with evidence and by the readings alone; misses are named below."""
    shown = []
    for split, title in TITLES.items():
        rows, notes = [], []
        for name, enabled in (("with evidence", True), ("readings alone", False)):
            judged = [replay(run, evidence=EvidenceConfig(enabled=enabled)) for run in labeled_runs(path)]
            verdict = judge_half(split, judged)
            rows.append({"": name, **verdict.row})
            notes += [f"{name}: {text}" for text in verdict.misses]
            left_out = [f"left out: {text}" for text in verdict.left_out]
        shown.append(Result(f"Saturation on the {title}", rows, notes + left_out))
    return shown


def main(arguments: list[str] | None = None) -> int:
    """Print the tables, after training the runs again with --collect; return 130 after an interruption."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.saturation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--collect", action="store_true", help="train the runs and record the results")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help=f"JSON lines of results ({OUT})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the tables to FILE")
    options = parser.parse_args(arguments)
    if options.collect:
        try:
            collect(CATALOG, options.out)
        except KeyboardInterrupt:
            print("interrupted; give the same command again to resume")
            return 130
        print(f"{record(CATALOG, options.out)} results written to {RECORDED.name}")
    shown = tables()
    for result in shown:
        show(result)
    if options.json is not None:
        content = {"machine": machine(), "results": [vars(result) for result in shown]}
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

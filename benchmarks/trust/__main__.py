"""Checks the autopilot on labeled runs, and reports false alarms, harm and rescues.

    python -m benchmarks.trust [--split seen|held_out|all] [--only KIND ...] [--limit N] [--workers N] [--out FILE]
    python -m benchmarks.trust --recorded           print the tables of the recorded results (seconds)
    python -m benchmarks.trust --list               list the runs

Every run is trained in up to five variants (benchmarks/trust/plan.py). To resume, give the same command again: what has
a result in FILE with the same settings, and in mode auto the same thresholds, is not trained again. Half of the seeds
of every setting are held out. Fix thresholds and settings first, then run the held-out half once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from benchmarks.report import machine, show
from benchmarks.trust.catalog import CATALOG, KINDS
from benchmarks.trust.models import is_available
from benchmarks.trust.runner import read_results, record, run_missing
from benchmarks.trust.settings import SPLITS, TrustRun, thresholds_digest
from benchmarks.trust.tables import markdown, protocol, tables
from benchmarks.trust.verdict import judge

RECORDED = Path(__file__).parents[1] / "trust_runs.jsonl.gz"
OUT = Path("runs/trust/results.jsonl")


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing and print the tables; return 1 if a job failed, 130 after an interruption."""
    options = _parser().parse_args(arguments)
    trains = options.recorded is None and not options.record and not options.list
    runs = select(options.split or ("seen" if trains else "all"), options.only, options.limit)
    if options.list:
        for run in runs:
            print(f"{run.name}: {run.label}, {run.split}, {run.setting.steps} steps")
        return 0
    failed = 0
    results_file = options.out
    if options.recorded is not None:
        results_file = options.recorded
        if not results_file.exists():
            print(f"{results_file} does not exist; run the benchmark, then give --record", file=sys.stderr)
            return 1
    elif trains:
        missing = [run for run in runs if not is_available(run.setting.model)]
        if missing:
            print(f"{len(missing)} runs are left out: they need transformers, which is not installed")
        counts = Counter(run.split for run in runs)
        print(f"{counts['seen']} seen and {counts['held_out']} held-out runs; thresholds {thresholds_digest()}")
        if counts["held_out"]:
            print("The held-out half is run with these thresholds, which must not be chosen by its results.")
        try:
            done, failed = run_missing(
                [run for run in runs if run not in missing], results_file, workers=options.workers
            )
        except KeyboardInterrupt:
            print("interrupted; give the same command again to resume")
            return 130
        print(f"{done} trainings, {failed} failed; results in {results_file}")
    results = read_results(results_file)
    if options.record:
        print(f"{record(CATALOG, results, RECORDED)} results written to {RECORDED.name}")
    verdicts = judge(results, names={run.name for run in runs})
    print(protocol(verdicts))
    shown = tables(verdicts)
    for result in shown:
        show(result)
    if options.markdown is not None:
        options.markdown.write_text(markdown(verdicts), encoding="utf-8")
    if options.json is not None:
        content = {"machine": machine(), "results": [vars(result) for result in shown]}
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return int(failed > 0)


def select(split: str, kinds: list[str] | None, limit: int | None) -> list[TrustRun]:
    """Return the runs of the catalog that were asked for."""
    chosen = [run for run in CATALOG if split in ("all", run.split) and (not kinds or run.kind in kinds)]
    return chosen[:limit]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trust", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--split", choices=(*SPLITS, "all"), help="default: seen, or all where nothing is trained")
    parser.add_argument("--only", choices=KINDS, nargs="+", metavar="KIND", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--limit", type=_positive, metavar="N", help="the first N of these runs")
    parser.add_argument("--workers", type=_positive, metavar="N", help="trainings at a time; default: all cores")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help=f"JSON lines of results ({OUT})")
    parser.add_argument("--recorded", type=Path, nargs="?", const=RECORDED, metavar="FILE", help="train nothing")
    parser.add_argument(
        "--record", action="store_true", help="train nothing; keep the results of --out as the recorded"
    )
    parser.add_argument("--list", action="store_true", help="list the runs and stop")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables to FILE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the tables to FILE")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


if __name__ == "__main__":
    sys.exit(main())

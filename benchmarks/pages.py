"""Sizes and processor seconds of pages, and the memory that a long log takes: `python -m benchmarks.pages [FOLDER]`.

The runs are made up: 400 samples, two metrics, spectra, sizes at 63 positions and five tolerances; one layer in eight
collapses. With FOLDER the pages are kept there.
"""

from __future__ import annotations

import math
import resource
import sys
import tempfile
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from benchmarks.report import Result, main
from ess_monitor.exporters.event_log.events import MeasurementEvent, RunStartedEvent, encode_event
from ess_monitor.records import Condition, Finding, LayerInfo, Measurement, Reading, RunInfo
from ess_monitor.report import load_history, render_comparison, render_report

Positions = tuple[int, ...]
LAYERS = (2, 24, 120, 200)
SAMPLES = 400
POSITIONS = tuple(range(4, 256, 4))
LONG = ((2, 5_000, POSITIONS), (2, 20_000, POSITIONS), (200, 1_000, POSITIONS), (1, 1_000_000, (64, 128, 192)))
"""Layers, lines and measured positions of the long logs. The last one takes 2.2 GB of the disk for temporary files."""


def write_log(
    path: Path, layers: int, samples: int = SAMPLES, *, phase: float = 0.0, positions: Positions = POSITIONS
) -> Path:
    """Write the log of a made-up run, one line a sample."""
    names = [f"model.layers.{index}.self_attn" for index in range(layers)]
    infos = tuple(LayerInfo(name=name, module="GatedLinearAttention", supported=True) for name in names)
    run = RunInfo(run_name=f"{layers} layers", model="Net", layers=infos, start_timestamp_seconds=1.0)
    with path.open("wb") as log:
        log.write(encode_event(RunStartedEvent(timestamp_seconds=1.0, run=run.run_name, data=run)))
        for sample in range(samples):
            done = sample / samples
            values = [_utilization(index, done, phase) for index in range(layers)]
            conditions: dict[str, Condition] = {
                name: "collapsed" if value < 0.2 else "healthy" for name, value in zip(names, values, strict=True)
            }
            found = tuple(
                Finding(
                    step=50 * sample, layer=name, condition="collapsed", previous="healthy", advice="pull A towards I",
                    reason=f"utilization {value:.2f} below 0.3 for 5 measurements",
                )
                for index, (name, value) in enumerate(zip(names, values, strict=True))
                if value < 0.2 <= _utilization(index, done - 1 / samples, phase)
            )  # fmt: skip
            event = MeasurementEvent(
                timestamp_seconds=1.0 + sample, run=run.run_name,
                data=Measurement(
                    step=50 * sample, timestamp_seconds=1.0 + sample, conditions=conditions, findings=found,
                    readings=tuple(map(_reading, names, [50 * sample] * layers, values, [positions] * layers)),
                    metrics={"loss": 3 * math.exp(-3 * done) + 0.1, "accuracy": done},
                    overhead_ratio=0.004, interval_steps=50,
                ),
            )  # fmt: skip
            log.write(encode_event(event))
    return path


def _utilization(layer: int, done: float, phase: float) -> float:
    falls = layer % 8 == 1 and done > 0.4
    return 0.1 if falls else 0.5 + 0.4 * math.sin(0.3 * layer + 5 * done + phase) * math.exp(-done)


def _reading(name: str, step: int, used: float, positions: Positions) -> Reading:
    sizes = tuple(round(64 * used * min(1.0, 4 * i / 256, 4 * (256 - i) / 256), 3) for i in positions)
    spectrum = tuple(10.0 * math.exp(-rank / (1 + 8 * used)) for rank in range(32))
    return Reading(
        step=step, layer=name, status="ok", operators=32, length=256, positions=positions, per_position=sizes,
        state_capacity=64.0, attainable_size=64.0, effective_size=64 * used, entropy_size=20 * used,
        effective_size_lower=60 * used, effective_size_upper=64 * used + 1, utilization_ratio=used,
        retention_ratio=0.5 + 0.5 * used, far_share_ratio=0.1, spectrum=spectrum, spectrum_ranks=tuple(range(1, 33)),
        effective_size_at=tuple((10.0**-k, 64 * used * k / 5) for k in (5, 4, 3, 2, 1)),
    )  # fmt: skip


def pages(folder: Path | None = None) -> Result:
    """Measure the pages, and keep them in a folder."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for layers in LAYERS:
            logs = [write_log(Path(temporary, f"{layers}-{k}.jsonl"), layers, phase=k) for k in (0.0, 1.0)]
            started = time.process_time()
            first, second = map(load_history, logs)
            loaded = time.process_time()
            report = render_report(first)
            reported = time.process_time()
            comparison = render_comparison(first, second)
            compared = time.process_time()
            for kind, page in (("report", report), ("compare", comparison)):
                (folder / f"{kind}-{layers}.html").write_text(page, encoding="utf-8")
            rows.append({
                "layers": layers,
                "log MB": round(logs[0].stat().st_size / 1e6, 1),
                "read one log, CPU s": (loaded - started) / 2,
                "report, CPU s": reported - loaded,
                "report, MB": round(len(report.encode()) / 1e6, 2),
                "compare, CPU s": compared - reported,
                "compare, MB": round(len(comparison.encode()) / 1e6, 2),
            })  # fmt: skip
    return Result("Pages of runs of 400 samples", rows)


def memory() -> Result:
    """Measure what reading a long log adds to a process."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for layers, lines, positions in LONG:
            log = write_log(Path(temporary, "long.jsonl"), layers, lines, positions=positions)
            with get_context("spawn").Pool(1) as pool:
                kept, seconds, megabytes = pool.apply(_read, (log,))
            rows.append({
                "layers": layers, "lines": lines, "log MB": round(log.stat().st_size / 1e6), "samples kept": kept,
                "CPU s": seconds, "memory MB": megabytes,
            })  # fmt: skip
    return Result("Reading long logs", rows)


def _read(log: Path) -> tuple[int, float, float]:
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    kept = len(load_history(log).measurements)
    seconds = time.process_time() - started
    return kept, seconds, round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


if __name__ == "__main__":
    kept = Path(sys.argv.pop(1)) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else None
    sys.exit(main([partial(pages, kept), memory], __doc__))

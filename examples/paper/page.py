"""The page of all findings: claim and result beside each other, the rule, numbers, figures; and the numbers as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ess_monitor.report.figures import Figure
from examples.paper.experiment import SEEN, Finding, Outcome, Table

_WIDTH = 760
_INK = "#7d838c"
"""Color of text and axes, readable on a light and on a dark ground."""


def write_page(folder: Path, outcomes: Sequence[Outcome], machine: str, total_minutes: str | None) -> None:
    """Write `index.md`, its figures and `results.json` into a folder; the minutes are those of a run of everything."""
    folder.mkdir(parents=True, exist_ok=True)
    findings = [(outcome, finding) for outcome in outcomes for finding in outcome.findings]
    parts = [_head(outcomes, findings, machine, total_minutes)]
    drawn: set[str] = set()
    for outcome, finding in findings:
        parts.append(_section(folder, outcome, finding, drawn))
    (folder / "index.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    for stale in set(folder.glob("*.svg")) - {folder / name for name in drawn}:
        stale.unlink()
    data = [
        {
            "experiment": outcome.experiment.name,
            "seeds": sorted({row["seed"] for row in outcome.rows if "seed" in row}),
            "core_minutes": round(outcome.minutes, 1),
            "findings": [_without_figures(finding) for finding in outcome.findings],
            "runs": [_rounded({name: each for name, each in row.items() if name != "run_id"}) for row in outcome.rows],
        }
        for outcome in outcomes
    ]
    text = ",\n".join(json.dumps(each, separators=(",", ":")) for each in data)
    (folder / "results.json").write_text(f"[\n{text}\n]\n", encoding="utf-8")


def _head(
    outcomes: Sequence[Outcome], findings: Sequence[tuple[Outcome, Finding]], machine: str, total: str | None
) -> str:
    core_minutes = sum(outcome.minutes for outcome in outcomes)
    took = f" They took {total} minutes in one go." if total is not None else ""
    table = Table(
        "",
        ("", "The paper says", "Here", "Verdict"),
        tuple((f"[{each.name}](#{_anchor(each.name)})", each.claim, each.result, each.verdict) for _, each in findings),
    )
    seen = " and ".join(map(str, SEEN))
    return (
        "# The findings of the paper, run again\n\n"
        'The findings of "Quantifying Memory Utilization with Effective State-Size" (arXiv 2504.19561), each in a '
        "setting that fits two cores: nets are some hundred times smaller than the paper's, and so are the tasks. "
        "A verdict is about this setting. What is not reproduced here may hold in the paper's.\n\n"
        f"Settings and rules were fixed with seeds {seen}, before the seeds of this page were run. `±` and bars are "
        "95 % intervals over seeds, by Student's t, if nothing else is said. `make paper` runs it all; what was run is "
        "kept in `runs/paper` and not run again. Numbers of every run: [results.json](results.json).\n\n"
        f"{machine}. All runs together: {core_minutes:.0f} minutes of one core.{took}\n\n"
        f"{_markdown(table)}"
    )


def _place(name: str) -> str:
    """Return where an experiment is: a module, or a package of its own."""
    return f"examples/paper/{name}" + ("/" if Path(__file__).with_name(name).is_dir() else ".py")


def _section(folder: Path, outcome: Outcome, finding: Finding, drawn: set[str]) -> str:
    seeds = sorted({row["seed"] for row in outcome.rows if "seed" in row})
    parts = [
        f"## {finding.name}",
        _markdown(Table("", ("The paper", "Here"), ((finding.claim, finding.result),))),
        f"**Verdict: {finding.verdict}.** {finding.rule}",
        f"*Setting.* {finding.setting} Seeds {', '.join(map(str, seeds))}; {outcome.minutes:.0f} core minutes "
        f"(`{_place(outcome.experiment.name)}`). Paper: {finding.source}.",
    ]
    for place, figure in enumerate(finding.figures):
        name = f"{_anchor(finding.name)}-{place + 1}.svg"
        _draw(figure, folder / name)
        drawn.add(name)
        parts.append(f"![{figure.title}. {figure.summary}]({name})")
    for table in finding.tables:
        parts.append(f"{table.caption}\n\n{_markdown(table)}")
    parts += finding.remarks
    return "\n\n".join(parts)


def _draw(figure: Figure, path: Path) -> None:
    """Write a figure as SVG, with colors for a light and for a dark page."""
    drawn = figure.to_plotly()
    axis = {"gridcolor": "rgba(128, 128, 128, 0.25)", "zerolinecolor": "rgba(128, 128, 128, 0.4)"}
    clear = "rgba(0, 0, 0, 0)"
    drawn.update_layout(
        width=_WIDTH, font={"color": _INK, "size": 13}, paper_bgcolor=clear, plot_bgcolor=clear,
        margin={"l": 70, "r": 20, "t": 90, "b": 60}, title={"x": 0, "xref": "paper", "y": 0.97, "font": {"size": 15}},
    )  # fmt: skip
    drawn.update_xaxes(**axis)
    drawn.update_yaxes(**axis)
    drawn.write_image(path)


def _without_figures(finding: Finding) -> dict[str, Any]:
    found = asdict(finding)
    found["figures"] = [figure.title for figure in finding.figures]
    return found


def _rounded(value: Any) -> Any:
    """Return the same with numbers of five digits: the file stays small."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return value


def _anchor(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _markdown(table: Table) -> str:
    rows = [table.columns, tuple("---" for _ in table.columns), *table.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)

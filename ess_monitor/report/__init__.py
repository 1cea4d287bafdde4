"""HTML reports: one page for a run or for two runs, from event logs, and one for each analysis of a model.

This room reads event logs through `ess_monitor.exporters` and works on records only; it imports no model code and no
torch. The data flows

    files ──► history (what happened) ──► summary (words), figures, sections ──► page, compare (HTML)

A page is one file that works without a network: styles, figures as Plotly's JSON and the script that draws them are
inside, and its content policy forbids everything else.
"""

from __future__ import annotations

from ess_monitor.report.analyses.layers import (
    render_compressibility,
    render_hybrid_advice,
    render_length_profile,
    render_minimal_state,
    render_reduction,
)
from ess_monitor.report.analyses.modulation import render_shots_profile, render_state_modulation
from ess_monitor.report.analyses.results import figures_of
from ess_monitor.report.analyses.study import render_study
from ess_monitor.report.compare import render_comparison
from ess_monitor.report.history import RunHistory, find_event_log, load_history
from ess_monitor.report.page import render_report
from ess_monitor.report.run import Run, load_run
from ess_monitor.report.study import load_study

RunStory, load_story = RunHistory, load_history
"""Their names in 0.1."""

__all__ = [
    "Run",
    "RunHistory",
    "figures_of",
    "find_event_log",
    "load_history",
    "load_run",
    "load_study",
    "render_comparison",
    "render_compressibility",
    "render_hybrid_advice",
    "render_length_profile",
    "render_minimal_state",
    "render_reduction",
    "render_report",
    "render_shots_profile",
    "render_state_modulation",
    "render_study",
]

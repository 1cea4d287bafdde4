"""Reports for people, from the event log of a run: one self-contained HTML page for a run, one for two runs.

The room reads event logs through `ess_monitor.exporters` and knows records only: no model, no tensor. The way is

    files ──► history (what happened) ──► summary (what it means), figures (how it looks) ──► page, compare (HTML)

A page needs no network: styles are in it, charts are inline SVG, and its content policy forbids everything else.
"""

from __future__ import annotations

from ess_monitor.report.compare import render_comparison
from ess_monitor.report.history import RunHistory, find_event_log, load_history
from ess_monitor.report.page import render_report

RunStory, load_story = RunHistory, load_history
"""Their names in 0.1."""

__all__ = ["RunHistory", "find_event_log", "load_history", "render_comparison", "render_report"]

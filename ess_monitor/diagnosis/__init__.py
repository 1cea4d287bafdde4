"""Diagnoses layers: from readings to conditions and findings."""

from __future__ import annotations

from ess_monitor.diagnosis.config import DiagnosisConfig, thresholds
from ess_monitor.diagnosis.rules import Context, Verdict, judge
from ess_monitor.diagnosis.tracker import Tracker

__all__ = ["Context", "DiagnosisConfig", "Tracker", "Verdict", "judge", "thresholds"]

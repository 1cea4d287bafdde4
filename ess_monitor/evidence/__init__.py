"""Counterfactual evidence: what the loss says of a layer's forgetting."""

from __future__ import annotations

from ess_monitor.evidence.config import EvidenceConfig
from ess_monitor.evidence.verdict import add_changes, weigh

__all__ = ["EvidenceConfig", "add_changes", "weigh"]

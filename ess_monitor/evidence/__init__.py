"""Counterfactual evidence: what the loss says of a layer's forgetting."""

from __future__ import annotations

from ess_monitor.evidence.config import EvidenceConfig

__all__ = ["EvidenceConfig"]

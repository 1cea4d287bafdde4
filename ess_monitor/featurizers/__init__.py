"""Defines the sequence mixers of the paper (appendix C.2) as torch modules, and a small backbone to train them in.

They serve examples, tests and benchmarks; the monitor does not need them. Every mixer maps (batch, length, width) to
the same shape and applies its linear operator in a parameter-free child `core`, called with the tensors that define it:
hook `core` to see q, k, v and the log-decay of a forward pass.

    >>> import torch
    >>> mixer = build_mixer("gla", width=32, num_heads=2, state_size=8)
    >>> mixer(torch.randn(4, 20, 32)).shape, mixer.num_heads, mixer.state_capacity
    (torch.Size([4, 20, 32]), 2, 8)
"""

from __future__ import annotations

from ess_monitor.featurizers.backbone import Backbone, BackboneConfig
from ess_monitor.featurizers.cores import CausalSoftmax, DiagonalScan, diagonal_scan
from ess_monitor.featurizers.head_mixers import GLA, GLAS6, LA, SA, WLA
from ess_monitor.featurizers.registry import FEATURIZERS, build_mixer, check_options
from ess_monitor.featurizers.s6 import S6

__all__ = [
    "FEATURIZERS",
    "GLA",
    "GLAS6",
    "LA",
    "S6",
    "SA",
    "WLA",
    "Backbone",
    "BackboneConfig",
    "CausalSoftmax",
    "DiagonalScan",
    "build_mixer",
    "check_options",
    "diagonal_scan",
]

"""Defines the metric: operators, their singular values, and the effective state-size (ESS) at every position.

Pure tensor functions on frozen operators; imports torch and the exception tree, nothing else of the package.

    >>> import torch
    >>> features = torch.randn(1, 2, 64, 8)  # (batch, heads, length, state): linear attention with TSS 8
    >>> operator = DiagonalRecurrence(torch.zeros(1, 1, 1, 1), features, features)
    >>> tolerance_ess(operator.singular_values(operator_positions(64, "midpoint")))
    tensor([[[8.],
             [8.]]])
"""

from __future__ import annotations

from ess_monitor.ess.far_share import FarShare, far_share
from ess_monitor.ess.measure import Measured, decay_product_norm, mean_decay, measure, retention, retention_ratio
from ess_monitor.ess.metrics import Aggregation, ToleranceScale, aggregate, entropy_ess, tolerance_ess
from ess_monitor.ess.operators.attention import SoftmaxAttention
from ess_monitor.ess.operators.base import Operator
from ess_monitor.ess.operators.complex_recurrence import complex_recurrence
from ess_monitor.ess.operators.convolution import Convolution, GatedConvolution
from ess_monitor.ess.operators.delta import DeltaRecurrence
from ess_monitor.ess.operators.dense import DenseOperator
from ess_monitor.ess.operators.jacobian import JacobianOperator
from ess_monitor.ess.operators.recurrence import DiagonalRecurrence, ReadFirstRecurrence
from ess_monitor.ess.positions import Bounds, ess_bounds, midpoint_index, operator_positions
from ess_monitor.ess.realization.energy import causal_singular_values, squared_norm, tail_energy, truncation_errors
from ess_monitor.ess.realization.realize import Realization, realize

__all__ = [
    "Aggregation",
    "Bounds",
    "Convolution",
    "DeltaRecurrence",
    "DenseOperator",
    "DiagonalRecurrence",
    "FarShare",
    "GatedConvolution",
    "JacobianOperator",
    "Measured",
    "Operator",
    "ReadFirstRecurrence",
    "Realization",
    "SoftmaxAttention",
    "ToleranceScale",
    "aggregate",
    "causal_singular_values",
    "complex_recurrence",
    "decay_product_norm",
    "entropy_ess",
    "ess_bounds",
    "far_share",
    "mean_decay",
    "measure",
    "midpoint_index",
    "operator_positions",
    "realize",
    "retention",
    "retention_ratio",
    "squared_norm",
    "tail_energy",
    "tolerance_ess",
    "truncation_errors",
]

"""The layers whose capture is checked against the libraries that they come from."""

from benchmarks.layers import attention, convolutions, delta, fla, mamba, mamba2, recurrent
from benchmarks.layers.case import Case, Row, measure

CASES: tuple[Case, ...] = (
    *fla.CASES,
    *attention.CASES,
    *mamba.CASES,
    *mamba2.CASES,
    *recurrent.CASES,
    *delta.CASES,
    *convolutions.CASES,
)

__all__ = ["CASES", "Case", "Row", "measure"]

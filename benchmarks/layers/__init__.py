"""Cases that compare captured operators with the output of the libraries' own layers."""

from benchmarks.layers import attention, convolutions, delta, fla, mamba, mamba2, recurrent
from benchmarks.layers.case import Case, NotReadError, Row, measure

CASES: tuple[Case, ...] = (
    *fla.CASES,
    *attention.CASES,
    *mamba.CASES,
    *mamba2.CASES,
    *recurrent.CASES,
    *delta.CASES,
    *convolutions.CASES,
)

__all__ = ["CASES", "Case", "NotReadError", "Row", "measure"]

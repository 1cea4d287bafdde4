"""Turns a recurrence with complex decays (S4D, S5, LRU, complex S6) into a real one with twice the state."""

from __future__ import annotations

import torch
from torch import Tensor

from ess_monitor import validation
from ess_monitor.errors import OperatorError
from ess_monitor.ess.operators.fields import check_same_device
from ess_monitor.ess.operators.recurrence import VECTOR_SHAPE, DiagonalRecurrence


@torch.no_grad()
def complex_recurrence(log_decay: Tensor, b: Tensor, c: Tensor) -> DiagonalRecurrence:
    """Return the operator of s_t = diag(exp(log_decay_t)) s_{t-1} + b_t u_t, y_t = Re(c_t . s_t), of complex s.

    In a basis that turns with the phase P_t, the sum of Im log_decay up to t, only the real part of the decay is left:
    s~_t = exp(-i P_t) s_t has the decay exp(Re log_decay_t), enters by exp(-i P_t) b_t and is read by exp(i P_t) c_t.
    Its real and imaginary parts are 2 n real states, so TSS is 2 n. `without_decay` keeps the phases: to turn loses
    nothing. Layers that keep one of each pair of conjugate states count twice: give them 2 c.

    Args:
        log_decay: (batch, heads, length, state), logarithm of A's diagonal, complex or real. batch, heads, length and
            state may be 1.
        b: (batch, heads, length, state), complex or real. Any dimension may be 1.
        c: (batch, heads, length, state), complex or real. batch, heads and state may be 1; its length is that of the
            sequence.

    Raises:
        OperatorError: A tensor has another number of dimensions, or they do not broadcast.

    Examples:
        >>> half_turn = torch.full((1, 1, 1, 1), torch.pi) * 1j
        >>> complex_recurrence(half_turn, torch.ones(1, 1, 1, 1), torch.ones(1, 1, 3, 1)).materialize().round()
        tensor([[[[ 1.,  0.,  0.],
                  [-1.,  1.,  0.],
                  [ 1., -1.,  1.]]]])
    """
    given = {"log_decay": log_decay, "b": b, "c": c}
    for name, tensor in given.items():
        is_number = isinstance(tensor, Tensor) and (tensor.is_floating_point() or tensor.is_complex())
        if not is_number or tensor.dim() != 4 or not tensor.numel():
            raise OperatorError(f"{name} is {validation.shown(tensor)}; expected a complex tensor of {VECTOR_SHAPE}.")
    check_same_device(**given)
    length = c.shape[2]
    state = max(tensor.shape[3] for tensor in given.values())
    try:
        log_decay, b, c = (tensor.expand(-1, -1, length, state) for tensor in given.values())
    except RuntimeError:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in given.items())
        raise OperatorError(f"{shapes} do not broadcast; they must be {VECTOR_SHAPE} with c's length.") from None
    real = torch.float64 if log_decay.dtype in (torch.float64, torch.complex128) else torch.float32
    decay, b, c = (tensor.to(torch.complex128) for tensor in (log_decay, b, c))
    phase = decay.imag.cumsum(2)
    turn = torch.polar(torch.ones_like(phase), phase)
    b, c = b * turn.conj(), c * turn
    decay = decay.real.to(real)
    return DiagonalRecurrence(
        torch.cat((decay, decay), 3), torch.cat((b.real, b.imag), 3).to(real), torch.cat((c.real, -c.imag), 3).to(real)
    )

"""Checks and times the rank of a layer's Jacobian by products (`capture.unknown: jacobian`).

    python -m benchmarks.jacobian [--json FILE]     two minutes on one core

Each layer is randomly initialized, of width 16, and is linearized at one Gaussian sequence of 128 tokens, in float64,
at a quarter, a half and three quarters of it. The counts at 1e-3 are compared with those of the full Jacobian, which is
formed row by row. The cost is given in forward passes of the layer at that input. sLSTM, minGRU and minLSTM are written
small, after arXiv 2405.04517 and 2410.01201. TTT and the memory of Titans (2407.04620, 2501.00663) train a weight of
16 x 16 on the tokens: a state of 256 numbers, which is as many singular values as are looked for.

The last rows show one GLA twice: the op alone, whose Jacobian is the operator once for each of the value channels of a
head, so that both must count the same; and the whole layer, whose q, k and decays depend on the input as well. That
count is another quantity than the ESS of a channel.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.census.own_layers import NeuralMemory, TTTLinear
from benchmarks.report import Result, main
from ess_monitor import capture_operators
from ess_monitor.ess import JacobianOperator, operator_positions, tolerance_ess
from ess_monitor.featurizers import GLA

WIDTH, LENGTH, TAU = 16, 128, 1e-3
POSITIONS = operator_positions(LENGTH, 3)


class Loop(nn.Module):
    """Steps through the sequence with projections of the inputs, and of the last output where `recurrent`."""

    def __init__(self, step: Callable[..., tuple[Tensor, ...]], gates: int, *, recurrent: bool) -> None:
        super().__init__()
        self.step, self.recurrent = step, recurrent
        self.inputs = nn.Linear(WIDTH, gates * WIDTH)
        self.outputs = nn.Linear(WIDTH, gates * WIDTH, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        """Return (batch, length, WIDTH)."""
        state: tuple[Tensor, ...] = (torch.zeros_like(u[:, 0]),)
        outputs = []
        for token in self.inputs(u).unbind(1):
            gates = token + self.outputs(state[0]) if self.recurrent else token
            state = self.step(gates.chunk(gates.shape[-1] // WIDTH, -1), *state)
            outputs.append(state[0])
        return torch.stack(outputs, 1)


def slstm(gates: Any, h: Tensor, c: Tensor | float = 0.0, n: Tensor | float = 0.0, m: Any = None) -> tuple[Tensor, ...]:
    """Step with exponential gates, a normalizer n and a stabilizer m (section 2.2 of arXiv 2405.04517)."""
    z, i, f, o = gates
    f = F.logsigmoid(f)
    stabilizer = i if m is None else torch.maximum(f + m, i)
    forget = torch.zeros_like(f) if m is None else (f + m - stabilizer).exp()
    enter = (i - stabilizer).exp()
    c, n = forget * c + enter * z.tanh(), forget * n + enter
    return o.sigmoid() * c / n, c, n, stabilizer


def min_gru(gates: Any, h: Tensor) -> tuple[Tensor]:
    """Step without a look at the last output (section 3.1 of arXiv 2410.01201)."""
    z, candidate = gates
    return ((1 - z.sigmoid()) * h + z.sigmoid() * candidate,)


def min_lstm(gates: Any, h: Tensor) -> tuple[Tensor]:
    """Step with two gates that sum to 1 (section 3.2 of arXiv 2410.01201)."""
    f, i, candidate = gates
    f, i = f.sigmoid(), i.sigmoid()
    return (f / (f + i) * h + i / (f + i) * candidate,)


class MinGRUInLogSpace(nn.Module):
    """minGRU as a parallel scan (their appendix B.2), through `logcumsumexp`."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, u: Tensor) -> Tensor:
        """Return (batch, length, WIDTH)."""
        z, candidate = self.inputs(u).chunk(2, -1)
        logs = torch.where(candidate >= 0, (F.relu(candidate) + 0.5).log(), F.logsigmoid(candidate))
        kept = (-F.softplus(z)).cumsum(1)
        return (kept + torch.logcumsumexp(-F.softplus(-z) + logs - kept, 1)).exp()


def first(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the function of a layer of torch, which returns its outputs and its state."""
    return lambda u: module(u)[0]


def row(title: str, function: Callable[[Tensor], Tensor], inputs: Tensor) -> tuple[dict[str, Any], list[str]]:
    """Return the row of a layer, and what is wrong with it."""
    function(inputs)
    started = time.process_time()
    for _ in range(10):
        function(inputs)
    forward = (time.process_time() - started) / 10
    operator = JacobianOperator(inputs[:, None], function, tolerance=TAU)
    started = time.process_time()
    operator.singular_values(POSITIONS)
    seconds = time.process_time() - started
    (products,) = operator.products
    J = operator.materialize()[0, 0]
    rows, columns = J.shape[0] // LENGTH, J.shape[1] // LENGTH
    full = [int((torch.linalg.svdvals(J[i * rows :, : i * columns]) > TAU).sum()) for i in POSITIONS]
    found = [operator.found[i] for i in POSITIONS]
    low, high = ([int(x.at_least(TAU)) for x in found], [float(x.at_most(TAU)) for x in found])
    wrong = any(not a <= b <= c for a, b, c in zip(low, full, high, strict=True))
    facts = {
        "layer": title,
        "full Jacobian": "/".join(map(str, full)),
        "by products": "/".join(str(a) if a == b else f">={a}" for a, b in zip(low, high, strict=True)),
        "method": products.method,
        "products": products.count,
        "forward passes": round(seconds / forward),
        "CPU seconds": seconds,
    }
    return facts, [f"{title}: {low} to {high} by products, {full} in the full Jacobian"] if wrong else []


def run() -> Result:
    """Measure every layer."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    inputs = torch.randn(1, LENGTH, WIDTH, dtype=torch.float64)
    layers: dict[str, Callable[[Tensor], Tensor]] = {
        "LSTM": first(nn.LSTM(WIDTH, WIDTH, batch_first=True).double()),
        "GRU": first(nn.GRU(WIDTH, WIDTH, batch_first=True).double()),
        "sLSTM": Loop(slstm, 4, recurrent=True).double(),
        "minGRU": Loop(min_gru, 2, recurrent=False).double(),
        "minLSTM": Loop(min_lstm, 3, recurrent=False).double(),
        "minGRU, log space": MinGRUInLogSpace().double(),
        "TTT": TTTLinear().double(),
        "Titans' memory": NeuralMemory().double(),
    }
    gla = GLA(WIDTH, 1, expand_k=0.5, beta=1.0).double()
    calls: list[tuple[Tensor, ...]] = []
    handle = gla.core.register_forward_hook(lambda module, args, output: calls.append(args))
    (operator,) = capture_operators(gla, inputs).values()
    handle.remove()
    q, k, v, log_decay = calls[0]
    layers["GLA, op alone"] = lambda values: gla.core(q, k, values[:, None], log_decay)[:, 0]
    layers["GLA, whole layer"] = gla
    table, failures = [], []
    for title, function in layers.items():
        facts, wrong = row(title, function, v[:, 0] if "op alone" in title else inputs)
        table.append(facts)
        failures += wrong
        print(title, file=sys.stderr, flush=True)
    sizes = [int(size) for size in tolerance_ess(operator.singular_values(POSITIONS), TAU)[0, 0]]
    expected = "/".join(str(WIDTH * size) for size in sizes)
    if table[-2]["by products"] != expected:
        failures.append(f"GLA: {table[-2]['by products']} by products, {expected} by the operator")
    notes = [f"GLA by its operator: ESS {'/'.join(map(str, sizes))} of 8 a channel, times {WIDTH} channels: {expected}"]
    title = f"Rank of the Jacobian of the outputs from i on by the inputs before i, tau {TAU:g}, i = {POSITIONS}"
    return Result(title, table, notes, failures)


if __name__ == "__main__":
    sys.exit(main([run], __doc__))

"""A^power in place of A, in the layers of libraries and in our own: the operator is that of the raised decay."""

from __future__ import annotations

import dataclasses
import math
import sys
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from benchmarks.layers import CASES
from benchmarks.layers.case import Case, Mixed
from ess_monitor.capture.decay_power import can_raise, decay_raised
from ess_monitor.capture.hooks.call_site import Call
from ess_monitor.capture.hooks.changed_calls import ChangedCalls
from ess_monitor.ess import DeltaRecurrence, Operator, ReadFirstRecurrence
from ess_monitor.featurizers import GLA, GLAS6, S6, WLA
from tests.capture.adapters.helpers import captured_in, exact
from tests.capture.adapters.test_pull import built, quietly

BY_ARGUMENTS = {
    *("WLA", "GLA", "GLAS6", "S6"),
    *("GatedLinearAttention", "HGRN2Attention", "SimpleGatedLinearAttention", "RWKV6Attention"),
    *("GatedDeltaNet", "KimiDeltaAttention", "RWKV7Attention"),
    *("Qwen3NextGatedDeltaNet", "Qwen3_5GatedDeltaNet", "OlmoHybridGatedDeltaNet", "KimiLinearDeltaAttention"),
    *("MambaMixer", "FalconMambaMixer", "JambaMambaMixer", "mamba_ssm.Mamba"),
    *("Mamba2Mixer", "BambaMixer", "GraniteMoeHybridMambaLayer", "Zamba2MambaMixer", "FalconH1Mixer"),
    *("NemotronHMamba2Mixer", "mamba_ssm.Mamba2"),
    "RwkvSelfAttention",
}
BY_ALPHA = {"RecurrentGemmaRglru", "ZambaMambaMixer", "fla.Mamba2"}
NOT_RAISED = {
    "DeltaNet": "A of DeltaNet follows from b_proj, k_proj, k_conv1d, and nothing in it is a decay that has a power",
    "LinearAttention": "LinearAttention has no decay, or a fixed one",
    "MultiScaleRetention": "MultiScaleRetention has no decay, or a fixed one",
    "MiniMaxLightningAttention": "MiniMaxLightningAttention has no decay, or a fixed one",
}
HALF, CUT = 0.5, math.inf


def scan(call: Call) -> Mixed:
    """Return y = T v of our own featurizers."""
    return Mixed(call.args[2], call.output)


def own(layer: type[nn.Module], length: int) -> Case:
    def build() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        options = {"beta": 4.0} if layer is WLA else {}
        return layer(16, **({} if layer is S6 else {"num_heads": 2}), **options), (torch.randn(2, length, 16),), {}

    return Case("torch", layer.__name__, build, scan, note=f"{length} tokens")


def kind_of(case: Case) -> str:
    prefix = {"mamba_ssm": "mamba_ssm.", "flash-linear-attention": "fla."}.get(case.library, "")
    return prefix + case.layer if case.layer in ("Mamba", "Mamba2") else case.layer


ALL = (*CASES, *(own(layer, length) for layer in (WLA, GLA, GLAS6, S6) for length in (7, 72)))
LIKE_OTHERS = ("grouped", "short convolution", "negative eigenvalues")
"""Notes of cases that take as long as others and have the same decay."""
RAISED = [
    pytest.param(case, case.modes[0], id=f"{case.name}-{case.modes[0]}")
    for case in ALL
    if kind_of(case) in BY_ARGUMENTS | BY_ALPHA and not case.note.startswith(LIKE_OTHERS)
    if (case.layer, case.note) != ("KimiDeltaAttention", "chunk")  # a minute; with a lower bound it is shorter
]


class Run(NamedTuple):
    """One forward pass."""

    operator: Operator
    y: Tensor
    """What the library's call gave."""
    product: Tensor
    """The same from the captured operator."""
    output: Tensor
    """Of the model."""
    counts: ChangedCalls | None


class Model:
    """A model of a case, run again and again on the same input."""

    def __init__(self, case: Case, mode: str, *, autocast: bool = False) -> None:
        self.case, self.autocast = case, autocast
        self.net, self.args, self.kwargs, layers = built(case)
        self.net.train(mode == "train")
        self.layer = layers[-1]
        if "lower bound" in case.note:
            nn.init.zeros_(self.layer.module.dt_bias)  # as after training: with its own start hardly anything decays

    def run(self, power: float | None = None) -> Run:
        seen: list[Mixed] = []

        def keep(call: Call) -> None:
            if call.output is not None and not seen:
                seen.append(self.case.mixed(call))

        def forward() -> None:
            with torch.random.fork_rng(devices=()), quietly():
                torch.manual_seed(1)
                outputs.append(self.net(*self.args, **self.kwargs))

        outputs: list[Any] = []
        low = torch.autocast("cpu", dtype=torch.bfloat16) if self.autocast else nullcontext()
        raised = nullcontext() if power is None else decay_raised(self.layer, power)
        with low, raised as counts, torch.no_grad():
            watch = self.layer.spec.site.watch(self.layer.module, after=keep)
            try:
                taken = captured_in(self.net, forward)
            finally:
                watch.remove()
        [operator] = [item.operator for item in taken if item.layer.module is self.layer.module]
        [mixed] = seen
        output = outputs[0][0] if isinstance(outputs[0], tuple) else getattr(outputs[0], "logits", outputs[0])
        product = mixed.finish(exact(operator) @ mixed.u.double())
        return Run(operator, mixed.y.double(), product, output, counts)


def raised_by_hand(operator: Any, power: float) -> Tensor:
    """T, token by token in float64, with the log decay times the power."""
    b, c = (operator.k, operator.q) if isinstance(operator, DeltaRecurrence) else (operator.b, operator.c)
    size = (operator.batch, operator.heads, operator.length)
    vector = (*size, operator.state_size)
    decay = (operator.log_decay.double() * power).exp().expand(vector)
    b, c = b.double().expand(vector), c.double().expand(vector)
    left = right = torch.zeros_like(b)
    if isinstance(operator, DeltaRecurrence):
        keys, beta = b, operator.beta.double().expand(size)[..., None]
        b = beta * keys
        rank_one = operator.left is not None
        left = operator.left.double().expand(vector) if rank_one else -b
        right = operator.right.double().expand(vector) if rank_one else keys * decay
    state = torch.zeros(*size[:2], vector[3], size[2], dtype=torch.float64)
    T = torch.zeros(*size, size[2], dtype=torch.float64)
    for t in range(size[2]):
        if isinstance(operator, ReadFirstRecurrence):
            T[:, :, t] = (c[:, :, t, :, None] * state).sum(2)
        read = (right[:, :, t, :, None] * state).sum(2, keepdim=True)
        state = decay[:, :, t, :, None] * state + left[:, :, t, :, None] * read
        state[..., t] += b[:, :, t]
        if not isinstance(operator, ReadFirstRecurrence):
            T[:, :, t] = (c[:, :, t, :, None] * state).sum(2)
    return T


def expected(case: Case, before: Any, found: Any, power: float) -> Tensor:
    """T of the raised decay, from the operator before. Two families compute more than A from the decay."""
    if case.layer == "RecurrentGemmaRglru":  # the input's factor sqrt(1 - a^2)
        factors = [(-torch.expm1(2 * p * before.log_decay.double())).sqrt() for p in (power, 1.0)]
        before = dataclasses.replace(before, b=before.b.double() * factors[0] / factors[1])
    if case.layer == "RwkvSelfAttention":  # the sums of the rows, which y is compared with
        before = dataclasses.replace(before, c=found.c)
    return raised_by_hand(before, power)


def off_diagonal(operator: Operator) -> tuple[Tensor, Tensor]:
    """The largest entry of T left of what A = 0 leaves, and the largest entry at all."""
    T = exact(operator)
    first = 2 if isinstance(operator, ReadFirstRecurrence) else 1
    return T.tril(-first).abs().max(), T.abs().max()


def relative(found: Tensor, reference: Tensor) -> float:
    return ((found - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize(("case", "mode"), RAISED)
def test_the_layer_applies_the_raised_decay_and_is_as_before_afterwards(
    case: Case, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(case, mode)
    if case.layer == "RWKV7Attention":
        kernels = sys.modules["fla.ops.generalized_delta_rule.dplr.chunk_A_fwd"]
        monkeypatch.setattr(kernels, "IS_GATHER_SUPPORTED", False)  # Triton's interpreter does not find it there
    state = {name: tensor.clone() for name, tensor in model.net.state_dict().items()}
    hooks = {name: len(value) for name, value in vars(model.layer.module).items() if name.endswith("hooks")}
    before = model.run()
    half = model.run(HALF)
    cut = model.run(CUT)
    after = model.run()

    reference = expected(case, before.operator, half.operator, HALF)
    assert relative(exact(half.operator), reference) < 2e-5
    assert relative(reference, exact(before.operator)) > 1e-3, "the decay is of no account here"
    beyond, largest = off_diagonal(cut.operator)
    assert beyond <= 1e-6 * largest
    for run in (before, half, cut):
        assert relative(run.product, run.y) < case.tolerance
        assert run.output.isfinite().all()
    assert half.counts == cut.counts == ChangedCalls(calls=1)
    assert relative(half.y, before.y) > 1e-4

    assert torch.equal(after.output, before.output)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.net.state_dict().items())
    assert {name: len(value) for name, value in vars(model.layer.module).items() if name.endswith("hooks")} == hooks


LOW_PRECISION = ("GLA", "MambaMixer", "Mamba2Mixer", "Qwen3NextGatedDeltaNet", "RwkvSelfAttention", *sorted(BY_ALPHA))


@pytest.mark.parametrize("kind", LOW_PRECISION)
def test_under_autocast_the_layer_applies_the_raised_decay_in_its_precision(kind: str) -> None:
    case = next(case for case in ALL if kind_of(case) == kind)
    model = Model(case, case.modes[0], autocast=True)
    before, half, cut = model.run(), model.run(HALF), model.run(CUT)
    assert relative(exact(half.operator), expected(case, before.operator, half.operator, HALF)) < 2**-7
    beyond, largest = off_diagonal(cut.operator)
    assert beyond <= 1e-6 * largest
    for run in (half, cut):
        assert relative(run.product, run.y) < max(2**-6, 2 * relative(before.product, before.y))
        assert run.output.isfinite().all()


@pytest.mark.parametrize("kind", [*sorted(BY_ARGUMENTS | BY_ALPHA), *NOT_RAISED])
def test_what_can_be_raised_is_said_before(kind: str) -> None:
    case = next(case for case in ALL if kind_of(case) == kind)
    _, _, _, layers = built(case)
    decay, alpha = layers[0].spec.decay, layers[0].spec.alpha
    assert can_raise(layers[0]) == NOT_RAISED.get(kind, "")
    assert (decay is not None and decay.raised is not None) == (kind in BY_ARGUMENTS)
    if kind in BY_ALPHA:
        assert alpha is not None

"""Mamba and Mamba-2 where a batch is padded or packed, decoded, in low precision, or computed by a fused kernel."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.layers import Case, mamba, mamba2, measure
from ess_monitor.capture import (
    CaptureConfig,
    Captured,
    Sampler,
    capture_operators,
    find_layers,
    layer_infos,
)
from ess_monitor.ess import Operator
from tests.capture.adapters.helpers import captured_in, check_pull, exact

pytest.importorskip("transformers")

HF = {case.layer: case for case in (*mamba.CASES, *mamba2.CASES) if case.library == "transformers"}


def built(case: Case) -> tuple[nn.Module, Tensor]:
    model, (tokens,), _ = case.build()
    return model.eval(), tokens


def first_operator(model: nn.Module, *args: Any, **kwargs: Any) -> Operator:
    return next(iter(capture_operators(model, *args, **kwargs).values()))


@pytest.mark.parametrize("layer", HF)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_the_tokens_beside_it(layer: str, side: str) -> None:
    model, tokens = built(HF[layer])
    mask = torch.ones_like(tokens)
    real = slice(5, None) if side == "left" else slice(0, -5)
    mask[0] = 0
    mask[0, real] = 1
    padded = exact(first_operator(model, tokens, attention_mask=mask, use_cache=False))[0]
    alone = exact(first_operator(model, tokens[:1, real], use_cache=False))[0]
    scale = alone.abs().max()
    assert (padded[:, real, real] - alone).abs().max() < 1e-5 * scale


@pytest.mark.parametrize("layer", [name for name in HF if name != "ZambaMambaMixer"])
def test_padding_enters_no_state(layer: str) -> None:
    model, tokens = built(HF[layer])
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    operator = exact(first_operator(model, tokens, attention_mask=mask, use_cache=False))
    assert operator[0, :, :, :5].abs().max() == 0
    assert operator[1, :, :, :5].abs().max() > 0


@pytest.mark.parametrize("layer", ["MambaMixer", "FalconMambaMixer", "Mamba2Mixer", "NemotronHMamba2Mixer"])
def test_the_prompt_is_captured_and_no_step_of_decoding(layer: str) -> None:
    model, tokens = built(HF[layer])
    names = [found.name for found in find_layers(model)]

    def generate() -> None:
        model.generate(tokens, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)  # type: ignore[operator]

    taken = captured_in(model, generate)
    assert [item.layer.name for item in taken] == names
    assert {item.operator.length for item in taken} == {tokens.shape[1]}

    with torch.no_grad():
        output = model(tokens, use_cache=True)
    cache = {name: output[name] for name in ("cache_params", "past_key_values") if output.get(name) is not None}
    assert cache
    assert captured_in(model, lambda: model(tokens[:, :1], use_cache=True, **cache)) == []


def test_a_single_token_is_no_sequence_where_decoding_calls_the_same_module() -> None:
    model, _ = built(HF["ZambaMambaMixer"])
    layer = find_layers(model)[0].module
    x = torch.randn(2, 3, 16)
    assert len(captured_in(layer, lambda: layer(x))) == 1
    assert captured_in(layer, lambda: layer(x[:, :1])) == []


@pytest.mark.parametrize("layer", ["MambaMixer", "JambaMambaMixer", "Mamba2Mixer", "NemotronHMamba2Mixer"])
def test_under_autocast_t_times_u_is_the_output_in_its_precision(layer: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        row = measure(HF[layer], "train")
    assert row.error < 2**-6


def kernel(name: str) -> Callable[..., Any]:
    """mamba_ssm's reference for one of its fused ops."""
    stub = pytest.importorskip("benchmarks.layers.mamba_ssm_stub")
    return next(space[name] for layer in stub.layers() if name in (space := layer.forward.__globals__))


def inner_with_norms(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: None = None,
    C: None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """The fused op with FalconMamba's norms: those of B, C and, behind its projection, dt."""
    x, z = xz.chunk(2, 1)
    u = nn.functional.silu(
        nn.functional.conv1d(x, conv1d_weight, conv1d_bias, padding=conv1d_weight.shape[2] - 1, groups=x.shape[1])
    )[..., : x.shape[2]]
    rank, state = delta_proj_weight.shape[1], A.shape[1]
    low, b, c = (u.mT @ x_proj_weight.T).split((rank, state, state), -1)
    dt = low @ delta_proj_weight.T
    if dt_rms_weight is not None:
        b = nn.functional.rms_norm(b, (state,), b_rms_weight, b_c_dt_rms_eps)
        c = nn.functional.rms_norm(c, (state,), c_rms_weight, b_c_dt_rms_eps)
        dt = nn.functional.rms_norm(dt, dt.shape[-1:], dt_rms_weight, b_c_dt_rms_eps)
    scan = kernel("selective_scan_fn")
    y = scan(u, dt.mT, A, b.mT, c.mT, D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus)
    return y.mT @ out_proj_weight.T


FUSED = {
    "MambaMixer": ("mamba_inner_fn", inner_with_norms, mamba.fused),
    "FalconMambaMixer": ("mamba_inner_fn", inner_with_norms, mamba.fused),
    "Mamba2Mixer": ("mamba2_split_conv1d_scan_combined", None, mamba2.fused),
}


@pytest.fixture(params=FUSED)
def with_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    """A case of transformers as it is with kernels installed."""
    case = HF[request.param]
    name, function, mixed = FUSED[request.param]
    function = function or kernel(name.replace("mamba2_", "mamba_"))
    model, _ = built(case)
    layer = next(m for m in model.modules() if type(m).__name__ == case.layer)
    monkeypatch.setattr(sys.modules[type(layer).__module__], name, function)
    return dataclasses.replace(case, mixed=mixed, modes=("train",))


def test_a_fused_kernel_is_read_by_its_arguments(with_kernel: Case) -> None:
    row = measure(with_kernel, "train")
    assert row.error < 1e-5
    assert row.described == row.measured


def test_the_pull_on_a_fused_kernel_reaches_everything_behind_a(with_kernel: Case, in_small_parts: None) -> None:
    model, tokens = built(with_kernel)
    layer = find_layers(model.train())[-1]
    moved = check_pull(model, layer, lambda: model(tokens, use_cache=False).logits.square().mean())
    assert layer.spec.decay is not None
    assert moved >= {
        name for name, _ in layer.module.named_parameters() if name.startswith(layer.spec.decay.parameters)
    }


def test_the_pull_leaves_padding_as_the_layer_does(in_small_parts: None) -> None:
    model, tokens = built(HF["ZambaMambaMixer"])
    layer, mask = find_layers(model.train())[-1], torch.ones_like(tokens)
    mask[0, :5] = 0
    moved = check_pull(model, layer, lambda: model(tokens, attention_mask=mask, use_cache=False).logits.square().mean())
    assert moved >= {"x_proj_weight", "dt_proj_weight", "dt_proj_bias", "A_log", "in_proj.weight", "conv1d.weight"}


@pytest.mark.parametrize("fast", [True, False])
def test_the_penalty_of_a_checkpointed_layer_needs_no_hook_in_its_recomputation(fast: bool) -> None:
    pytest.importorskip("benchmarks.layers.mamba_ssm_stub")
    model, (x,), _ = mamba.mamba_ssm(fast)
    check_pull(model, find_layers(model)[0], lambda: checkpoint(model, x, use_reentrant=False).square().mean())


@pytest.mark.parametrize("layer", FUSED)
def test_a_placeholder_for_a_fused_kernel_is_not_pulled(layer: str) -> None:
    model, _ = built(HF[layer])
    handle = find_layers(model)[0].spec.decay
    assert handle is not None
    assert FUSED[layer][0] not in [op.name for op in handle.site.ops]
    assert handle.site.ops


STATE = 4


class Grouped(nn.Module):
    """Groups of channels share B; C is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(-torch.rand(6, STATE))
        self.C = nn.Parameter(torch.randn(6, STATE))

    def forward(self, u: Tensor, dt: Tensor, B: Tensor) -> Tensor:
        return selective_scan_fn(u, dt, self.A, B, self.C, delta_softplus=True)


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    scanned: Tensor = kernel("selective_scan_fn")(
        u, delta, A, B, C, delta_bias=delta_bias, delta_softplus=delta_softplus
    )
    return scanned


def test_groups_of_channels_and_a_fixed_c_are_read() -> None:
    layer, u = Grouped(), torch.randn(2, 6, 16)
    dt, B = torch.randn(2, 6, 16), torch.randn(2, 2, STATE, 16)
    with torch.no_grad():
        y = layer(u, dt, B).double()
    [taken] = captured_in(layer, lambda: layer(u, dt, B))
    assert (exact(taken.operator) @ u[..., None].double() - y[..., None]).abs().max() < 1e-5 * y.abs().max()
    sampler = Sampler(find_layers(layer), CaptureConfig(samples=1, heads=2, max_length=8, source="validation"))
    sampler.arm()
    layer(u, dt, B)
    [few] = sampler.collect()
    assert isinstance(few, Captured)
    torch.testing.assert_close(exact(few.operator), exact(taken.operator)[:1, list(few.heads), :8, :8])


is_fast_path_available = False


class OwnCodeElsewhere(nn.Module):
    """As fla's Mamba: an op where its package is installed, code of its own elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if is_fast_path_available and x.is_cuda:
            return selective_scan_fn(x, x, x, x, x)
        return self.in_proj(x)


def test_a_layer_that_would_not_call_the_op_here_is_skipped_with_the_reason() -> None:
    [info] = layer_infos(nn.Sequential(OwnCodeElsewhere()))
    assert not info.supported
    assert "mamba_ssm" in info.reason


def test_the_stub_of_mamba_ssm_is_seen_by_no_other_package() -> None:
    pytest.importorskip("benchmarks.layers.mamba_ssm_stub")
    program = """
import sys
from benchmarks.layers import mamba, measure
[stubbed] = [case for case in mamba.CASES if case.library == "mamba_ssm" and case.note == "fused"]
before = set(sys.modules)
assert measure(stubbed, "train").error < 1e-5
roots = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not roots & {"mamba_ssm", "causal_conv1d", "selective_scan_cuda"}, roots
assert measure(mamba.CASES[0], "train").error < 1e-5
import transformers.models.mamba.modeling_mamba as modeling
assert modeling.mamba_inner_fn(*[None] * 8) is None
assert measure(stubbed, "train").error < 1e-5
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr

"""Layers as transformers had them before 5.15: without kernels, in code of their own, with ops kept as attributes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ess_monitor.capture import AlphaHandle, Sampler, find_layers, layer_infos
from tests.capture.adapters.helpers import EVERYTHING, captured_in, check_pull, exact

LENGTH, WIDTH, CHANNELS, STATE, RANK = 10, 6, 8, 4, 2


def of_transformers(cls: type[nn.Module]) -> type[nn.Module]:
    """Adapters find layers without an op by the name of their class."""
    cls.__module__, cls.__qualname__ = "transformers.models.old.modeling_old", cls.__name__
    return cls


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(size) + 0.5), 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)


@of_transformers
class MambaMixer(nn.Module):
    """A loop over the tokens, and ops that are not called on a CPU, even where their package is installed."""

    def __init__(self, norm: str = "") -> None:
        super().__init__()
        self.in_proj, self.x_proj = nn.Linear(WIDTH, CHANNELS), nn.Linear(CHANNELS, RANK + 2 * STATE, bias=False)
        self.dt_proj, self.out_proj = nn.Linear(RANK, CHANNELS), nn.Linear(CHANNELS, WIDTH)
        self.A_log = nn.Parameter(torch.arange(1.0, STATE + 1).log().repeat(CHANNELS, 1))
        self.norm, self.ssm_state_size, self.intermediate_size = norm, STATE, CHANNELS
        if norm == "falcon":
            self.rms_eps = 1e-3
        if norm == "jamba":
            self.dt_layernorm, self.b_layernorm, self.c_layernorm = Norm(RANK), Norm(STATE), Norm(STATE)
        self.u = self.y = torch.empty(0)

    def cuda_kernels_forward(self, x: Tensor) -> Any:
        return selective_scan_fn(x, x, x, x, x)

    def slow_forward(self, x: Tensor) -> Tensor:
        u = self.in_proj(x)
        dt, b, c = self.x_proj(u).split((RANK, STATE, STATE), -1)
        if self.norm == "falcon":
            dt, b, c = (F.rms_norm(t, t.shape[-1:], eps=self.rms_eps) for t in (dt, b, c))
        if self.norm == "jamba":
            dt, b, c = self.dt_layernorm(dt), self.b_layernorm(b), self.c_layernorm(c)
        delta, state, outputs = F.softplus(self.dt_proj(dt))[..., None], 0.0, []
        for t in range(x.shape[1]):
            decay = (-delta[:, t] * self.A_log.exp()).exp()
            state = decay * state + delta[:, t] * b[:, t, None] * u[:, t, :, None]
            outputs.append((state * c[:, t, None]).sum(-1))
        y = torch.stack(outputs, 1)
        self.u, self.y = u.detach().double(), y.detach().double()
        return self.out_proj(y)

    def forward(self, x: Tensor) -> Tensor:
        return self.cuda_kernels_forward(x) if x.is_cuda else self.slow_forward(x)


def selective_scan_fn(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    raise NotImplementedError("needs an accelerator")


@pytest.mark.parametrize("norm", ["", "falcon", "jamba"])
def test_a_mamba_without_its_op_is_read_where_its_own_code_projects(norm: str, in_small_parts: None) -> None:
    torch.manual_seed(0)
    layer, x = MambaMixer(norm), torch.randn(2, LENGTH, WIDTH)
    [info] = layer_infos(layer)
    assert (info.supported, info.state_capacity, info.channels) == (True, STATE, CHANNELS)
    [taken] = captured_in(layer, lambda: layer(x))
    product = (exact(taken.operator) @ layer.u.mT[..., None])[..., 0]
    torch.testing.assert_close(product, layer.y.mT, atol=1e-6, rtol=1e-5)
    [found] = find_layers(layer)
    assert found.spec.alpha == AlphaHandle("A_log", 1.0)
    moved = check_pull(layer, found, lambda: layer(x).square().mean())
    assert {"x_proj.weight", "dt_proj.weight", "dt_proj.bias", "A_log"} <= moved


HEADS, GROUPS = 4, 2


class Scalar(nn.Module):
    """The recurrence as a matrix; heads that are neighbors share B and C."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.conv_dim = CHANNELS + 2 * GROUPS * STATE
        self.in_proj, self.out_proj = nn.Linear(WIDTH, CHANNELS + self.conv_dim + HEADS), nn.Linear(CHANNELS, WIDTH)
        self.conv1d = nn.Conv1d(self.conv_dim, self.conv_dim, 3, groups=self.conv_dim, padding=2)
        self.A_log, self.dt_bias = nn.Parameter(torch.linspace(-2, 0, HEADS)), nn.Parameter(torch.randn(HEADS))
        self.intermediate_size, self.n_groups, self.ssm_state_size, self.num_heads = CHANNELS, GROUPS, STATE, HEADS
        self.activation, self.act, self.chunk_size = "silu", nn.SiLU(), 64
        self.time_step_limit, self.time_step_min = (0.3, 0.9), 0.5
        self.u = self.y = torch.empty(0)
        for name, value in attributes.items():
            setattr(self, name, value)

    def delta(self, dt: Tensor) -> Tensor:
        return F.softplus(dt + self.dt_bias)

    def mixed(self, x: Tensor, delta: Tensor) -> Tensor:
        projected = self.in_proj(x) * getattr(self, "mup_vector", 1.0)
        gate, convolved, _ = projected.split((CHANNELS, self.conv_dim, HEADS), 2)
        convolved = self.act(self.conv1d(convolved.mT)[..., : x.shape[1]].mT)
        u, b, c = convolved.split((CHANNELS, GROUPS * STATE, GROUPS * STATE), 2)
        b, c = (t.unflatten(2, (GROUPS, STATE)).repeat_interleave(HEADS // GROUPS, 2).transpose(1, 2) for t in (b, c))
        delta, u = delta.mT, u.unflatten(2, (HEADS, -1)).transpose(1, 2)
        summed = (-delta * self.A_log.exp()[:, None]).cumsum(2)
        decay = (summed[..., :, None] - summed[..., None, :]).tril().exp().tril()
        y = (c @ b.mT * decay * delta[:, :, None]) @ u
        self.u, self.y = u.detach().double(), y.detach().double()
        return self.out_proj(y.transpose(1, 2).flatten(2) * F.silu(gate))

    def torch_forward(self, x: Tensor) -> Tensor:
        dt = (self.in_proj(x) * getattr(self, "mup_vector", 1.0))[..., -HEADS:]
        return self.mixed(x, self.delta(dt).clamp(*self.time_step_limit))

    def forward(self, x: Tensor) -> Tensor:
        return self.torch_forward(x)


@of_transformers
class Mamba2Mixer(Scalar):
    pass


@of_transformers
class Zamba2MambaMixer(Scalar):
    def torch_forward(self, x: Tensor) -> Tensor:
        states_permuted = self.delta(self.in_proj(x)[..., -HEADS:])
        return self.mixed(x, states_permuted.clamp(self.time_step_min))


@of_transformers
class BambaMixer(Scalar):
    pass


@of_transformers
class FalconH1Mixer(Scalar):
    pass


MULTIPLIERS = torch.linspace(0.5, 2, CHANNELS + CHANNELS + 2 * GROUPS * STATE + HEADS)


@pytest.mark.parametrize(
    "build",
    [Mamba2Mixer, BambaMixer, Zamba2MambaMixer, lambda: FalconH1Mixer(mup_vector=MULTIPLIERS)],
    ids=["limits", "by another name", "minimum", "multipliers"],
)
def test_a_mamba_2_without_its_op_is_read_where_its_own_code_projects(build: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    layer, x = build(), torch.randn(2, LENGTH, WIDTH)
    [taken] = [item for item in captured_in(layer, lambda: layer(x)) if item.layer.module is layer]
    torch.testing.assert_close(exact(taken.operator) @ layer.u, layer.y, atol=1e-6, rtol=1e-5)
    [found] = find_layers(layer)
    assert {"in_proj.weight", "A_log"} <= check_pull(layer, found, lambda: layer(x).square().mean())


def test_code_that_computes_no_recurrence_over_several_chunks_is_refused_with_the_version_that_does() -> None:
    layer = Zamba2MambaMixer(chunk_size=LENGTH - 1)
    sampler = Sampler(find_layers(layer), EVERYTHING)
    sampler.arm()
    layer(torch.randn(2, LENGTH, WIDTH))
    [taken] = sampler.collect()
    assert "transformers>=5.15" in str(taken.error)


@of_transformers
class MiniMaxLightningAttention(nn.Module):
    """The activation gives q, k and v of each head; padding is hidden in v alone."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj, self.act_fn, self.out_proj = nn.Linear(WIDTH, 24), nn.SiLU(), nn.Linear(8, WIDTH)
        self.register_buffer("slope_rate", torch.tensor([0.1, 0.4])[:, None, None])
        self.num_attention_heads, self.head_dim = 2, 4
        self.v = self.y = torch.empty(0)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        q, k, v = self.act_fn(self.qkv_proj(x)).unflatten(2, (2, 12)).transpose(1, 2).split(4, 3)
        v = v * attention_mask[:, None, :, None]
        distance = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        y = ((q @ k.mT) * (-self.slope_rate * distance).exp().tril()) @ v
        self.v, self.y = v.detach().double(), y.detach().double()
        return self.out_proj(y.transpose(1, 2).flatten(2))


def test_lightning_attention_that_masks_by_itself_is_read_at_its_activation() -> None:
    torch.manual_seed(0)
    layer, x = MiniMaxLightningAttention(), torch.randn(2, LENGTH, WIDTH)
    mask = torch.ones(2, LENGTH)
    mask[0, :3] = 0
    [taken] = captured_in(layer, lambda: layer(x, attention_mask=mask))
    T = exact(taken.operator)
    torch.testing.assert_close(T @ layer.v, layer.y, atol=1e-6, rtol=1e-5)
    assert T[0, :, :, :3].abs().max() == 0
    assert T[1, :, :, :3].abs().max() > 0


def softmax_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Any:
    hidden = torch.full((query.shape[2],) * 2, -torch.inf).triu(1)
    return (query @ key.mT * scale + hidden).softmax(-1) @ value


def eager_attention_forward(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kw: Any):
    scale = query.shape[-1] ** -0.5 if module.scale_attn_weights else 1.0
    scale = scale / (module.layer_idx + 1) if module.scale_attn_by_inverse_layer_idx else scale
    return softmax_attention(module, query, key, value, kw.get("scaling", scale)), None


ALL_ATTENTION_FUNCTIONS = {"sdpa": eager_attention_forward}


class OlderAttention(nn.Module):
    """Names its eager kernel, and fetches only the others; GPT-2's takes its scale from the layer."""

    is_causal, num_heads = True, 2

    def __init__(self, kernel: str, *, scaling: float | None, by_width: bool = True, by_depth: bool = False) -> None:
        super().__init__()
        self.config, self.layer_idx = SimpleNamespace(_attn_implementation=kernel), 2
        self.options = {} if scaling is None else {"scaling": scaling}
        self.scale_attn_weights, self.scale_attn_by_inverse_layer_idx = by_width, by_depth
        self.proj = nn.Linear(WIDTH, 24)
        self.v = self.y = torch.empty(0)

    def forward(self, x: Tensor, head_mask: Tensor | None = None) -> Tensor:
        q, k, v = self.proj(x).unflatten(2, (2, 12)).transpose(1, 2).split(4, 3)
        attention_interface = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attention_interface = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)[None, None]
        options = self.options if head_mask is None else {**self.options, "head_mask": head_mask}
        y, _ = attention_interface(self, q, k, v, mask, **options)
        self.v, self.y = v.detach().double(), y.detach().double()
        return y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ("sdpa", {"scaling": 0.7}),
        ("eager", {"scaling": 0.7}),
        ("eager", {"scaling": None}),
        ("eager", {"scaling": None, "by_width": False}),
        ("eager", {"scaling": None, "by_width": False, "by_depth": True}),
    ],
)
def test_attention_that_names_its_eager_kernel_is_read_with_every_kernel(kernel: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer, x = OlderAttention(kernel, **options), torch.randn(2, LENGTH, WIDTH)
    [taken] = captured_in(layer, lambda: layer(x))
    torch.testing.assert_close(exact(taken.operator) @ layer.v, layer.y, atol=1e-6, rtol=1e-5)


def test_a_mask_of_heads_is_not_left_out_of_the_operator_silently() -> None:
    layer = OlderAttention("eager", scaling=1.0)
    sampler = Sampler(find_layers(layer), EVERYTHING)
    sampler.arm()
    layer(torch.randn(2, LENGTH, WIDTH), head_mask=torch.tensor([0.5, 1.0]))
    [taken] = sampler.collect()
    assert "head_mask" in str(taken.error)


def torch_chunk_gated_delta_rule(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Any:
    state, outputs = 0.0, []
    for t in range(value.shape[1]):
        k, q = key[:, t], query[:, t] * query.shape[-1] ** -0.5
        state = state * g[:, t].exp()[..., None, None] if t else torch.zeros(*k.shape, value.shape[-1])
        change = (value[:, t] - (k[..., None] * state).sum(2)) * beta[:, t, :, None]
        state = state + k[..., None] * change[..., None, :]
        outputs.append((q[..., None] * state).sum(2))
    return torch.stack(outputs, 1), None


def of_fla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Any:
    return torch_chunk_gated_delta_rule(q, k, v, g, beta)


chunk_gated_delta_rule: Any = None  # fla's, where it is installed


class KeepsItsOp(nn.Module):
    """As Qwen3-Next: the op is chosen once, and kept as an attribute."""

    def __init__(self, op: Any = None) -> None:
        super().__init__()
        self.chunk_gated_delta_rule = op or chunk_gated_delta_rule or torch_chunk_gated_delta_rule
        self.in_proj_qkv, self.in_proj_ba = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 4)
        self.head_k_dim, self.num_v_heads = 4, 2
        self.v = self.y = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.in_proj_qkv(x).unflatten(2, (2, 12)).split(4, 3)
        b, a = self.in_proj_ba(x).chunk(2, -1)
        y, _ = self.chunk_gated_delta_rule(q, k, v, g=-F.softplus(a), beta=b.sigmoid())
        self.v, self.y = v.detach().double().transpose(1, 2), y.detach().double().transpose(1, 2)
        return y.flatten(2)


@pytest.mark.parametrize("op", [None, of_fla])
def test_an_op_that_is_kept_as_an_attribute_is_read_and_pulled(op: Any) -> None:
    torch.manual_seed(0)
    layer, x = KeepsItsOp(op), torch.randn(2, LENGTH, WIDTH)
    kept = layer.chunk_gated_delta_rule
    [taken] = captured_in(layer, lambda: layer(x))
    torch.testing.assert_close(exact(taken.operator) @ layer.v, layer.y, atol=1e-6, rtol=1e-5)
    [found] = find_layers(layer)
    assert {"in_proj_qkv.weight", "in_proj_ba.weight"} <= check_pull(layer, found, lambda: layer(x).square().mean())
    assert layer.chunk_gated_delta_rule is kept


def between_hooks(forward: Any) -> Any:
    def wrapped(self: nn.Module, *args: Any) -> Any:
        return forward(self, *args)

    return wrapped


class Decorated(nn.Module):
    """As in transformers 5.15: the decorator of the method does not say what it wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj_qkv, self.in_proj_ba = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 4)

    @between_hooks
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.in_proj_qkv(x).unflatten(2, (2, 12)).split(4, 3)
        b, a = self.in_proj_ba(x).chunk(2, -1)
        y, _ = torch_chunk_gated_delta_rule(q, k, v, g=-F.softplus(a), beta=b.sigmoid())
        return y.flatten(2)


def test_an_op_is_found_behind_a_decorator_that_does_not_say_what_it_wraps() -> None:
    layer = Decorated()
    [taken] = captured_in(layer, lambda: layer(torch.randn(2, LENGTH, WIDTH)))
    assert taken.operator.length == LENGTH


def test_a_layer_whose_attribute_is_watched_is_copied_and_pickled_without_the_watch() -> None:
    layer, calls = KeepsItsOp(), []
    [found] = find_layers(layer)
    watch = found.spec.site.watch(layer, after=calls.append)
    others = (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)))
    for other in others:
        assert other.chunk_gated_delta_rule is torch_chunk_gated_delta_rule
        other(torch.randn(1, LENGTH, WIDTH))
    assert not calls
    layer(torch.randn(1, LENGTH, WIDTH))
    assert len(calls) == 1
    watch.remove()


@of_transformers
class Lfm2ShortConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.conv = nn.Linear(WIDTH, 3 * WIDTH), nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH, padding=2)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        b, c, x = self.in_proj(x).mT.chunk(3, 1)
        return (c * self.conv(b * x)[..., : x.shape[2]]).mT


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_short_convolution_that_is_given_the_mask_of_attention_reads_padding_on_the_left(
    side: str, dtype: torch.dtype
) -> None:
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[0, :3] = side == "right"
    real[0, -3:] = side == "left"
    mask = (real[:, None] & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())[:, None]
    mask = mask if dtype == torch.bool else torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(dtype).min)
    layer = Lfm2ShortConv()
    sampler = Sampler(find_layers(layer), EVERYTHING)
    sampler.arm()
    layer(torch.randn(2, LENGTH, WIDTH), attention_mask=mask)
    [taken] = sampler.collect()
    assert (side == "left") == ("transformers>=5.15" in str(getattr(taken, "error", "")))

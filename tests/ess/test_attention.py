"""SoftmaxAttention against the written-out operator."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from ess_monitor.errors import OperatorError
from ess_monitor.ess import SoftmaxAttention, entropy_ess, linalg, operators, tolerance_ess
from tests.ess import reference


def _random(
    *, samples: int = 2, heads: int = 4, key_heads: int = 4, length: int = 14, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    q = torch.randn(samples, heads, length, 6, dtype=dtype)
    return q, torch.randn(samples, key_heads, length, 6, dtype=dtype)


def _window(length: int, width: int) -> Tensor:
    lag = torch.arange(length)[:, None] - torch.arange(length)
    return lag < width


@given(
    st.sampled_from([2, 3, 9, 16]),
    st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 1)]),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([1e-30, 1.0, 30.0, 1e3]),
    st.booleans(),
)
def test_every_position_agrees_with_the_written_out_operator(
    length: int, heads: tuple[int, int], dtype: torch.dtype, scale: float, shared_keys: bool
) -> None:
    q, k = _random(heads=heads[0], key_heads=heads[1], length=length, dtype=dtype)
    k = k[:1] if shared_keys else k
    # The exponential turns the rounding of large logits into error, also in the reference.
    error = max(reference.ERROR[dtype], scale * 1e-12)
    reference.assert_agrees(SoftmaxAttention(q * scale, k), reference.attention(q * scale, k), error=error)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_grouped_keys_are_read_by_consecutive_heads(key_heads: int) -> None:
    q, k = _random(key_heads=key_heads)
    T = reference.attention(q, k)
    torch.testing.assert_close(SoftmaxAttention(q, k).materialize(), T, rtol=0, atol=1e-14)
    reference.assert_agrees(SoftmaxAttention(q, k), T)


@pytest.mark.parametrize("shape", [(14, 14), (1, 1, 14, 14), (2, 1, 14, 14), (1, 4, 14, 14), (2, 4, 14, 14)])
@pytest.mark.parametrize("kind", ["bool", "float32", "bfloat16"])
def test_masks_of_every_kind_and_shape_agree(shape: tuple[int, ...], kind: str) -> None:
    q, k = _random()
    mask = torch.rand(shape) < 0.7
    if kind != "bool":
        dtype = getattr(torch, kind)
        mask = torch.where(mask, torch.randn(shape).to(dtype), torch.finfo(dtype).min)
    T = reference.attention(q, k, mask=mask)
    reference.assert_agrees(SoftmaxAttention(q, k, mask=mask), T)
    torch.testing.assert_close(SoftmaxAttention(q, k, mask=mask).materialize(), T, rtol=0, atol=1e-14)


def test_a_sliding_window_bounds_the_size_by_its_width() -> None:
    q, k = _random(length=24)
    operator = SoftmaxAttention(q, k, mask=_window(24, 4))
    T = reference.attention(q, k, mask=_window(24, 4))
    reference.assert_agrees(operator, T)
    assert (tolerance_ess(operator.singular_values([12])) <= 3).all()


def test_padding_on_the_left_leaves_zero_rows_and_no_nan() -> None:
    q, k = _random()
    padded = torch.arange(14)[None, :] >= torch.tensor([[5], [0]])  # (samples, length): True for a token
    mask = padded[:, None, None, :]
    operator = SoftmaxAttention(q, k, mask=mask)
    assert operator.finite().all()
    assert (operator.materialize()[0, :, :5] == 0).all()
    reference.assert_agrees(operator, reference.attention(q, k, mask=mask))
    hidden = operator.singular_values([5])[0]  # everything before position 5 is padding
    assert (tolerance_ess(hidden) == 0).all()
    assert (entropy_ess(hidden) == 0).all()


def test_a_mask_of_minus_infinity_is_legal() -> None:
    q, k = _random()
    mask = torch.zeros(2, 1, 1, 14)
    mask[0, :, :, :3] = -torch.inf
    operator = SoftmaxAttention(q, k, mask=mask)
    assert operator.finite().all()
    reference.assert_agrees(operator, reference.attention(q, k, mask=mask))


def test_the_default_scale_is_one_over_the_root_of_the_dimension() -> None:
    q, k = _random()
    by_default = SoftmaxAttention(q, k).singular_values([7])
    torch.testing.assert_close(SoftmaxAttention(q, k, scale=6**-0.5).singular_values([7]), by_default)
    reference.assert_agrees(SoftmaxAttention(q, k, scale=2.0), reference.attention(q, k, scale=2.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_lose_nothing_beyond_their_own_rounding(dtype: torch.dtype) -> None:
    q, k = _random(dtype=dtype)
    operator = SoftmaxAttention(q, k)
    assert operator.singular_values([7]).dtype == torch.float32
    reference.assert_agrees(operator, reference.attention(q, k))


def test_work_cut_into_small_slabs_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linalg, "SLAB_ELEMENTS", 100)
    q, k = _random(key_heads=2)
    mask = torch.rand(2, 1, 14, 14) < 0.8
    reference.assert_agrees(SoftmaxAttention(q, k, mask=mask), reference.attention(q, k, mask=mask))


def test_uniform_attention_remembers_one_number() -> None:
    q, k = torch.zeros(1, 1, 40, 4), torch.zeros(1, 1, 40, 4)
    values = SoftmaxAttention(q, k).singular_values([10, 20])
    assert (tolerance_ess(values) == 1).all()
    torch.testing.assert_close(entropy_ess(values), torch.ones(1, 1, 2), rtol=1e-5, atol=0)


def _written_out(
    q: Tensor, k: Tensor, keep: Tensor, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """The whole softmax of one row after the other, with the sink as one more logit that is dropped afterwards."""
    samples, heads, length, dim = q.shape
    T = torch.zeros(samples, heads, length, length, dtype=torch.float64)
    for s in range(samples):
        for h in range(heads):
            for i in range(length):
                logits = (k.double()[s, h * k.shape[1] // heads] @ q.double()[s, h, i]) / dim**0.5
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                seen = [j for j in range(i + 1) if keep[s, h, i, j]]
                exponentials = logits[seen].exp()
                sink = 0.0 if sinks is None else sinks.double().expand(samples, heads, length)[s, h, i].exp()
                T[s, h, i, seen] = exponentials / (exponentials.sum() + sink)
    return T


@pytest.mark.parametrize("softcap", [None, 0.5, 30.0])
@pytest.mark.parametrize("sinks", [None, (1, 4, 1), (2, 4, 14), (1, 1, 1)])
@pytest.mark.parametrize("slab", [None, 100])
def test_soft_caps_and_sinks_agree_with_the_written_out_softmax(
    softcap: float | None, sinks: tuple[int, ...] | None, slab: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if slab is not None:
        monkeypatch.setattr(linalg, "SLAB_ELEMENTS", slab)
    q, k = _random(key_heads=2)
    keep = torch.rand(2, 4, 14, 14) < 0.8
    keep[0, :, :3] = False
    logits = None if sinks is None else torch.randn(sinks, dtype=torch.float64)
    operator = SoftmaxAttention(4 * q, k, mask=keep, softcap=softcap, sinks=logits)
    T = _written_out(4 * q, k, keep, softcap, logits)
    torch.testing.assert_close(operator.materialize(), T, rtol=0, atol=1e-14)
    assert (operator.materialize()[0, :, :3] == 0).all()
    reference.assert_agrees(operator, T)
    part = operator.select(samples=slice(0, 1), heads=[1, 2], length=9)
    torch.testing.assert_close(part.materialize(), T[:1, 1:3, :9, :9], rtol=0, atol=1e-14)


def test_a_sink_of_minus_infinity_is_none_and_one_that_is_not_a_number_is_found() -> None:
    q, k = _random()
    sinks = torch.tensor([-torch.inf, 0.0, torch.nan, torch.inf], dtype=torch.float64)[None, :, None]
    operator = SoftmaxAttention(q, k, sinks=sinks)
    assert operator.finite().tolist() == [[True, True, False, False]] * 2
    without = SoftmaxAttention(q, k).materialize()[:, 0]
    torch.testing.assert_close(operator.materialize()[:, 0], without, rtol=0, atol=1e-15)


def test_the_capacity_is_the_position_and_there_is_no_decay() -> None:
    operator = SoftmaxAttention(*_random())
    assert operator.state_capacity([1, 7, 13]).tolist() == [1.0, 7.0, 13.0]
    assert operator.capacity_grows
    assert operator.without_decay() is None


@pytest.mark.parametrize(
    ("q", "k", "options", "message"),
    [
        ((1, 4, 8, 3), (1, 3, 8, 3), {}, "divide the number of heads"),
        ((1, 4, 8, 3), (1, 4, 7, 3), {}, "length and dim must be equal"),
        ((2, 4, 8, 3), (3, 4, 8, 3), {}, "expected 1 or 3"),
        ((1, 4, 8, 3), (1, 4, 8, 3), {"scale": float("nan")}, "scale=nan must be a finite number"),
        ((1, 4, 8, 3), (1, 4, 8, 3), {"mask": torch.ones(8, 7)}, "does not broadcast"),
        ((1, 4, 8, 3), (1, 4, 8, 3), {"mask": torch.ones(1, 1, 1, 8, 8)}, "does not broadcast"),
        ((1, 4, 8, 3), (1, 4, 8, 3), {"mask": torch.ones(8, 8, dtype=torch.int)}, "pass bool"),
        ((1, 4, 8, 3), (1, 4, 8, 3), {"softcap": 0.0}, "softcap=0.0 must be a finite number above 0"),
        ((1, 4, 8, 3), (1, 4, 8, 3), {"sinks": torch.ones(4)}, "sinks has shape"),
        ((1, 4, 8, 3), (1, 4, 8, 3), {"sinks": torch.ones(1, 3, 1)}, "does not broadcast"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    q: tuple[int, ...], k: tuple[int, ...], options: dict[str, object], message: str
) -> None:
    with pytest.raises(OperatorError, match=message):
        SoftmaxAttention(torch.zeros(q), torch.zeros(k), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["plain", "window and cap", "sinks", "grouped keys"])
def test_a_wide_submatrix_agrees_in_blocks_of_columns(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that is larger than what is formed at once."""
    for module in (linalg, operators.attention, operators.attention_rows):
        monkeypatch.setattr(module, "SLAB_ELEMENTS", 300)
    length, positions = 64, [45, 50, 61]
    q, k = torch.randn(1, 2, length, 4, dtype=torch.float64), torch.randn(1, 2, length, 4, dtype=torch.float64)
    options: dict[str, object] = {}
    logits = q @ (k[:, :1] if kind == "grouped keys" else k).mT / 2
    if kind == "window and cap":
        options = {"mask": _window(length, 30), "softcap": 3.0}
        logits = (3.0 * (logits / 3.0).tanh()).masked_fill(~_window(length, 30), -torch.inf)
    weights = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).exp()
    total = weights.sum(-1, keepdim=True)
    if kind == "sinks":
        options, total = {"sinks": torch.full((1, 2, 1), 2.0, dtype=torch.float64)}, total + math.exp(2.0)
    attention = SoftmaxAttention(q, k[:, :1] if kind == "grouped keys" else k, **options)  # type: ignore[arg-type]
    T = (weights / total).masked_fill(total == 0, 0.0)
    reference.assert_agrees(attention, T, positions=positions)

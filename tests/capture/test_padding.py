"""A reading is of the real tokens of one sequence, however a batch holds them and whatever kernel computes it."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import padding
from benchmarks.padding import FAMILIES, FORMS, REAL, ROW
from ess_monitor import CaptureConfig, Monitor, MonitorConfig, profile
from ess_monitor.capture.hooks.call_site import Call
from ess_monitor.capture.hooks.given_tokens import Rows, TokenWatch
from ess_monitor.ess import segments
from ess_monitor.featurizers import GLA, SA
from ess_monitor.records import Reading
from tests.ess import reference

pytest.importorskip("transformers")
POSITIONS = (6, 12, 18)


def recorded(model: nn.Module, op: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of the first call of a library's function, from the tokens alone."""
    namespace = vars(sys.modules[type(model).__module__])
    function, found = namespace[op], {}

    def record(*args: Any, **kwargs: Any) -> Any:
        if not found:
            found.update(inspect.signature(function).bind(*args, **kwargs).arguments)
        return function(*args, **kwargs)

    monkeypatch.setitem(namespace, op, record)
    with torch.no_grad():
        model.eval()(**padding.inputs("alone"))
    monkeypatch.undo()
    return found


def gla(model: nn.Module, _: Any) -> tuple[Tensor, Tensor]:
    seen: list[tuple[Any, ...]] = []
    handle = model.mixer.core.register_forward_hook(lambda core, args, output: seen.append(args))
    model(**padding.inputs("alone"))
    handle.remove()
    q, k, _, log_decay = (tensor.detach() for tensor in seen[0])
    return reference.recurrence(log_decay, k, q), reference.recurrence(0 * log_decay, k, q)


def mamba2(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    given = recorded(model, "mamba2_chunk_scan", monkeypatch)
    dt, A, b, c = (given[name].double() for name in ("dt", "A", "B", "C"))
    low, high = given["dt_limit"]
    delta = nn.functional.softplus(dt + given["dt_bias"]).clamp(low, high).mT[..., None]
    b, c = b.transpose(1, 2) * delta, c.transpose(1, 2)
    log_decay = delta * A[:, None, None]
    return reference.recurrence(log_decay, b, c), reference.recurrence(0 * log_decay, b, c)


def delta_rule(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    given = recorded(model, "torch_chunk_gated_delta_rule", monkeypatch)
    q, k, g, beta = (given[name].double().transpose(1, 2) for name in ("query", "key", "g", "beta"))
    heads = g.shape[1] // k.shape[1]
    q, k = (
        x.repeat_interleave(heads, 1) * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt().repeat_interleave(heads, 1)
        for x in (q, k)
    )
    q = q * k.shape[-1] ** -0.5
    b = beta[..., None] * k
    A = reference.delta_rule(g[..., None], beta, k)
    return reference.matrix_recurrence(A, b, q), reference.recurrence(torch.zeros(1, 1, 1, 1), b, q)


def attention(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, None]:
    seen: list[Tensor] = []

    def record(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.extend((q.detach(), k.detach()))
        return function(q, k, *args, **kwargs)

    function = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", record)
    with torch.no_grad():
        padding.built("softmax attention", "sdpa").eval()(**padding.inputs("alone"))
    monkeypatch.undo()
    return reference.attention(*seen[:2]), None


REFERENCES: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "softmax attention": attention,
    "Mamba-2": mamba2,
    "GLA": gla,
    "delta rule": delta_rule,
}


def size(T: Tensor) -> float:
    counts = [(reference.singular_values(T, i) > 1e-3).sum(-1).double().mean() for i in POSITIONS]
    return float(sum(counts) / len(counts))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*flex_attention called without torch.compile")
@pytest.mark.parametrize("name", FAMILIES)
def test_the_reading_is_that_of_the_tokens_alone_in_every_form(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES[name]
    T, undecayed = REFERENCES[name](padding.built(name, family.kernels[0]), monkeypatch)
    T = T.detach()
    assert T.shape[-1] == REAL
    capacity = [8.0] * 3 if undecayed is not None else list(map(float, POSITIONS))
    far = T[..., 12 + REAL // 8 :, :].square()
    kernels = [kernel for kernel in family.kernels if kernel != "flex_attention"] + ["flex_attention"] * (
        len(family.kernels) > 1
    )
    for kernel in kernels:
        model = padding.built(name, kernel)
        for form in FORMS if kernel != "flex_attention" else FORMS[1:]:
            reading = padding.reading_of(model, padding.inputs(form, family.packed_by))
            assert (reading.status, reading.length, reading.positions) == ("ok", REAL, POSITIONS), form
            assert reading.effective_size == pytest.approx(size(T), abs=1e-9), (form, kernel)
            assert reading.state_capacity == pytest.approx(sum(capacity) / 3)
            attainable = [min(c, i, REAL - i) for c, i in zip(capacity, POSITIONS, strict=True)]
            assert reading.attainable_size == pytest.approx(sum(attainable) / 3)
            assert reading.far_share_ratio == pytest.approx(math.sqrt(far[..., :12].sum() / far.sum()), rel=1e-5)
            if undecayed is not None:
                assert reading.retention_ratio == pytest.approx(size(T) / size(undecayed.detach()))
                assert reading.effective_size_lower <= size(T) + 1.0


def test_a_monitor_that_trains_nothing_says_the_same_of_padded_rows() -> None:
    """A1: the padded layer was called collapsed, and the tokens alone were healthy."""
    model = padding.built("Mamba-2", "")
    found = [padding.condition_of(model, "", padding.inputs(form, ("seq_idx",))) for form in FORMS]
    assert found[0] == "healthy"
    assert set(found) == {"healthy"}


class Net(nn.Module):
    """One mixer below an embedding that nobody tells about padding, with the mask at the top only."""

    def __init__(self, mixer: nn.Module, calls: int = 1) -> None:
        super().__init__()
        self.embed, self.mixer, self.calls = nn.Embedding(32, 16), mixer, calls

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, rows: int = 0, **packing: Any
    ) -> Tensor:
        x = self.embed(input_ids)
        if rows:
            x = x.reshape(rows, -1, 16)
        for _ in range(self.calls):
            x = self.mixer(x)
        return x


def measured(model: nn.Module, positions: Any = 3, **given: Any) -> Reading:
    return profile(model, config=MonitorConfig(positions=positions), **given).readings[0]


def net(make: Callable[[int, int], nn.Module] = GLA, calls: int = 1) -> Net:
    torch.manual_seed(0)
    return Net(make(16, 2), calls).double()


TOKENS = torch.arange(4 * 20).reshape(4, 20) * 7 % 31


def mask_of(*lengths: int) -> Tensor:
    return (torch.arange(20) < torch.tensor(lengths)[:, None]).long()


@pytest.mark.parametrize("positions", ["midpoint", 3, "all"])
def test_rows_of_several_lengths_are_measured_at_the_same_shares_of_their_own(positions: Any) -> None:
    lengths = (20, 12, 15, 20)
    together = measured(net(), positions, input_ids=TOKENS, attention_mask=mask_of(*lengths))
    alone = [measured(net(), positions, input_ids=TOKENS[[row], :n]) for row, n in enumerate(lengths)]
    assert together.length == 12
    assert together.operators == 4 * 2
    if positions != "all":  # each row has another number of positions
        for name in ("effective_size", "attainable_size", "state_capacity", "entropy_size", "mean_decay"):
            mean = sum(getattr(reading, name) for reading in alone) / 4
            assert getattr(together, name) == pytest.approx(mean), name
    assert together.positions == alone[1].positions
    assert len(together.per_position) == len(together.positions)


def test_rows_too_short_for_a_position_are_left_out_and_nothing_but_padding_is_too_short() -> None:
    short = measured(net(), input_ids=TOKENS, attention_mask=mask_of(20, 1, 0, 2))
    assert (short.operators, short.length, short.status) == (2, 20, "ok")
    for lengths in ((1, 1, 0, 1), (0, 0, 0, 0)):
        reading = measured(net(), input_ids=TOKENS, attention_mask=mask_of(*lengths))
        assert (reading.status, reading.effective_size) == ("too_short", None)
        assert f"a sequence of {max(lengths)} token(s) (the longest in rows of 20, without padding)" in reading.message


def test_packed_rows_of_single_tokens_are_too_short() -> None:
    reading = measured(net(), input_ids=TOKENS[:1], position_ids=torch.zeros(1, 20).long())
    assert reading.status == "too_short"


def test_a_window_bounds_the_size_also_in_packed_rows() -> None:
    from benchmarks.layers.mamba import hf

    torch.manual_seed(0)
    settings = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}
    model = hf("Mistral", sliding_window=4, **settings)[0].double()
    tokens = torch.arange(ROW)[None] % 31
    whole = measured(model, input_ids=tokens)
    assert (whole.state_capacity, whole.length) == (3.0, ROW)
    packed = measured(model, "midpoint", input_ids=tokens, position_ids=(torch.arange(ROW) % 16)[None])
    assert (packed.state_capacity, packed.length, packed.operators) == (3.0, 16, 4 * 2)
    assert packed.utilization_ratio == pytest.approx(packed.effective_size / 3)


@pytest.mark.parametrize("bad", ["rows", "tokens", "tokens, and positions that fit"])
def test_padding_that_fits_no_row_of_the_layer_gives_a_reason_and_no_number(bad: str) -> None:
    model = net()
    given = {"input_ids": TOKENS, "attention_mask": mask_of(20, 9, 20, 20)}
    if bad == "rows":
        given["rows"] = 8
    else:
        given["attention_mask"] = given["attention_mask"][:, :-1]
        given |= {"position_ids": torch.arange(20)[None]} if "positions" in bad else {}
    with Monitor(model, MonitorConfig(every_n_steps=1)) as monitor:
        model(**given).sum().backward()
        monitor.step()
        monitor.flush()
        [reading] = monitor.readings
    assert (reading.status, reading.effective_size) == ("failed", None)
    assert "padding is given that cannot be assigned" in reading.message
    given["attention_mask"] = torch.ones_like(given["attention_mask"])
    assert measured(model, **given).status == "ok", "nothing is padded"


def test_a_key_padding_mask_of_torch_says_what_is_padding() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).double()
    x, causal = torch.randn(2, 20, 16, dtype=torch.float64), nn.Transformer.generate_square_subsequent_mask(20).double()
    alone = measured(model, src=x[:, :12], src_mask=causal[:12, :12], is_causal=True)
    hidden = (torch.arange(20) >= 12).expand(2, -1)
    added = torch.zeros(2, 20).double().masked_fill(hidden, -torch.inf)
    for mask, padded in ((causal < 0, hidden), (causal, added)):
        found = measured(model, src=x, src_mask=mask, src_key_padding_mask=padded, is_causal=True)
        assert (found.length, found.positions) == (12, alone.positions)
        assert found.effective_size == pytest.approx(alone.effective_size)
        assert found.state_capacity == alone.state_capacity
    packed = (torch.arange(20) < 12)[:, None] == (torch.arange(20) < 12)
    found = measured(model, src=x, src_mask=(causal < 0) | ~packed)
    assert (found.length, found.effective_size) == (12, pytest.approx(alone.effective_size))


def test_attention_that_nobody_masks_is_cut_to_the_tokens_that_the_model_says_are_real() -> None:
    """The layer attends to padding on its left: T over real tokens keeps the weights that are left."""
    model = net(SA)
    left = mask_of(14, 14, 14, 14).flip(1)
    found = measured(model, input_ids=TOKENS, attention_mask=left)
    seen: list[tuple[Any, ...]] = []
    handle = model.mixer.core.register_forward_hook(lambda core, args, output: seen.append(args))
    model(TOKENS)
    handle.remove()
    q, k, _, scale = seen[0]
    T = reference.attention(q.detach(), k.detach(), scale)[..., 6:, 6:]
    counts = [(reference.singular_values(T, i) > 1e-3).sum(-1).double().mean() for i in found.positions]
    assert found.effective_size == pytest.approx(float(sum(counts) / len(counts)))


def test_convolutions_are_as_long_as_the_longest_sequence() -> None:
    torch.manual_seed(0)

    class Filter(nn.Module):
        def __init__(self, groups: int) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 6, groups=groups)

        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.conv(nn.functional.pad(x.mT, (5, 0)))

    for groups in (4, 2):
        model, x = Filter(groups), torch.randn(4, 20, 4)
        alone = measured(model, x=x[:, :7])
        padded = measured(model, x=x, attention_mask=mask_of(7, 7, 7, 7).flip(1))
        assert (padded.status, padded.length) == ("ok", 7)
        assert padded.effective_size == pytest.approx(alone.effective_size)
        assert measured(model, x=x, attention_mask=mask_of(20, 7, 7, 7)).length == 7


def test_a_block_that_is_called_several_times_says_so_and_its_first_call_is_measured() -> None:
    once, looped = (measured(net(calls=calls), input_ids=TOKENS) for calls in (1, 3))
    assert (once.calls, looped.calls) == (1, 3)
    assert looped.effective_size == once.effective_size
    model = net(calls=2)
    with Monitor(model, MonitorConfig(every_n_steps=1, capture=CaptureConfig(heads=None))) as monitor:
        for _ in range(2):  # micro-batches of one step
            model(TOKENS).sum().backward()
        monitor.step()
        monitor.flush()
        [reading] = monitor.readings
    assert reading.calls == 2


# Forms of arguments


def tokens_of(
    given: dict[str, Any], batch: int = 2, length: int = 6, **options: Any
) -> list[list[segments.Span]] | None:
    layer = nn.Identity()
    call = Call(layer, layer, "op", kwargs=given)
    found = TokenWatch().segments(call, Rows(batch, length, **{"samples": slice(batch), "tokens": length, **options}))
    return None if found is None else segments.spans(found)


REAL_6 = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
LEFT_AND_RIGHT = [[(2, 6)], [(0, 5)]]


@pytest.mark.parametrize(
    "given",
    [
        {"attention_mask": REAL_6},
        {"attention_mask": REAL_6.bool()},
        {"attention_mask": REAL_6.float()},
        {"attention_mask": (1 - REAL_6) * -1e9},
        {"attention_mask": (1 - REAL_6)[:, None, None] * torch.finfo(torch.float32).min},
        {"attn_mask": (REAL_6.bool()[:, None, None] & torch.ones(6, 6).bool().tril()).expand(2, 3, -1, -1)},
        {"key_padding_mask": REAL_6 == 0},
        {"key_padding_mask": torch.zeros(2, 6).masked_fill(REAL_6 == 0, -torch.inf)},
        {"seq_idx": REAL_6.int() - 1},
        {"attention_mask": REAL_6, "position_ids": torch.arange(6)[None]},
    ],
)
def test_every_form_of_a_mask_says_which_tokens_are_real(given: dict[str, Any]) -> None:
    assert tokens_of(given) == LEFT_AND_RIGHT
    assert tokens_of(given, samples=slice(1), tokens=4) == [[(2, 4)]]
    assert tokens_of(given, samples=slice(1, 2)) == [[(0, 5)]]


def test_what_is_given_of_other_tokens_is_not_used() -> None:
    assert tokens_of({}) is None
    assert tokens_of({"attention_mask": REAL_6[:, None], "position_ids": torch.zeros(3, 2, 6)}, length=5) is None
    assert tokens_of({"cu_seqlens": torch.tensor([0, 2, 6])}) is None, "of a row that holds both samples"
    assert tokens_of({"cu_seqlens": torch.tensor([0, 2, 6])}, batch=1) == [[(0, 2), (2, 6)]]
    assert tokens_of({"key_padding_mask": REAL_6[1] == 0}, batch=1) == [[(0, 5)]], "without a batch"
    packed = {"cu_seqlens": torch.tensor([0, 4, 9]), "attention_mask": REAL_6}
    assert tokens_of(packed, batch=1, length=9) == [[(0, 4), (4, 9)]], "the layer has left out the padding itself"


def test_the_mask_of_an_encoder_says_nothing_of_a_decoder() -> None:
    watch, decoder = TokenWatch(), nn.Linear(2, 2)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = decoder

        def forward(self, attention_mask: Tensor, decoder_attention_mask: Tensor | None = None) -> Tensor:
            return self.decoder(torch.zeros(2, 6, 2))

    for given, found in (((REAL_6,), None), ((1 - REAL_6, REAL_6), LEFT_AND_RIGHT)):
        model = Both()
        handle = watch.watch(model, [decoder])
        model(*given)
        result = watch.segments(Call(decoder, decoder), Rows(2, 6, slice(2), 6))
        assert (None if result is None else segments.spans(result)) == found
        handle.remove()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_flex_masks_and_batches_in_a_dictionary_are_read() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    start = torch.tensor([2, 0])
    block = create_block_mask(lambda b, h, q, k: (k <= q) & (k >= start[b]), 2, None, 6, 6, device="cpu")
    assert tokens_of({"attention_mask": block}) == [[(2, 6)], [(0, 6)]]
    watch, layer = TokenWatch(), nn.Identity()
    handle = watch.watch(layer, [layer])
    layer({"attention_mask": REAL_6})
    found = watch.segments(Call(layer, layer), Rows(2, 6, slice(2), 6))
    assert found is not None
    assert segments.spans(found) == LEFT_AND_RIGHT
    handle.remove()

"""What is seen of sequences that are longer than 1024 tokens, and how much of them is held."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from ess_monitor import CaptureConfig, ConfigError, MonitorConfig, profile
from ess_monitor.capture import Captured, Sampler, find_layers
from ess_monitor.capture.hooks.call_site import Call
from ess_monitor.capture.hooks.given_tokens import Rows, TokenWatch
from ess_monitor.capture.rotation import Size, fitting, part_of
from ess_monitor.capture.spec import LazyOperator
from ess_monitor.ess import DiagonalRecurrence, operator_positions, segments
from ess_monitor.ess.operators.reduced import ReducedRecurrence
from ess_monitor.featurizers import GLA, SA
from ess_monitor.pipeline.readings import compute, reading, reduce_long
from ess_monitor.records import Reading

LENGTH = 1200
MEBIBYTE = 2**20


def gated(log_decay: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """T of one head in float64, (length, length), from sums of log decays since the start."""
    since_start = log_decay.double().cumsum(0)
    T = torch.zeros(len(b), len(b), dtype=torch.float64)
    for n in range(b.shape[1]):
        both = torch.outer(c[:, n].double(), b[:, n].double())
        T += both * (since_start[:, None, n] - since_start[None, :, n]).tril().exp()
    return torch.where(T.abs() < 1e-30, 0.0, T).tril()  # subnormal numbers are slow


def attention(q: Tensor, k: Tensor) -> Tensor:
    """T of one head in float64."""
    logits = q.double() @ k.double().mT * q.shape[-1] ** -0.5
    return logits.masked_fill(~torch.ones_like(logits).tril().bool(), -torch.inf).softmax(-1)


def ess(T: Tensor, i: int) -> int:
    """Singular values above 1e-3, the squares of which are eigenvalues far above the rounding of H H^T here."""
    H = T[i:, :i] if 2 * i > len(T) else T[i:, :i].mT
    return int((torch.linalg.eigvalsh(H @ H.mT) > 1e-6).sum())


def sampled(model: nn.Module, x: Tensor, turn: int = 0, **settings: object) -> tuple[Captured, Reading]:
    item = captured(model, x, turn, **settings)
    return item, reading(0, item, 1e-3, compute(item, 3, 1e-3))


def captured(model: nn.Module, x: Tensor, turn: int = 0, **settings: object) -> Captured:
    """The only layer of a model in sample number `turn`."""
    sampler = Sampler(find_layers(model), CaptureConfig(**{"source": "validation", **settings}))
    sampler.turn = turn
    sampler.arm()
    with torch.no_grad():
        model(x)
    (item,) = sampler.collect()
    assert isinstance(item, Captured)
    return item


def held(item: Captured) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in item.operator.tensors)


@pytest.fixture
def seen() -> dict[str, tuple[Tensor, ...]]:
    return {}


def watched(mixer: nn.Module, seen: dict[str, tuple[Tensor, ...]]) -> nn.Module:
    mixer.core.register_forward_hook(lambda module, args, output: seen.update(args=args))
    return mixer


def test_a_long_recurrence_is_seen_whole(seen: dict[str, tuple[Tensor, ...]]) -> None:
    """It was cropped to its first 1024 tokens."""
    item, measured = sampled(watched(GLA(8, 2), seen), torch.randn(1, LENGTH, 8))
    q, k, _, log_decay = seen["args"]
    assert (measured.length, measured.row_length, measured.positions) == (LENGTH, LENGTH, (300, 600, 900))
    T = [gated(log_decay[0, h], k[0, h], q[0, h]) for h in range(2)]
    assert item.heads == (0, 1)
    for p, i in enumerate(measured.positions):
        assert measured.per_position[p] == pytest.approx(sum(ess(one, i) for one in T) / 2)


@pytest.mark.parametrize(("length", "operators"), [(1200, (4, 4)), (2700, (2, 4)), (6000, (1, 3)), (12_000, (1, 1))])
def test_samples_step_down_and_then_heads_so_that_the_copy_fits(length: int, operators: tuple[int, int]) -> None:
    """4 state dimensions in float32 are 48 bytes a token."""
    item = captured(GLA(16, 4), torch.randn(4, length, 16), max_bytes=MEBIBYTE)
    assert (item.operator.batch, item.operator.heads, item.operator.length) == (*operators, length)
    assert held(item) <= MEBIBYTE


def test_a_sequence_that_does_not_fit_is_seen_as_far_as_the_bytes_reach() -> None:
    item, measured = sampled(GLA(8, 2), torch.randn(2, 30_000, 8), max_bytes=MEBIBYTE)
    assert (item.operator.batch, item.operator.heads) == (1, 1)
    assert 0.99 * MEBIBYTE < held(item) <= MEBIBYTE
    assert measured.length == MEBIBYTE // 48 < measured.row_length == 30_000


@pytest.mark.parametrize("make", [GLA, SA])
def test_up_to_1024_tokens_nothing_is_chosen_by_size(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = make(16, 4), torch.randn(8, 1024, 16)
    every, first = captured(model, x, 3, max_bytes=MEBIBYTE), captured(model, x, 3, max_length=1024)
    assert every.heads == first.heads
    pairs = zip(every.operator.tensors, first.operator.tensors, strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_number_of_tokens_is_a_limit_for_every_layer() -> None:
    item, measured = sampled(GLA(8, 2), torch.randn(2, LENGTH, 8), max_length=600)
    assert (item.operator.batch, measured.length, measured.row_length) == (2, 600, LENGTH)
    item, measured = sampled(SA(8, 2), torch.randn(2, LENGTH, 8), 5, max_length=600)
    assert (measured.length, measured.positions) == (600, (150, 300, 450))


def test_rows_of_attention_are_another_part_in_each_sample(seen: dict[str, tuple[Tensor, ...]]) -> None:
    """They were the first 1024 in all of them."""
    model, x = watched(SA(4, 2), seen), torch.randn(1, LENGTH, 4)
    ends = set()
    for turn in (0, 1, 2):
        item, measured = sampled(model, x, turn, samples=1, heads=1)
        q, k = seen["args"][:2]
        (head,) = item.heads
        T = attention(q[0, head], k[0, head])[: measured.length, : measured.length]
        start = measured.length - 1024
        assert measured.positions == (start + 256, start + 512, start + 768)
        assert measured.per_position == tuple(ess(T, i) for i in measured.positions)
        assert measured.state_capacity == start + 512
        assert captured(model, x, turn, samples=1, heads=1).operator.length == measured.length
        ends.add(measured.length)
    assert min(ends) == 1024
    assert len(ends) == 3
    assert max(ends) <= LENGTH


def test_the_middle_of_the_rows_of_attention_is_what_the_spectrum_is_of() -> None:
    model, x = SA(4, 1), torch.randn(1, LENGTH, 4)
    item, measured = sampled(model, x, 1)
    T = item.operator.materialize()[0, 0].double()
    values = torch.linalg.svdvals(T[measured.positions[1] :, : measured.positions[1]])
    assert measured.spectrum[0] == pytest.approx(float(values[0]), rel=1e-4)
    assert measured.minimum_effective_size == measured.per_position[1]
    far = T[measured.positions[1] + 128 :]
    share = float((far[:, : measured.positions[1]].square().sum() / far.square().sum()).sqrt())
    assert measured.far_share_ratio == pytest.approx(share, rel=1e-5)


def test_a_short_sequence_in_a_long_row_of_attention_is_seen_to_its_end() -> None:
    """The window is of the row, and a sequence in it may end before."""

    model, x = Padded(SA(4, 1)), torch.randn(1, LENGTH, 4)
    mask = (torch.arange(LENGTH) < 1100)[None]
    sampler = Sampler(find_layers(model), CaptureConfig(source="validation"), model=model)
    sampler.turn = 1
    sampler.arm()
    with torch.no_grad():
        model(x, attention_mask=mask)
    (item,) = sampler.collect()
    assert isinstance(item, Captured)
    measured = reading(0, item, 1e-3, compute(item, 3, 1e-3))
    assert item.operator.length > 1100
    assert (measured.length, measured.positions) == (1100, (76 + 256, 76 + 512, 76 + 768))


def test_all_positions_of_the_rows_of_attention_are_counted_from_the_first_of_them() -> None:
    item, _ = sampled(SA(4, 1), torch.randn(1, 1028, 4), 1)
    item = Captured(item.layer, item.operator.select(length=1024), item.heads, 1, window=6)
    results = compute(item, "all", 1e-3)
    assert results["positions"].tolist() == [list(range(1019, 1024))]
    assert compute(item, "midpoint", 1e-3)["positions"].tolist() == [[1021]]


def test_layers_that_take_other_rows_get_the_segments_of_these() -> None:
    """The first layer's were handed to all others."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    watch, module = TokenWatch(), nn.Linear(1, 1)
    call = Call(module, module, kwargs={"attention_mask": mask})
    found = [watch.segments(call, Rows(2, 4, slice(row, row + 1), 4)) for row in range(2)]
    assert [one.tolist() for one in found if one is not None] == [[[0, 0, 0, 0]], [[0, 0, -1, -1]]]


@pytest.mark.parametrize("token_bytes", [1, 8, 768, 5000])
@pytest.mark.parametrize("length", [1025, 5000, 131_072, 2**20])
def test_what_is_planned_fits(token_bytes: int, length: int) -> None:
    wanted = Size(4, 4, length)
    size = fitting(wanted, token_bytes, MEBIBYTE)
    assert size.samples * size.heads * size.length * token_bytes <= MEBIBYTE
    assert all(some <= most for some, most in zip(size, wanted, strict=True))
    if size.length < length:
        assert (size.samples, size.heads) == (1, 1)
    if size.heads < 4:
        assert size.samples == 1


def test_a_profile_sees_the_whole_recurrence() -> None:
    (measured,) = profile(GLA(8, 2), torch.randn(1, 1100, 8), config=MonitorConfig(positions="midpoint")).readings
    assert (measured.length, measured.row_length, measured.positions) == (1100, 1100, (550,))


def test_flex_masks_of_long_rows_are_asked_for_neighbors_alone() -> None:
    """All entries were computed: for 131,072 tokens 17 GB."""
    length = 9000
    document = torch.tensor([[0] * 4000 + [1] * 4990 + [2] * 10, [0] * length])
    real = torch.tensor([[1] * length, [1] * 8000 + [0] * 1000]).bool()

    def keep(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (document[b, q] == document[b, k]) & real[b, q] & real[b, k]

    block = SimpleNamespace(mask_mod=keep, shape=(2, 1, length, length), kv_num_blocks=torch.zeros(1))
    call = Call(nn.Identity(), nn.Identity(), kwargs={"attention_mask": block})
    found = TokenWatch().segments(call, Rows(2, length, slice(2), length))
    assert found is not None
    assert segments.spans(found) == [[(0, 4000), (4000, 8990), (8990, 9000)], [(0, 8000)]]


class Padded(nn.Module):
    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.mixer(x)


def both_profiles(
    model: nn.Module, x: Tensor, mask: Tensor | None = None, **settings: object
) -> tuple[Reading, Reading]:
    """Of one row and head: held within 1 MiB, and whole."""
    few = {"samples": 1, "heads": 1}
    capture = (CaptureConfig(max_bytes=MEBIBYTE, **few), CaptureConfig(max_length=None, **few))
    configs = (MonitorConfig(capture=each, **settings) for each in capture)
    one, other = (profile(model, x, attention_mask=mask, config=config).readings[0] for config in configs)
    return one, other


@pytest.mark.parametrize("scale", ["absolute", "output"])
def test_what_does_not_fit_is_reduced_to_what_is_measured_of_it(scale: str) -> None:
    """It was cropped to what fits."""
    length = 25_000
    model, x = Padded(GLA(8, 2)), torch.randn(1, length, 8)
    reduced, whole = both_profiles(model, x, tolerance_scale=scale)
    assert (reduced.status, reduced.length) == ("ok", length)
    for name, value in whole.model_dump().items():
        if isinstance(value, float):
            assert getattr(reduced, name) == pytest.approx(value, rel=1e-5), name
        elif name not in ("effective_size_at", "per_head", "per_position", "spectrum"):
            assert getattr(reduced, name) == value, name
    assert reduced.per_position == whole.per_position
    assert reduced.spectrum == pytest.approx(whole.spectrum, rel=1e-3)


@pytest.mark.parametrize("positions", [1, "midpoint", 5])
def test_a_reduced_row_is_that_of_its_longest_sequence(positions: object) -> None:
    mask = (torch.arange(30_000) >= 4000)[None]
    reduced, whole = both_profiles(Padded(GLA(8, 2)), torch.randn(1, 30_000, 8), mask, positions=positions)
    assert (reduced.length, reduced.row_length) == (26_000, 30_000)
    assert (reduced.positions, reduced.per_position) == (whole.positions, whole.per_position)


def test_a_reduced_row_without_a_real_token_is_too_short() -> None:
    mask = torch.zeros(1, 30_000, dtype=torch.bool)
    reduced, _ = both_profiles(Padded(GLA(8, 2)), torch.randn(1, 30_000, 8), mask)
    assert reduced.status == "too_short"


def test_all_positions_of_a_reduced_row_are_as_many_as_are_bounded() -> None:
    operator = DiagonalRecurrence(torch.zeros(1, 1, 1, 1), torch.randn(1, 1, 200, 256), torch.randn(1, 1, 200, 256))
    few = reduce_long(operator, "all")
    assert isinstance(few, ReducedRecurrence)
    assert few.positions == operator_positions(200, 32)
    assert few.cores.numel() * 16 == 2**25


def test_nothing_of_a_reduced_row_belongs_to_the_training() -> None:
    model, x = GLA(8, 2), torch.randn(1, 25_000, 8)
    sampler = Sampler(
        find_layers(model), CaptureConfig(max_bytes=MEBIBYTE), reduce=lambda operator: reduce_long(operator, 3)
    )
    sampler.arm()
    model(x).sum().backward()
    (item,) = sampler.collect()
    assert isinstance(item, Captured)
    assert isinstance(item.operator, ReducedRecurrence)
    assert not any(tensor.requires_grad for tensor in item.operator.tensors)
    assert held(item) < 2000


def formed(samples: slice, heads: Sequence[int], length: int) -> DiagonalRecurrence:
    """36 bytes for each token."""
    features = torch.zeros(len(range(4)[samples]), len(heads), length, 4)
    return DiagonalRecurrence(features[..., :1], features, features)


@pytest.mark.parametrize(
    ("share", "taken"), [(1.0, (1, 200_000, 116_508)), (0.5, (1, 200_000, 58_254)), (0.0, (1, 29_127, None))]
)
def test_after_memory_ran_out_less_of_a_long_sequence_is_held(share: float, taken: tuple[int, int, int | None]) -> None:
    part = part_of(
        LazyOperator(4, 4, 200_000, formed), CaptureConfig(max_bytes=4 * MEBIBYTE), share, 0, can_reduce=True
    )
    assert (len(part.heads), part.length, part.fits) == taken


@pytest.mark.parametrize(
    ("forming_bytes", "taken"), [(0, (1, 8000)), (1024, (1, 4096)), (2048, (1, 2048)), (2**20, (1, 1024))]
)
def test_an_operator_that_is_formed_from_the_whole_layer_is_formed_in_part(
    forming_bytes: int, taken: tuple[int, int]
) -> None:
    whole = LazyOperator(4, 1, 8000, formed, forming_bytes=forming_bytes)
    part = part_of(whole, CaptureConfig(max_bytes=MEBIBYTE), 1.0, 0, can_reduce=True)
    assert (len(range(4)[part.samples]), part.length, part.fits) == (*taken, None)


@pytest.mark.parametrize(("length", "taken"), [(2048, (4, 4)), (4096, (2, 4)), (20_000, (1, 1)), (100_000, (1, 1))])
def test_longer_sequences_are_at_most_twice_the_tokens_of_short_ones(length: int, taken: tuple[int, int]) -> None:
    part = part_of(LazyOperator(4, 4, length, formed), CaptureConfig(), 1.0, 0)
    assert (len(range(4)[part.samples]), len(part.heads), part.length) == (*taken, length)


@pytest.mark.parametrize(("given", "read"), [("512", 512), ("auto", "auto"), ("1", None), ("whole", None)])
def test_the_limit_is_a_number_or_auto_in_the_environment_too(
    given: str, read: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESS_MONITOR_CAPTURE__MAX_LENGTH", given)
    if read is None:
        with pytest.raises(ConfigError, match=r"capture\.max_length"):
            MonitorConfig.load()
    else:
        assert MonitorConfig.load().capture.max_length == read

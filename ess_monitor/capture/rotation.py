"""Choose the heads, rows and tokens of a sample, and how many of them, so that all have their turn.

The choice depends on shapes and the number of the sample alone: a resumed run and all ranks make the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple, Protocol

from pydantic import Field
from torch import nn

from ess_monitor.capture.causality.claims import collecting
from ess_monitor.capture.spec import CaptureSpec, LazyOperator
from ess_monitor.ess import Operator, SoftmaxAttention
from ess_monitor.ess.cost import SampleShape, state_of
from ess_monitor.ess.operators.recurrence import Recurrence
from ess_monitor.ess.positions import Positions
from ess_monitor.validation.settings import Settings

SHORT = 1024
"""Tokens of a sequence that is taken whole whatever its kind, and of a crop of a longer one."""

_LEAST_BYTES = 2**20
"""What is held of a long sequence where memory has run out."""

ATTENTION_KEYS = 2**14
"""Tokens up to which attention is looked at: with 1024 rows as many entries as 16 operators of 1024 tokens."""


class CaptureConfig(Settings):
    """Sets how much of one forward pass is copied.

    With the defaults a layer of 1024 tokens takes 0.02 s (GLA, n = 16) to 1 s (delta rule, n = 128) of one core and 3
    to 16 MB; `describe` says it of a model, and `runtime.sample_seconds` limits it.
    """

    samples: int = Field(default=4, ge=1)
    """Sequences of the batch, rotating through all of its rows over the samples. The paper averages over 8; 4 with 4
    heads gives as many operators at half the memory."""
    heads: int | None = Field(default=4, ge=1)
    """Heads (or channels) per layer and sample, rotating through all of them over the samples; None takes all."""
    max_length: Annotated[int, Field(ge=2)] | Literal["auto"] | None = "auto"
    """Tokens from the start of the sequence: of a padded or packed row, from that of its longest one (on an accelerator
    it is looked for in the first 8192 tokens of the row). T is causal, so the crop is the exact operator of a shorter
    sequence; None takes the whole sequence. "auto", because collapse shows with length: up to 1024 tokens all; of
    longer sequences a recurrence is taken whole, in as many samples and heads as `max_bytes` and twice the tokens of
    short ones allow; of attention 1024 rows with all keys before them, at another place in each sample (within 16,384
    tokens); of other kinds 1024 tokens."""
    max_bytes: int = Field(default=64 * 2**20, ge=2**20)
    """Bytes of one layer that a sample holds, where `max_length` is "auto" and sequences are longer than 1024 tokens.
    64 MB are 87,000 tokens of one head of GLA with n = 64 in float32. On the host longer recurrences are reduced to
    what is measured of them as they are read; of tensors of an accelerator the first tokens are taken that fit."""
    unknown: Literal["skip", "jacobian"] = "skip"
    """What becomes of a layer that mixes tokens and that no reader knows (LSTM, GRU, a class of your own). "skip": it
    is listed with the reason. "jacobian": a copy is linearized at the sampled input, and its memory is the rank of
    d y[i:] / d u[:i] (`ess_monitor.ess.JacobianOperator`). It costs hundreds of forward passes of the layer, beside the
    training, and the interval between samples stretches to keep the budget; `positions: midpoint` takes a third."""
    source: Literal["train", "validation", "random_tokens"] = "train"
    """What is sampled: batches the model trains on (the forward pass that gets a backward pass; no rollout, evaluation
    or teacher, in whatever mode), batches it is validated on, or random tokens that are sent through it for this
    purpose (models with a token embedding; costs a forward pass of `samples` sequences). Data with few
    distinct tokens cap the ESS; random ones lift the cap: collapsed WLA runs show .15-.18 of TSS, rescued ones .6."""


def rotate_heads(total: int, take: int | None, turn: int) -> tuple[int, ...]:
    """Return `take` evenly spaced heads of `total`, shifted by one with every `turn`, so that each has its turn.

    >>> rotate_heads(8, 4, 0), rotate_heads(8, 4, 1), rotate_heads(2, 4, 5)
    ((0, 2, 4, 6), (1, 3, 5, 7), (0, 1))
    """
    if take is None or take >= total:
        return tuple(range(total))
    return tuple(sorted({(turn + k * total // take) % total for k in range(take)}))


def rotate_rows(total: int, take: int, turn: int) -> slice:
    """Return `take` evenly spaced rows of `total`, shifted by one with every `turn`, so that each has its turn.

    A slice, because it makes a view: nothing but the rows is ever copied.

    >>> rotate_rows(8, 4, 0), rotate_rows(8, 4, 1), rotate_rows(2, 4, 5)
    (slice(0, 7, 2), slice(1, 8, 2), slice(0, 2, 1))
    """
    take = min(take, total)
    apart = total // take
    reach = (take - 1) * apart + 1
    start = turn % (total - reach + 1)
    return slice(start, start + reach, apart)


def rotate_window(length: int, take: int, turn: int) -> int:
    """Return where a window of `take` tokens ends: anywhere in the sequence, evenly over many turns, in no period.

    The first one is at the start. Multiples of the golden ratio fall into the gaps that the earlier ones left, whatever
    the numbers of heads and rows that rotate beside it.

    >>> [rotate_window(4096, 1024, turn) for turn in range(4)]
    [1024, 2923, 1749, 3648]
    """
    share = turn * 0x9E3779B97F4A7C15 % 2**64
    return take + (share * (length - take + 1) >> 64)


def share_of(count: int, share: float) -> int:
    """Return `share` of `count`, and at least one.

    >>> share_of(4, 1.0), share_of(5, 0.5), share_of(4, 0.0)
    (4, 2, 1)
    """
    return max(1, int(count * share))


class Size(NamedTuple):
    """How much is copied of one layer."""

    samples: int
    heads: int
    length: int
    """Tokens from the start of the sequence."""

    def described(self, wanted: Size) -> str:
        """Return what is left out of what the settings ask for; empty where nothing is.

        >>> Size(1, 4, 512).described(Size(4, 4, 1024))
        '1 of 4 sequences, the first 512 of 1024 tokens'
        """
        counts = zip(self[:2], wanted[:2], ("sequences", "heads"), strict=True)
        parts = [f"{mine} of {asked} {name}" for mine, asked, name in counts if mine < asked]
        if self.length < wanted.length:
            parts.append(f"the first {self.length} of {wanted.length} tokens")
        return ", ".join(parts)


Fit = Callable[[Size, int | None], SampleShape | None]
"""From what is to be copied, and the tokens at its end among which positions are placed, to what there is time for."""


class Turns(Protocol):
    """Says which layers a sample has time for, and for how much of each (`ess_monitor.runtime.turns`)."""

    @property
    def positions(self) -> Positions:
        """Where layers are measured."""

    def choose(self, names: Sequence[str]) -> Collection[str]:
        """Return the layers of the next sample."""

    def fit(self, name: str, shape: SampleShape) -> SampleShape | None:
        """Return what is measured of a layer in this sample; None where there is no time for it."""

    def turn_of(self, name: str, sample: int) -> int:
        """Return how many turns a layer has had, after so many samples."""

    def defer(self, names: Sequence[str]) -> None:
        """Count a sample that had no time for these layers."""


class EveryLayer:
    """Has time for all."""

    positions: Positions = "midpoint"

    def choose(self, names: Sequence[str]) -> Collection[str]:
        return names

    def fit(self, name: str, shape: SampleShape) -> SampleShape | None:
        return shape

    def turn_of(self, name: str, sample: int) -> int:
        return sample

    def defer(self, names: Sequence[str]) -> None:
        return None


USUAL_STATE = 64
"""Dimensions of an attention head, and whatever else is known only once an operator is formed."""


def kind_of(whole: Operator | LazyOperator, spec: CaptureSpec, module: nn.Module) -> tuple[str, int]:
    """Return the `operator` and the `state` of the shape of a layer's operator (`SampleShape`)."""
    if isinstance(whole, LazyOperator):
        return spec.operator, spec.state_capacity(module) or whole.state or USUAL_STATE
    return type(whole).__name__, state_of(whole)


def fitting(wanted: Size, token_bytes: int, max_bytes: int) -> Size:
    """Return the largest part of `wanted` within `max_bytes`, of `token_bytes` for each token of one sample and head.

    Samples step down first, then heads, then tokens.

    >>> fitting(Size(4, 4, 4096), 768, 2**26), fitting(Size(4, 4, 16384), 768, 2**26)
    (Size(samples=4, heads=4, length=4096), Size(samples=1, heads=4, length=16384))
    >>> fitting(Size(4, 4, 65536), 768, 2**26), fitting(Size(4, 4, 2**20), 768, 2**26)
    (Size(samples=1, heads=1, length=65536), Size(samples=1, heads=1, length=87381))
    """
    tokens = max_bytes // max(1, token_bytes)
    return _stepped_down(wanted, tokens // wanted.length)._replace(length=max(2, min(wanted.length, tokens)))


@dataclass(frozen=True)
class Part:
    """Says what a sample takes of one layer."""

    samples: slice
    heads: tuple[int, ...]
    length: int
    """Tokens from the start of the sequence."""
    window: int | None = None
    """Tokens at the end of these among which positions are placed. None: all."""
    fits: int | None = None
    """Tokens that may be held, where `length` is more. None: all may be."""
    shape: SampleShape | None = None
    """What its measurement is estimated to cost."""
    left_out: str = ""
    """What there was no time for."""


def part_of(
    whole: Operator | LazyOperator,
    config: CaptureConfig,
    share: float,
    turn: int,
    *,
    can_reduce: bool = False,
    fit: Fit | None = None,
) -> Part | None:
    """Return what a sample takes of an operator; None where there is no time for it.

    Args:
        whole: the operator of all samples, heads and tokens.
        config: how much of it at most.
        share: of the samples, heads and bytes of `config`; 0 for one of each, and 1 MB.
        turn: number of the sample.
        can_reduce: whether a recurrence of which a single head is too long to be held can be reduced as it is read.
        fit: says what there is time for. None: for all.
    """
    most = whole.heads if config.heads is None else min(config.heads, whole.heads)
    limit = config.max_length if isinstance(config.max_length, int) else whole.length
    samples = share_of(min(config.samples, whole.batch), share)
    size, window, fits = Size(samples, share_of(most, share), min(limit, whole.length)), None, None
    if config.max_length == "auto" and whole.length > SHORT:
        max_bytes = max(_LEAST_BYTES, int(config.max_bytes * share))
        formed = _formable(whole, size, max_bytes)
        size, window = _of_long(whole, formed, turn, max_bytes)
        if can_reduce and share > 0 and window is None and SHORT < size.length < formed.length:
            size, fits = size._replace(length=formed.length), size.length
    shape, wanted = None if fit is None else fit(size, window), size
    if shape is not None:
        size = Size(shape.samples, shape.heads, shape.length)
        fits = None if fits is None or size.length <= fits else fits
    elif fit is not None:
        return None
    heads, rows = rotate_heads(whole.heads, size.heads, turn), rotate_rows(whole.batch, size.samples, turn)
    return Part(rows, heads, size.length, window, fits, shape, size.described(wanted))


def _formable(whole: Operator | LazyOperator, wanted: Size, max_bytes: int) -> Size:
    """Return the part of `wanted` that is formed in four times the bytes, 1024 tokens of one sample at least."""
    tokens = 4 * max_bytes // max(1, getattr(whole, "forming_bytes", 0))
    length = min(wanted.length, max(SHORT, tokens))
    return wanted._replace(length=length, samples=max(1, min(wanted.samples, tokens // length)))


def _of_long(whole: Operator | LazyOperator, wanted: Size, turn: int, max_bytes: int) -> tuple[Size, int | None]:
    crop = wanted._replace(length=SHORT)
    if getattr(whole, "is_indivisible", False) or getattr(whole, "shift_invariant", False):
        return crop, None
    with collecting():  # statements about two tokens are not those that count
        two = whole.select(samples=slice(1), heads=(0,), length=2)
    # Tokens of all operators, so that the time is at most twice that of short ones.
    most = 2 * SHORT * wanted.samples * wanted.heads
    if isinstance(two, Recurrence):
        token = sum(tensor.nbytes for tensor in two.tensors if tensor.shape[2] == 2) // 2
        return _stepped_down(fitting(wanted, token, max_bytes), most // wanted.length), None
    if not isinstance(two, SoftmaxAttention):
        return crop, None
    token = (two.q.nbytes + two.k.nbytes) // 2
    square = 0 if two.mask is None or two.mask.shape[2] == 1 else two.mask.element_size()
    reach = min(wanted.length, ATTENTION_KEYS)
    while reach > SHORT and reach * (token + square * reach) > max_bytes:
        reach = max(SHORT, reach // 2)
    size = _stepped_down(wanted, min(most, max_bytes // (token + square * reach)) // reach)
    return size._replace(length=rotate_window(reach, SHORT, turn)), SHORT


def _stepped_down(wanted: Size, operators: int) -> Size:
    """Return fewer samples, then fewer heads, which differ more, so that there are at most so many operators."""
    heads = max(1, min(wanted.heads, operators))
    return wanted._replace(samples=max(1, min(wanted.samples, operators // heads)), heads=heads)

"""Derive which tokens of a call are real, and which segment each belongs to.

The layer's op is often the last to know: models turn a mask of (batch, length) into other forms, use it once at the
top, or leave it out where a kernel needs none. In a sampled forward pass hooks therefore note what the modules around
the measured layers were given. All of it that fits the rows and tokens of a call holds together: a token that one of
them calls padding is padding. `ess_monitor.ess.segments` says what each form means.

This is the one place where adapters and the sampler learn of padding and packing.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ess_monitor.capture.hooks.call_site import Call, HookHandle, ModuleHook, tensors_in
from ess_monitor.capture.hooks.token_ids import NO_IDS, SHARED, are_separators, ids_among, of_rows
from ess_monitor.capture.spec import LazyOperator
from ess_monitor.ess import Convolution, Operator
from ess_monitor.ess import segments as forms
from ess_monitor.ess.operators.windows import at_tokens, joined

logger = logging.getLogger("ess_monitor")

Named = Mapping[str, Any]
"""Arguments of a call by their names."""

_MASKS = ("attention_mask", "attn_mask", "mask", "src_mask", "tgt_mask", "causal_mask", "block_mask")
"""Masks in which True, or a number other than 0, keeps. Of (batch, length), or for queries and keys."""
_PADDING = ("key_padding_mask", "src_key_padding_mask", "tgt_key_padding_mask", "padding_mask", "pad_mask")
"""Masks of (batch, length) in which True is padding; floating ones are added to the logits."""
_ENDS = ("cu_seqlens", "cu_seqlens_q", "cu_seq_lens", "cu_seq_lens_q")
_NUMBERS = ("seq_idx", "document_ids", "segment_ids")
_POSITIONS = ("position_ids",)
_NAMES = frozenset((*_MASKS, *_PADDING, *_ENDS, *_NUMBERS, *_POSITIONS))
_LOOKED_AT = 8192
"""Tokens of a row in which its longest sequence is looked for on an accelerator, where the host does not know where it
begins: up to there the operator is formed, one row at a time. Also those up to which every entry of a mask of flex
attention is computed."""
_OF_A_DECODER = "decoder_"
"""Where a module has arguments with this prefix, those without it are of the encoder."""


@dataclass(frozen=True)
class Rows:
    """The rows and tokens of a layer's operator, and how many of them are wanted."""

    batch: int
    length: int
    samples: slice = field(hash=False)  # a slice has no hash before Python 3.12
    """Rows that are wanted."""
    tokens: int
    """Tokens that are wanted, from the first on."""
    shared: bool = False
    """Whether all rows have the same operator, which then has one row only."""

    def of(self, tensor: Tensor) -> Tensor | None:
        """Return the wanted rows of (batch|1, ...); None for a tensor of other rows."""
        if tensor.shape[0] not in (1, self.batch) and not self.shared:
            return None
        return tensor[self.samples] if tensor.shape[0] > 1 else tensor


class TokenWatch:
    """Notes in one forward pass what the measured layers and the modules around them are given.

    Args:
        separators: token ids that are looked for. Without any, no ids are noted.
    """

    def __init__(self, separators: Sequence[int] = ()) -> None:
        self._separators = tuple(separators)
        self._ids: dict[int, tuple[Tensor, ...]] = {}
        """id of a module -> what may be token ids among its arguments, the module called last at the end."""
        self.calls: dict[int, int] = {}
        """id of a layer's module -> its calls in the last forward pass of the model; each pass has a new dictionary."""
        self._given: dict[int, tuple[nn.Module, Named]] = {}
        """id of a module -> it and its arguments, the module called last at the end."""
        self._around: dict[int, set[int]] = {}
        self._known: dict[Any, tuple[Any, Tensor | None]] = {}
        self._is_running = False
        self._embeddings: set[int] = set()

    def watch(self, model: nn.Module | None, layers: Iterable[nn.Module]) -> HookHandle:
        """Add the hooks for one forward pass of `model`; None watches the layers alone."""
        self.forget()
        self.calls = {}
        self._is_running = False
        parents: dict[int, list[nn.Module]] = defaultdict(list)
        for module in () if model is None else model.modules():
            for child in module.children():
                parents[id(child)].append(module)
        watched: dict[int, nn.Module] = {}
        for layer in layers:
            around = {id(layer): layer}
            new = [layer]
            while new:
                new = [m for inner in new for m in parents[id(inner)] if id(m) not in around]
                around |= {id(m): m for m in new}
            self._around[id(layer)] = set(around)
            watched |= around
        self._embeddings = set()
        if model is not None and self._separators:
            embeddings = {id(module): module for module in model.modules() if isinstance(module, nn.Embedding)}
            self._embeddings, watched = set(embeddings), {**embeddings, **watched}
        handle = HookHandle()
        for module in watched.values():
            hook = ModuleHook(self._note(id(module) in self._around, module is model))
            handle.add(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        if model is not None:
            handle.add(model.register_forward_hook(ModuleHook(self._end), always_call=True).remove)
        handle.add(self.forget)
        return handle

    def forget(self) -> None:
        """Let go of all tensors."""
        self._given.clear()
        self._ids.clear()
        self._known.clear()

    def select(
        self,
        call: Call,
        whole: Operator | LazyOperator,
        samples: slice,
        heads: Sequence[int],
        length: int,
        *,
        most: int,
    ) -> Operator:
        """Return a part of a call's operator that knows which of its tokens are real, and which belong together.

        Of each row it has the first tokens of the longest sequence, and those after it up to `length`.

        Args:
            call: of the layer.
            whole: the operator of the call.
            samples, heads, length: what is selected.
            most: rows at most, where all have the same operator.
        """
        if getattr(whole, "is_indivisible", False):
            samples, length = slice(None), whole.length
        rows = _rows_of(call, whole, samples, length, most)
        segments = self.segments(call, rows)
        tokens = None if segments is None else _moved(segments, rows, length)
        if segments is not None and tokens is not None:
            return _at(tokens, segments, whole, samples, heads)
        few = whole.select(samples=samples, heads=heads, length=length)
        if segments is None:
            return few
        # Where all tokens have the same T it does not matter where a sequence begins.
        segments = forms.at_start(segments, few.length) if rows.shared else segments[:, :length]
        return _with(few, segments)

    def separators(
        self, call: Call, whole: Operator | LazyOperator, samples: slice, length: int
    ) -> tuple[Tensor | None, str]:
        """Return which of the tokens that `select` takes are separators, (rows, length) bool on their device.

        None where that is not known, with the reason.
        """
        rows = _rows_of(call, whole, samples, length, 1)
        if rows.shared:
            return None, SHARED
        around = self._around.get(id(call.layer), set())
        inner_first = [ids for key, ids in reversed(self._ids.items()) if key in around - self._embeddings]
        embedded = [ids for key, ids in self._ids.items() if key in self._embeddings]
        for ids in (each for found in (*inner_first, *embedded) for each in found):
            fitting = of_rows(ids, whole.batch, whole.length)
            if fitting is not None:
                break
        else:
            return None, NO_IDS
        flags = are_separators(fitting[samples, : rows.tokens], self._separators)
        segments = self.segments(call, rows)
        tokens = None if segments is None else _moved(segments, rows, length)
        if tokens is None:
            return flags[:, :length].contiguous(), ""
        return flags.gather(1, tokens.clamp(max=rows.tokens - 1).expand(len(flags), -1).to(flags.device)), ""

    def segments(self, call: Call, rows: Rows) -> Tensor | None:
        """Return the segments of a call's tokens, (rows|1, tokens), on their device; None where all is one sequence."""
        found: list[Tensor] = []
        misfits: list[Tensor] = []
        is_placed = False
        for given, is_own, module in self._sources(call):
            for name in sorted(_NAMES & given.keys()):
                value, hides = given[name], _is_of_torch(module) and not (is_own and call.op)
                one = self._form(name, value, rows, is_own=is_own, hides=hides)
                if one is not None and len({1, one.shape[0], *(other.shape[0] for other in found)}) <= 2:
                    found.append(one)
                    is_placed |= name not in _POSITIONS  # which say nothing of padding
                elif is_padding(name, value):
                    misfits.append((is_real(name, value)).all())
        if misfits and not is_placed:
            complete = torch.stack(misfits).all()
            return torch.where(complete, 0, forms.UNKNOWN).expand(1, rows.tokens)
        return forms.merged(found) if len(found) > 1 else next(iter(found), None)

    def _sources(self, call: Call) -> Iterator[tuple[Named, bool, nn.Module]]:
        """Yield arguments by name: of the call itself, of its layer, and of the modules around it."""
        yield call.kwargs, True, call.module
        yield call.layer_kwargs, False, call.layer
        around = self._around.get(id(call.layer), ())
        for key, (module, given) in list(self._given.items()):
            if key in around:
                yield given, module is call.module, module

    def _form(self, name: str, value: Any, rows: Rows, *, is_own: bool, hides: bool) -> Tensor | None:
        """Return the segments that one argument stands for, (rows|1, tokens); None where it is not of these tokens."""
        key = (id(value), name, rows, is_own, hides)
        if key not in self._known:  # a mask is often the same tensor in all layers
            form = _of_block_mask(value, rows) if hasattr(value, "mask_mod") else None
            if isinstance(value, Tensor) and not value.is_nested:
                form = _of_tensor(name, value, rows, is_own=is_own, hides=hides)
            self._known[key] = (value, form)  # holds the value, so that its id stays its own
        return self._known[key][1]

    def _note(self, is_layer: bool, is_model: bool) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if is_model:
                self._is_running = True
                self._known.clear()  # of a pass before, as in generation
                self.calls = {}
            if is_layer and self._is_running:
                self.calls[id(module)] = self.calls.get(id(module), 0) + 1
            for noted in (self._given, self._ids):
                noted.pop(id(module), None)
            try:
                given = _tokens_among(module, args, kwargs)
                if self._separators and (ids := ids_among(module, args, kwargs, _OF_A_DECODER)):
                    self._ids[id(module)] = ids
            except Exception as error:  # of somebody's own mapping, or signature
                logger.debug("ess_monitor: arguments of %s could not be read", type(module).__name__, exc_info=error)
                return
            if given:
                self._given[id(module)] = (module, given)

        return note

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._is_running = False


def _rows_of(call: Call, whole: Operator | LazyOperator, samples: slice, length: int, most: int) -> Rows:
    shared = whole.batch == 1 and (isinstance(whole, Convolution) or getattr(whole, "shift_invariant", False))
    looked_at = whole.length if _is_on_host(call) else min(whole.length, max(length, _LOOKED_AT))
    return Rows(whole.batch, whole.length, slice(most) if shared else samples, looked_at, shared)


def _moved(segments: Tensor, rows: Rows, length: int) -> Tensor | None:
    """Return which tokens are selected, (rows|1, length), where a crop begins at the longest sequence of each row.

    None where the first ones are. The host may not know.
    """
    if rows.shared or length >= rows.length:
        return None
    start = forms.starts_of_longest(segments)
    if start.device.type == "cpu" and not bool(start.any()):
        return None
    return start[:, None] + torch.arange(length, device=start.device)


def _at(
    tokens: Tensor, segments: Tensor, whole: Operator | LazyOperator, samples: slice, heads: Sequence[int]
) -> Operator:
    """Return the operator of some tokens of each row, which the device may be alone to know."""
    seen = segments.shape[1]
    segments = segments.gather(1, tokens.clamp(max=seen - 1)).masked_fill(tokens >= seen, forms.PADDING)
    parts = []
    for number, sample in enumerate(range(whole.batch)[samples]):
        row = tokens[number if len(tokens) > 1 else 0].clamp(max=seen - 1)
        end = int(row[-1]) + 1 if row.device.type == "cpu" else seen
        part = whole.select(samples=slice(sample, sample + 1), heads=heads, length=end)
        parts.append(at_tokens(part, row.to(part.device, non_blocking=True)))
    return _with(joined(parts), segments)


def _with(operator: Operator, segments: Tensor) -> Operator:
    return dataclasses.replace(operator, segments=segments[:, None].to(operator.device, non_blocking=True))


def _is_on_host(call: Call) -> bool:
    return all(tensor.device.type == "cpu" for tensor in tensors_in([call.output, list(call.kwargs.values())]))


def _tokens_among(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Named:
    """Return the arguments of a call that tell of its tokens, also those in a batch that is a dictionary."""
    parameters = inspect.signature(module.forward).parameters.values()
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = {**dict(zip(positional, args, strict=False)), **kwargs}
    batches = [value for value in (*args, *kwargs.values()) if isinstance(value, Mapping)]
    every: dict[str, Any] = {}
    for given, known in (*((batch, batch) for batch in batches), (named, {*named, *positional})):
        names = [name for name in given if isinstance(name, str)]
        prefix = _OF_A_DECODER if any(str(name).startswith(_OF_A_DECODER) for name in known) else ""
        for name in names:
            plain = name.removeprefix(prefix)
            if name.startswith(prefix) and plain in _NAMES and given[name] is not None:
                every[plain] = given[name]
    return every


def _is_of_torch(module: nn.Module) -> bool:
    """Return whether a module is one of torch's own transformers, where True in a mask hides."""
    return type(module).__module__.startswith("torch.nn.modules")


def is_padding(name: str, value: Any) -> bool:
    """Return whether an argument can only be a mask of padding, (batch, length), of whatever tokens."""
    return isinstance(value, Tensor) and value.dim() == 2 and name in (*_PADDING, "attention_mask")


def is_real(name: str, mask: Tensor) -> Tensor:
    """Return which tokens a mask of padding says are real."""
    if not mask.is_floating_point():
        return (mask == 0) if name in _PADDING else (mask != 0)
    # 1 and 0, or what is added to the logits: 0 and less
    added = forms.kept_by(mask)
    return added if name in _PADDING else torch.where((mask > 0).any(), mask != 0, added)


def _of_tensor(name: str, value: Tensor, rows: Rows, *, is_own: bool, hides: bool) -> Tensor | None:
    if name in _ENDS:
        return forms.of_ends(value, rows.tokens) if value.dim() == 1 and rows.batch == 1 else None
    if value.dim() == 1 and name in (*_NUMBERS, *_POSITIONS, *_PADDING):
        value = value[None]
    if value.dim() < 2 or value.shape[-1] != rows.length:
        return None
    is_table = value.dim() == 2 and not _is_square(name, value, rows, hides)
    if not is_table and name in _MASKS:
        return _of_mask(name, value, rows, is_own=is_own, hides=hides)
    few = rows.of(value) if is_table else None
    if few is None:
        return None
    if name in _POSITIONS:
        return forms.of_positions(few[:, : rows.tokens])
    if name in _NUMBERS:
        return few[:, : rows.tokens].long().clamp(min=forms.PADDING)
    return forms.of_real(is_real(name, few)[:, : rows.tokens])


def _is_square(name: str, value: Tensor, rows: Rows, hides: bool) -> bool:
    """Return whether a mask of two dimensions is of queries and keys, and not of rows and tokens."""
    if name not in _MASKS or value.shape[0] != rows.length:
        return False
    return rows.batch != rows.length or hides or name != "attention_mask"


def _of_mask(name: str, value: Tensor, rows: Rows, *, is_own: bool, hides: bool) -> Tensor | None:
    if value.dim() > 4 or value.shape[-2] not in (1, rows.length):
        return None
    if value.dtype == torch.bool and not (is_own or hides or name == "attention_mask"):
        return None  # whether True keeps or hides is not known
    if value.dim() == 2:
        value = value[None, None]
    elif value.dim() == 3:
        samples = rows.batch if value.shape[0] % rows.batch == 0 else value.shape[0]
        value = value.reshape(samples, -1, *value.shape[1:])
    few = rows.of(value)
    if few is None:
        return None
    few = few[..., : rows.tokens, : rows.tokens]
    return forms.of_mask(~few if hides and few.dtype == torch.bool else few)


def _of_block_mask(value: Any, rows: Rows) -> Tensor | None:
    """Return the segments of a mask of flex attention, which is a function of indices; None where it is of others."""
    from torch.nn.attention.flex_attention import create_mask

    batch, _, queries, keys = value.shape
    if min(queries, keys) < rows.length or batch not in (1, rows.batch):
        return None
    device, is_long = value.kv_num_blocks.device, rows.tokens > _LOOKED_AT
    mod = _of_neighbors(value.mask_mod) if is_long else value.mask_mod
    few = rows.of(create_mask(mod, batch, 1, 2 if is_long else rows.tokens, rows.tokens, device=device))
    if few is None:
        return None
    return forms.of_neighbors(few[:, 0]) if is_long else forms.of_mask(few)


def _of_neighbors(mask_mod: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a mask whose two rows say what every token attends to: of itself, and of the one before it."""
    return lambda batch, head, back, token: mask_mod(batch, head, token, (token - back).clamp(min=0))

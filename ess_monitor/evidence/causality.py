"""Test on a module itself whether a later token changes an earlier output."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ess_monitor.capture.hooks.call_site import is_own_hook, tensors_in
from ess_monitor.capture.hooks.given_tokens import is_padding, is_real
from ess_monitor.errors import CaptureError
from ess_monitor.ess.segments import kept_by
from ess_monitor.evidence.undisturbed import Undisturbed

_TOLERANCE = 1e-4
"""Change of an earlier output, as a share of the largest output, below which it is rounding: a convolution by Fourier
transforms carries rounding errors of later tokens to earlier ones."""
_CACHES = ("cache", "past", "state", "inference_params")
"""Parts of the names of arguments that a call would write to. Without them a call begins at its first token."""


def is_causal(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, length: int
) -> Tensor | None:
    """Return whether the outputs of a call stay the same up to the middle when the tokens from there on change.

    Outputs of padding do not count: where a token sees nothing at all, some kernels let it see everything. Token ids
    are replaced by others of the same batch, and show something only where later outputs change.

    The module is run twice in eval mode, without gradients and inside `Undisturbed`, which leaves no trace of it, also
    inside of a forward pass that is still running.

    Args:
        module: what was called. Hooks on it are not called again.
        args, kwargs: the arguments of its call.
        output: what the call returned.
        length: tokens of a sequence.

    Returns:
        One bool, on the module's device. None where it cannot be told: input and output have no axis of so many tokens,
        other code has hooks in the module, ranks exchange something in it, or it cannot be run again.

    Examples:
        >>> x = torch.randn(2, 6, 4)
        >>> [bool(is_causal(net, (x,), {}, x, 6)) for net in (nn.Linear(4, 4), nn.RNN(4, 4, batch_first=True))]
        [True, True]
        >>> bool(is_causal(nn.RNN(4, 4, batch_first=True, bidirectional=True), (x,), {}, x, 6))
        False
    """
    x, y = _first_floating((args, kwargs)), _first_floating(output)
    x = _first_ids((args, kwargs), length) if x is None else x
    if x is None or y is None or _has_other_hooks(module):
        return None
    axis = _token_axis(module, x, y, length)
    if axis is None:
        return None
    middle, outputs = length // 2, []
    try:
        with Undisturbed(module, alone=True) as block:
            for changed in (False, True):
                block.rewind()
                module.eval()
                given = _Arguments(x, axis, middle if changed else length)
                result = _first_floating(module.forward(*map(given.copied, args), **given.named(kwargs)))
                if result is None or result.shape != y.shape:
                    return None
                outputs.append(result)
    except CaptureError:
        return None
    before, after = outputs
    changes = (before - after).abs()
    for real in _real_tokens(kwargs, length) if axis == 1 else ():
        changes = changes.masked_fill(~real.reshape(*real.shape, *[1] * (changes.dim() - 2)), 0)
    moved = changes.narrow(axis, 0, middle).amax()
    scale = before.abs().nan_to_num(nan=0.0, posinf=0.0).amax()  # outputs of padding may be anything
    # What is not finite shows nothing, and is reported by the reading.
    shows = changes.amax() > 0 if not x.is_floating_point() else True
    return shows & (moved <= max(_TOLERANCE, 4 * torch.finfo(before.dtype).eps) * scale) | ~moved.isfinite()


class _Arguments:
    """Builds the arguments of a call anew, with other tokens from `middle` on.

    A tensor that is passed twice stays one: attention asks whether query and key are the same.
    """

    def __init__(self, x: Tensor, axis: int, middle: int) -> None:
        self._like, self._axis, self._middle = x.shape[: axis + 1], axis, middle
        self._dim, self._ids = x.dim(), None if x.is_floating_point() else x.shape
        self._made: dict[int, Tensor] = {}

    def named(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return keyword arguments, without caches that the module would write to."""
        return {name: None if _is_cache(name, value) else self.copied(value) for name, value in kwargs.items()}

    def copied(self, value: Any) -> Any:
        """Return an argument with its containers built anew."""
        if isinstance(value, Tensor):
            if id(value) not in self._made:  # a copy, because the module may write to it
                self._made[id(value)] = self._changed(value.detach()).clone()
            return self._made[id(value)]
        if type(value) in (dict, OrderedDict):
            return type(value)((name, self.copied(item)) for name, item in value.items())
        if type(value) in (list, tuple):
            return type(value)(map(self.copied, value))
        return None if _is_cache("", value) else value

    def _changed(self, tensor: Tensor) -> Tensor:
        is_sequence = tensor.is_floating_point() and tensor.dim() == self._dim
        is_sequence |= tensor.shape == self._ids
        if not is_sequence or tensor.shape[: self._axis + 1] != self._like or self._middle >= self._like[-1]:
            return tensor
        earlier = tensor.narrow(self._axis, 0, self._middle)
        if not tensor.is_floating_point():
            return torch.cat([earlier, tensor.flip(1)[:, self._middle :]], 1)
        later = tensor.narrow(self._axis, self._middle, tensor.shape[self._axis] - self._middle)
        return torch.cat([earlier, 1 - 1.5 * later.roll(1, -1 if self._axis < self._dim - 1 else 1)], self._axis)


def _is_cache(name: str, value: Any) -> bool:
    if value is None or isinstance(value, (Tensor, bool, int, float, str, tuple, list)):
        return False
    return "Cache" in type(value).__name__ or any(part in name for part in _CACHES)


def _first_floating(value: Any) -> Tensor | None:
    return next((tensor for tensor in tensors_in(value) if tensor.is_floating_point() and tensor.dim() > 1), None)


def _first_ids(value: Any, length: int) -> Tensor | None:
    ids = (tensor for tensor in tensors_in(value) if tensor.dtype in (torch.int32, torch.int64))
    return next((tensor for tensor in ids if tensor.shape[1:] == (length,)), None)


def _token_axis(module: nn.Module, x: Tensor, y: Tensor, length: int) -> int | None:
    if not x.is_floating_point():
        return 1 if y.shape[:2] == x.shape and length > 1 else None
    if x.dim() != y.dim() or length < 2:
        return None
    axes = [axis for axis in range(x.dim()) if x.shape[axis] == y.shape[axis] == length]
    if isinstance(module, nn.MultiheadAttention):
        axes = [axis for axis in axes if axis == int(module.batch_first and x.dim() == 3)]
    if len({1, 2} & {*axes}) == 2 and any(type(part) is nn.Conv1d for part in (module, *module.children())):
        return None  # its channels may come first
    preferred = (axis for axis in (1, 2, 0) if axis in axes and (axis or x.dim() == 2 or len(axes) == 1))
    return next(preferred, None)


def _real_tokens(kwargs: dict[str, Any], length: int) -> Iterator[Tensor]:
    """Yield which tokens are no padding, (batch or 1, length), as each mask among the arguments of a call says."""
    for name, mask in kwargs.items():
        if is_padding(name, mask) and mask.shape[1] == length:
            yield is_real(name, mask)
        elif isinstance(mask, Tensor) and "mask" in name and mask.dim() == 4 and mask.shape[2:] == (length, length):
            yield kept_by(mask[:, 0].diagonal(0, -2, -1))


def _has_other_hooks(module: nn.Module) -> bool:
    """Return whether other code has hooks in a module: what they write elsewhere could not be put back."""
    return any(
        not is_own_hook(hook)
        for part in module.modules()
        for hooks in (part._forward_pre_hooks, part._forward_hooks)
        for hook in hooks.values()
        if part is not module
    )

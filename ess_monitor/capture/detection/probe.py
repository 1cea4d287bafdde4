"""Find out whether an output of a module depends on the input of other tokens.

One backward pass answers it: the gradient of one output token in the middle of the sequence with respect to the
module's input is nonzero at the tokens that it depends on. It runs through the part of the graph that the module has
just recorded, inside of the module's forward hook, and accumulates nothing: parameters, random numbers and the graph
stay as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils.hooks import RemovableHandle

from ess_monitor.capture.detection.class_names import POINTWISE
from ess_monitor.capture.hooks.call_site import ModuleHook, is_own_hook, tensors_in
from ess_monitor.capture.hooks.ignored_calls import is_recorded, is_transformed

_CONVOLUTIONS = (nn.Conv1d, nn.ConvTranspose1d)
_LARGEST_GRAPH = 20_000
"""Nodes of a graph that is looked at."""


@dataclass(frozen=True)
class Mixing:
    """What one output token of a module depends on. Both are tensors of one bool, on the module's device."""

    past: Tensor
    """Whether it depends on earlier tokens."""
    future: Tensor
    """Whether it depends on later tokens."""
    seen: Tensor
    """Whether it depends on its own token. False for both others means nothing where this is False: an output
    projection that starts at zero passes no gradient at all."""

    @property
    def mixes(self) -> bool:
        """True where it depends on another token. Waits for the device."""
        return bool(self.past | self.future)

    @property
    def is_pointwise(self) -> bool:
        """True where it depends on its own token alone. Waits for the device."""
        return bool(self.seen & ~self.past & ~self.future)


class MixingProbe:
    """Asks the modules of a model, during one forward pass, whether they mix tokens.

    A module that holds one which mixes is not asked, unless it is among `listed`: its output mixes in any case.

    Args:
        model: the model. Its forward pass needs gradients enabled.
        listed: names of modules that are known to mix. They are asked whatever they hold, and in training neither they
            nor what is inside of them or around them.
        in_training: leave the arguments of modules as they are, and do not ask where a backward pass might do more than
            compute a gradient: functions of Python, hooks of others, activation checkpointing.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 4, batch_first=True))
        >>> with MixingProbe(net) as probe:
        ...     _ = net(torch.randn(2, 6, 4))
        >>> [(name, bool(m.past), bool(m.future)) for name, m in probe.found.items()]
        [('1', True, False)]
    """

    def __init__(self, model: nn.Module, *, listed: Iterable[str] = (), in_training: bool = False) -> None:
        self.found: dict[str, Mixing] = {}
        """Name -> what its first call showed, of every module that was asked."""
        self._model, self._listed, self._in_training = model, frozenset(listed), in_training
        self._length: int | None = None
        self._resampled: set[int] = set()
        """Numbers of tokens behind modules that change it, such as a convolution with a stride."""
        self._shapes: dict[str, list[tuple[int, ...]]] = {}
        """Name -> shapes of the tensors that a module was called with last."""
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> MixingProbe:
        self.attach()
        return self

    def __exit__(self, *details: object) -> None:
        self.remove()

    def attach(self) -> None:
        """Add the hooks. With `in_training` none where other code has hooks in the model."""
        if self._in_training and any(_has_hooks(module) for module in self._model.modules()):
            return
        before = ModuleHook(self._learn_length)
        self._handles.append(self._model.register_forward_pre_hook(before, with_kwargs=True))
        weights = [name for name, m in self._model.named_modules() if isinstance(m, ParametrizationList)]
        for name, module in self._model.named_modules():
            if any(is_inside(name, other) for other in weights):
                continue
            note = ModuleHook(lambda _, args, kwargs, name=name: self._note_shapes(name, args, kwargs))
            self._handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
            if self._in_training and any(is_inside(name, other) or is_inside(other, name) for other in self._listed):
                continue
            if not self._in_training and name:
                self._handles.append(module.register_forward_pre_hook(ModuleHook(_with_graph), with_kwargs=True))
            ask = ModuleHook(
                lambda called, args, kwargs, output, name=name: self._ask(name, called, args, kwargs, output)
            )
            self._handles.append(module.register_forward_hook(ask, with_kwargs=True))

    def remove(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()

    def _learn_length(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._length is None:
            sequences = (t for t in tensors_in((args, kwargs)) if t.dim() == (3 if t.is_floating_point() else 2))
            self._length = next((t.shape[_first_token_axis(self._model, t)] for t in sequences), None)
        return None if self._in_training else _with_graph(module, args, kwargs)

    def _note_shapes(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._shapes[name] = [tuple(tensor.shape) for tensor in tensors_in((args, kwargs))]

    def _note_resampling(self, module: nn.Module, x: Tensor | None, y: Tensor | None) -> None:
        """Note the number of tokens that a module puts out where it changes that number."""
        if y is None or y.dim() != 3 or isinstance(module, POINTWISE):
            return
        convolutions = (part for part in (module, *module.children()) if isinstance(part, _CONVOLUTIONS))
        if any(y.shape[1] == part.out_channels for part in convolutions):
            self._resampled.add(y.shape[2])
        elif x is not None and x.dim() == 3:
            changed = [axis for axis in (1, 2) if x.shape[axis] != y.shape[axis]]
            if len(changed) == 1 and x.shape[changed[0]] in (self._length, *self._resampled):
                self._resampled.add(y.shape[changed[0]])

    def _has_tokens_last(self, name: str, x: Tensor) -> bool:
        """Return whether the last axis of what a module is given can be that of tokens, by what is around the module.

        Channels may be as many. Then another axis of it has as many entries as there are tokens after resampling, or no
        module around it is given tokens on another axis, up to one without them.
        """
        if not self._resampled.isdisjoint(x.shape[1:-1]):
            return False
        while name:
            name = name.rpartition(".")[0]
            shapes = self._shapes.get(name, [])
            if any(self._length in shape[1 : max(2, len(shape) - 1)] for shape in shapes):
                return True
            if shapes and not any(shape[-1:] == (self._length,) for shape in shapes):
                return False
        return True

    def _ask(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._note_resampling(module, next(tensors_in((args, kwargs)), None), next(tensors_in(output), None))
        if name in self.found or (name not in self._listed and not self._in_training and self._holds_mixing(name)):
            return
        y = next((t for t in tensors_in(output) if t.requires_grad), None)
        if y is None or is_transformed() or is_recorded(y.device.type):
            return
        given = (*args, *kwargs.values())
        tracked = [x for x in given if isinstance(x, Tensor) and x.requires_grad and x is not y]
        if self._in_training and (len(tracked) != 1 or _keeps_statistics(module) or not _is_plain(y, tracked[0])):
            return  # of several the first may have been computed from the second
        axes = {k: axis for k, x in enumerate(tracked) if (axis := _token_axis(module, x, y, self._length)) is not None}
        last = {k: axis for k, axis in axes.items() if axis == tracked[k].dim() - 1}
        if not isinstance(module, _CONVOLUTIONS):
            channels = {k for k in last if not self._has_tokens_last(name, tracked[k])}
            axes, last = ({k: axis for k, axis in each.items() if k not in channels} for each in (axes, last))
        if type(module) in POINTWISE:
            axes = last
        if not axes:
            return
        try:
            answers = [depends_on(tracked[k], y, axis) for k, axis in axes.items()]
        except RuntimeError:  # a function without a derivative
            return
        past, future, seen = (torch.stack(flags).any() for flags in zip(*map(astuple, answers), strict=True))
        if len(axes) < len(tracked):  # of the others, such as keys of another length, nothing is known
            seen = torch.zeros_like(seen)
        self.found[name] = Mixing(past, future, seen)

    def _holds_mixing(self, name: str) -> bool:
        return any(other != name and is_inside(other, name) and m.mixes for other, m in self.found.items())

    def flags(self) -> list[Tensor]:
        """Return the answers as tensors of three bools, one for each module that was asked."""
        return [torch.stack((mixing.past, mixing.future, mixing.seen)) for mixing in self.found.values()]

    def take_from_host(self, flags: Iterable[Tensor]) -> None:
        """Put copies of `flags` on the host in the place of the answers."""
        self.found = {name: Mixing(*host) for name, host in zip(self.found, flags, strict=True)}

    def unlisted(self) -> dict[str, Mixing]:
        """Return the modules that mix tokens, and are not listed, nor inside of or around one that is.

        Of modules inside of one another it is the innermost. Waits for a device that the answers are still on.
        """
        mixing = [name for name, mixing in self.found.items() if mixing.mixes]
        return {
            name: self.found[name]
            for name in mixing
            if not any(is_inside(name, other) or is_inside(other, name) for other in self._listed)
            and not any(other != name and is_inside(other, name) for other in mixing)
        }


def is_inside(name: str, other: str) -> bool:
    """Return whether the module `name` is `other`, or inside of it; the empty name is the model's.

    >>> is_inside("a.b", "a"), is_inside("ab", "a"), is_inside("a", "")
    (True, False, True)
    """
    return not other or name == other or name.startswith(other + ".")


def depends_on(x: Tensor, y: Tensor, axis: int) -> Mixing:
    """Return which tokens of `x` the middle token of `y` depends on.

    Args:
        x: what `y` was computed from, with its graph.
        y: has as many tokens on the same axis.
        axis: the axis of tokens in both.

    Raises:
        RuntimeError: something in between has no derivative.

    Examples:
        >>> x = torch.randn(2, 5, 3, requires_grad=True)
        >>> mixing = depends_on(x, x.cumsum(1), 1)
        >>> bool(mixing.past), bool(mixing.future)
        (True, False)
    """
    middle = y.shape[axis] // 2
    token = y.select(axis, middle)
    weight = torch.linspace(0.5, 1.5, token.numel(), device=y.device).reshape(token.shape).to(y.dtype)
    with torch.autocast(y.device.type, enabled=False):
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
            token, x, weight, retain_graph=True, allow_unused=True
        )
    gradient = torch.zeros_like(x) if gradients[0] is None else gradients[0]
    touched = (gradient != 0).transpose(0, axis).flatten(1).any(1)
    return Mixing(touched[:middle].any(), touched[middle + 1 :].any(), touched[middle])


def _with_graph(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the arguments as tensors of their own with a graph, also where they are data or the model is frozen.

    Of their own: what one argument was computed from may be another one, which the module does not mix for that.
    """
    if not torch.is_grad_enabled() or is_transformed():
        return None

    def tracked(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2:
            return value
        return (value if value.requires_grad else value.detach().requires_grad_()).clone()

    return tuple(map(tracked, args)), {name: tracked(value) for name, value in kwargs.items()}


def _first_token_axis(model: nn.Module, given: Tensor) -> int:
    """Return the axis of tokens of what a model is given: 2 where the first layer that tells takes axis 1 for channels.

    >>> convolution, recurrence = nn.Conv1d(6, 8, 3), nn.GRU(6, 8)
    >>> _first_token_axis(convolution, torch.zeros(2, 6, 9)), _first_token_axis(recurrence, torch.zeros(2, 9, 6))
    (2, 1)
    """
    if given.dim() != 3:
        return 1
    first: list[int] = []
    pointwise: list[int] = []  # a convolution over single tokens may be a linear layer over the axis of tokens
    for module in model.modules():
        if isinstance(module, _CONVOLUTIONS) and given.shape[1] == module.in_channels != given.shape[2]:
            (first if module.kernel_size[0] > 1 else pointwise).append(2)
        elif _features(module) == given.shape[2]:
            first.append(1)
    return next(iter((*first, *pointwise)), 1)


def _features(module: nn.Module) -> int | None:
    """Return how many features a module of torch takes on the last axis."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return int(module.normalized_shape[-1])
    sizes = (getattr(module, name, None) for name in ("in_features", "input_size", "embed_dim"))
    return next((size for size in sizes if isinstance(size, int)), None)


def _token_axis(module: nn.Module, x: Tensor, y: Tensor, length: int | None) -> int | None:
    """Return the axis of tokens of both; None where they have none in common. A convolution has them on its last one.

    >>> _token_axis(nn.Identity(), torch.zeros(2, 6, 4), torch.zeros(2, 6, 8), length=6)
    1
    >>> _token_axis(nn.Conv1d(6, 6, 2), torch.zeros(2, 6, 4), torch.zeros(2, 6, 3), length=4) is None
    True
    """
    if x.dim() != y.dim() or x.dim() < 3:
        return None
    axes = [axis for axis in range(1, x.dim()) if x.shape[axis] == y.shape[axis] > 2]
    if isinstance(module, _CONVOLUTIONS):
        return 2 if 2 in axes else None
    if length is not None:
        return next((axis for axis in axes if x.shape[axis] == length), None)
    return 1 if x.dim() == 3 and 1 in axes else None


def _has_hooks(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = itertools.chain.from_iterable(getattr(module, kind).values() for kind in kinds)
    return not all(map(is_own_hook, hooks))


def _keeps_statistics(module: nn.Module) -> bool:
    """Return whether a forward pass changes buffers, which the recomputation of a checkpoint would do once more."""
    return any(getattr(part, "track_running_stats", False) for part in module.modules())


def _is_plain(y: Tensor, x: Tensor) -> bool:
    """Return whether the graph from y to x holds functions of torch alone, recorded outside of a checkpoint."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return False
    start, end = y.grad_fn, x.grad_fn
    seen, waiting = {end}, [start]
    while waiting and len(seen) < _LARGEST_GRAPH:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "_forward_cls"):  # a function written in Python
            return False
        waiting.extend(following for following, _ in node.next_functions)
    return not waiting

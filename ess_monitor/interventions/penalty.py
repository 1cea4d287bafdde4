"""Collect the A->I penalty of a model's layers as a term for a loss of your own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ess_monitor import validation
from ess_monitor.capture import DecayHandle, Layer, LayerFilter, find_layers
from ess_monitor.capture.handles import DecayInputs
from ess_monitor.capture.hooks.call_site import Call, HookHandle
from ess_monitor.errors import CaptureError, ConfigError
from ess_monitor.interventions.identity_pull import transition_penalty


class Penalties:
    """Computes R = mean ||A_t - I||_F of every layer that was called inside `collect_penalties`."""

    def __init__(self) -> None:
        self._watched: tuple[str, ...] = ()
        # R is computed only when it is asked for: what is computed inside a checkpointed layer would have to be
        # computed again in its recomputation, when the hooks may be gone.
        self._seen: dict[str, list[DecayInputs]] = {}
        self._without_graph: set[str] = set()

    @property
    def per_layer(self) -> dict[str, torch.Tensor]:
        """Layer name -> R, a scalar with graph, in the order of the calls. The calls of one layer are summed."""
        return {
            name: torch.stack([transition_penalty(inputs.transition(inputs.tensors)) for inputs in calls]).sum()
            for name, calls in self._seen.items()
        }

    def total(self) -> torch.Tensor:
        """Return the sum of R over the layers: multiply it by lambda and add it to the loss.

        Raises:
            CaptureError: a layer was not called, or ran without a graph, so that its penalty would have no gradient.
        """
        unseen = [name for name in self._watched if name not in self._seen]
        if unseen or not self._seen:
            raise CaptureError(
                f"penalties: {unseen or 'no layer'} not seen inside the block; run the forward pass in it first. Code "
                "that was compiled before shows no calls: attach an IdentityPull, with which it is compiled anew, or "
                'run this forward pass under torch.compiler.set_stance("force_eager"). If a forward pass '
                "may skip a layer, name the others with `layers`, or sum per_layer"
            )
        if self._without_graph:
            raise CaptureError(
                f"penalties: {sorted(self._without_graph)} ran without gradients, so the penalty has no effect. "
                "Under reentrant activation checkpointing set use_reentrant=False, or attach an IdentityPull; "
                "to read the numbers only, enter the block under torch.no_grad()"
            )
        return torch.stack(list(self.per_layer.values())).sum()

    def _add(self, name: str, inputs: DecayInputs, *, graph_expected: bool) -> None:
        self._seen.setdefault(name, []).append(inputs)
        if graph_expected and not torch.is_grad_enabled():
            self._without_graph.add(name)


@contextmanager
def collect_penalties(model: nn.Module, layers: LayerFilter | str | Sequence[str] | None = None) -> Iterator[Penalties]:
    """Collect the A->I penalty of every layer that the forward pass inside the block calls.

    Adding `strength * penalties.total()` to the loss gives the gradients of an `IdentityPull` of that strength on each
    of the layers. Put one forward pass into a block and the backward pass after it: activation checkpointing calls the
    layers again during backward.

    Args:
        model: the model, or a single layer.
        layers: patterns on the dotted layer names. None: every layer that has a decay. Regularizing the second of two
            layers works best (section 4.2, appendix D.3).

    Raises:
        CaptureError: a named layer has no decay that could be pulled (LA and SA have none), or no layer at all has one;
            from `total()`, a layer was not seen: compiled code shows no calls.
        ConfigError: a pattern matches no layer.

    Examples:
        >>> from ess_monitor.featurizers import GLA, LA
        >>> model = nn.Sequential(LA(16, 2), GLA(16, 2))
        >>> with collect_penalties(model) as penalties:
        ...     task_loss = model(torch.randn(4, 8, 16)).square().mean()
        >>> (task_loss + 0.5 * penalties.total()).backward()
        >>> list(penalties.per_layer)
        ['1']
    """
    chosen, graph_expected = _with_decay(model, layers), torch.is_grad_enabled()
    penalties = Penalties()
    penalties._watched = tuple(layer.name for layer, _ in chosen)

    def watch(layer: Layer, handle: DecayHandle) -> HookHandle:
        def keep(call: Call) -> None:
            inputs = handle.read(call)
            if inputs is not None:
                penalties._add(layer.name, inputs, graph_expected=graph_expected)

        return handle.site.watch(layer.module, before=keep)

    with ExitStack() as hooks:
        for layer, handle in chosen:
            hooks.callback(watch(layer, handle).remove)
        yield penalties


def _with_decay(model: nn.Module, layers: LayerFilter | str | Sequence[str] | None) -> list[tuple[Layer, DecayHandle]]:
    found = find_layers(model, None if layers is None else _filter(layers))
    having = [(layer, layer.spec.decay) for layer in found if layer.spec.decay is not None]
    lacking = [layer for layer in found if layer.spec.decay is None]
    if not having or (layers is not None and lacking):
        named = ", ".join(f"{layer.name} ({type(layer.module).__name__})" for layer in lacking)
        raise CaptureError(
            f"layers: nothing to regularize in {named or type(model).__name__}: no decay that could be pulled towards "
            "the identity; ess_monitor.describe(model) lists the layers with a decay handle"
        )
    return having


def _filter(layers: LayerFilter | str | Sequence[str]) -> LayerFilter:
    try:
        return LayerFilter.model_validate(layers)
    except ConfigError:
        raise ConfigError(
            f"layers: {validation.shown(layers)} given; pass a pattern, a list of patterns, or a LayerFilter"
        ) from None

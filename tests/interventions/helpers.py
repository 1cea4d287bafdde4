"""A small model, the regularizer written out by hand, and gradients compared parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ess_monitor.capture import Layer, find_layers
from ess_monitor.featurizers import Backbone, BackboneConfig
from ess_monitor.interventions import IdentityPull

DECAYING = ("wla", "gla", "s6", "gla_s6")
"""The featurizers that have a decay to pull."""
OPTIONS: dict[str, dict[str, float]] = {"wla": {"beta": 1.0}, "gla": {"beta": 1.0}, "gla_s6": {"alpha": 4.0}}
STRENGTH = 0.5
VOCABULARY = 32

Batch = tuple[Tensor, Tensor]


def backbone(featurizer: str | tuple[str, ...], seed: int = 0) -> Backbone:
    """Two blocks of 16 channels with a state of 4. The embedding is large enough for decays to differ by token."""
    torch.manual_seed(seed)
    names = (featurizer,) * 2 if isinstance(featurizer, str) else featurizer
    options = {key: value for name in names for key, value in OPTIONS.get(name, {}).items()}
    config = BackboneConfig(
        vocab_size=VOCABULARY, width=16, featurizer=names, state_size=4, mlp_factor=1, mixer_options=options
    )
    model = Backbone(config)
    nn.init.normal_(model.embedding.weight)
    return model


def batch(seed: int, size: int = 3, length: int = 10) -> Batch:
    """Random tokens and targets."""
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(VOCABULARY, (2, size, length), generator=generator)
    return tokens, targets


def last_layer(model: nn.Module) -> Layer:
    """The deepest layer: behind it every kind of parameter of the layers below determines its decay."""
    return find_layers(model)[-1]


def pull_on(
    model: nn.Module, strength: float = STRENGTH, grad_scale: Callable[[], float | Tensor] = lambda: 1.0
) -> IdentityPull:
    """An `IdentityPull` on the deepest layer, not yet attached."""
    layer = last_layer(model)
    assert layer.spec.decay is not None
    return IdentityPull(layer.module, layer.spec.decay, strength, grad_scale=grad_scale)


def task_loss(model: nn.Module, data: Batch) -> Tensor:
    """Cross-entropy."""
    tokens, targets = data
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


@contextmanager
def watched_decay(model: nn.Module) -> Iterator[list[Tensor]]:
    """The log-decay of every call of the deepest layer, with its graph."""
    seen: list[Tensor] = []
    core = last_layer(model).module.get_submodule("core")
    hook = core.register_forward_pre_hook(lambda _, args: seen.append(args[3]))
    try:
        yield seen
    finally:
        hook.remove()


def written_out_penalty(log_decay: Tensor) -> Tensor:
    """The mean over batch and positions of the Frobenius norm of A_t - I, from its definition."""
    decay = log_decay.to(torch.promote_types(log_decay.dtype, torch.float32)).exp()
    return (1 - decay).square().sum((1, 3)).sqrt().mean()


def regularised_loss(model: nn.Module, data: Batch, *, strength: float = STRENGTH) -> Tensor:
    """The loss with the term added to it: what the injected gradients must equal."""
    with watched_decay(model) as seen:
        value = task_loss(model, data)
    [log_decay] = seen
    return value + strength * written_out_penalty(log_decay)


def gradients(model: nn.Module) -> list[Tensor]:
    """The gradients of all parameters, in model order; they are taken off the model."""
    taken = []
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        taken.append(parameter.grad)
        parameter.grad = None
    return taken


def largest_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """max over parameters of ||found - expected|| / ||expected||; NaN if any is."""
    pairs = zip(found, expected, strict=True)
    return torch.stack([(f - e).double().norm() / e.double().norm() for f, e in pairs]).max().item()


class Checkpointed(nn.Module):
    """A mixer whose activations are thrown away in forward and computed again in backward."""

    def __init__(self, mixer: nn.Module, *, use_reentrant: bool) -> None:
        super().__init__()
        self._checkpoint_wrapped_module = mixer
        self.use_reentrant = use_reentrant

    def forward(self, u_BLD: Tensor) -> Tensor:
        """(batch, length, width)."""
        y: Tensor = checkpoint(self._checkpoint_wrapped_module, u_BLD, use_reentrant=self.use_reentrant)
        return y

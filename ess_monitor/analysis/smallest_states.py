"""How small the state of every layer can be."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from ess_monitor import validation
from ess_monitor.analysis.layer_operators import layers_of, smaller_states
from ess_monitor.analysis.results import LayerMinimalState, MinimalStates, StateError, StateFor
from ess_monitor.capture import Captured
from ess_monitor.config import MonitorConfig
from ess_monitor.inspection import Progress


def minimal_state(
    model: nn.Module,
    *inputs: Any,
    relative_errors: Sequence[float] = (0.1, 0.01),
    config: MonitorConfig | None = None,
    progress: Progress | None = None,
    **named_inputs: Any,
) -> MinimalStates:
    """Return for every sequence mixer the smallest state that computes its operator, exactly or nearly.

    The rank of H_i is the size of the smallest recurrence for T (theorems 2.1 and 2.2); `realize` truncates it. The
    error of a smaller state is ||T - T_r||_F / ||T||_F over all measured operators, that of the outputs for white
    inputs. No recurrence with the same state gets below the floor, max_i sum_{m>r} sigma_m(H_i)^2 (Eckart-Young). A
    realization depends on the sequence: it says how much state these inputs need, and is no smaller layer.

    Args:
        model: the model; it is run once in eval mode, without gradients, and not changed.
        *inputs: arguments of its forward.
        **named_inputs: the same by name.
        relative_errors: for which the smallest states are looked up, each above 0 and at most 1.
        config: `layers`, `capture` and `strict` are used. Default: 2 samples, 16 heads or channels, 256 tokens. Layers
            that come from no recurrence (softmax attention, long filters) are analyzed on their first 128 tokens.
        progress: passes the layers on, such as `rich.progress.track`.

    Raises:
        NoLayersError: no layer of the model can be measured.
        CaptureError: with `config.strict`, a layer could not be analyzed.
        ConfigError: a relative error is out of range.

    Examples:
        >>> import torch
        >>> from ess_monitor.analysis import minimal_state
        >>> from ess_monitor.featurizers import GLA
        >>> [layer] = minimal_state(GLA(16, 2), torch.randn(1, 32, 16)).layers
        >>> layer.state_capacity, layer.rank, len(layer.states)
        (8.0, 8, 2)
    """
    hint = "0.1 stands for 10 % of the outputs"
    given = validation.listed("relative_errors", relative_errors, hint=hint)
    given = tuple(validation.real("relative_errors", each, above=0, high=1, hint=hint) for each in given)
    analyze = partial(_analyzed, wanted=given)
    layers, skipped = layers_of(model, inputs, named_inputs, config, analyze, LayerMinimalState, progress)
    return MinimalStates(model=type(model).__name__, layers=layers, skipped=skipped)


def tried_sizes(rank: int) -> tuple[int, ...]:
    """Return the sizes of truncations: all to 8, then four in each doubling, and the rank.

    Examples:
        >>> tried_sizes(20)
        (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20)
    """
    sizes, step = list(range(min(rank, 8) + 1)), 2
    while sizes[-1] < rank:
        sizes.append(min(sizes[-1] + step, rank))
        step *= 2 if sizes[-1] >= 8 * step else 1
    return tuple(sizes)


def _analyzed(captured: Captured, config: MonitorConfig, *, wanted: Sequence[float]) -> LayerMinimalState:
    states = smaller_states(captured, tried_sizes)
    errors = tuple(
        StateError(size=size, floor=states.floor(size) ** 0.5, error=states.truncated(size) ** 0.5)
        for size in states.sizes
    )
    return LayerMinimalState(
        **states.facts(captured.layer.name),
        rank=max(states.ranks),
        mean_rank=sum(states.ranks) / len(states.ranks),
        causal_rank=states.causal_rank,
        errors=errors,
        states=tuple(
            StateFor(
                relative_error=error,
                at_least=next(r for r in range(len(states.tails)) if states.floor(r) <= error**2),
                size=next((each.size for each in errors if each.error is not None and each.error <= error), None),
            )
            for error in wanted
        ),
    )

"""How much of its state a layer lets go of at separators in a text (section 4.4 of the paper)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ess_monitor import validation
from ess_monitor.analysis.layer_operators import NotAnalyzed, layers_of
from ess_monitor.analysis.modulation_results import (
    OFFSETS,
    LayerModulation,
    ModulationAt,
    StateModulation,
    Substitution,
)
from ess_monitor.capture import CaptureConfig, Captured, ModulationConfig
from ess_monitor.config import MonitorConfig
from ess_monitor.errors import ConfigError
from ess_monitor.ess import JacobianOperator, Operator, measure, operator_positions
from ess_monitor.ess.modulation import BEFORE, comparable_tokens, longest_sequences
from ess_monitor.inspection import Progress

DEFAULTS = MonitorConfig(capture=CaptureConfig(heads=8, max_length=256))
"""8 heads or channels of each layer, and 256 tokens."""

DRAWS = 400
"""Of the bootstrap."""


def state_modulation(
    model: nn.Module,
    tokens: Tensor,
    *,
    separators: Sequence[int],
    substitutes: Sequence[int] | Mapping[int, str] = (),
    tolerances: Sequence[float] = (0.01, 0.1, 0.3, 1.0),
    config: MonitorConfig | None = None,
    progress: Progress | None = None,
    **named_inputs: Any,
) -> StateModulation:
    """Return by how much the ESS of every layer falls at separators, beyond other tokens, with bootstrap errors.

    The ratio is 1 - ESS[e+1] / mean ESS[e-3..e] at all separators e of the batch, less the same at all other tokens;
    which tokens can be compared is as in training (`ess_monitor.ess.modulation`). The ESS is measured at all positions,
    so `along` shows it over the whole text, and `around` around the separators.

    Args:
        model: the model; it is run once on `tokens`, and once for each substitute, in eval mode and without gradients.
        tokens: (batch, length) ids, the first argument of its forward.
        separators: ids of the separators.
        substitutes: ids that are put in the place of all separators; a mapping also names them.
        tolerances: at which ESS is counted, each above 0.
        config: `tolerance_scale`, `layers`, `capture` and `strict` are used; all sequences are measured. Default: 8
            heads or channels, 256 tokens.
        progress: passes the layers on, such as `rich.progress.track`.
        named_inputs: further arguments of the forward.

    Raises:
        NoLayersError: no layer of the model can be measured.
        CaptureError: with `config.strict`, a layer could not be analyzed.
        ConfigError: an argument is out of range, or no separator of the batch can be compared with what is before it.

    Examples:
        >>> import torch
        >>> from ess_monitor.analysis import state_modulation
        >>> from ess_monitor.featurizers import Backbone, BackboneConfig
        >>> model = Backbone(BackboneConfig(vocab_size=9, width=16, state_size=8))
        >>> tokens = torch.arange(64).remainder(9)[None]
        >>> first, _ = state_modulation(model, tokens, separators=[0]).layers
        >>> first.separators, [each.tolerance for each in first.modulation]
        (6, [0.01, 0.1, 0.3, 1.0, None])
    """
    is_ids = isinstance(tokens, Tensor) and not (tokens.is_floating_point() or tokens.is_complex() or tokens.is_meta)
    if not is_ids or tokens.dim() != 2:
        raise ConfigError(f"tokens is {validation.shown(tokens)}; pass ids of shape (batch, length).")
    ids = validation.wholes("separators", separators, 0, 2**31 - 1, hint="the ids of the separators")
    put = validation.wholes("substitutes", substitutes, 0, 2**31 - 1, hint="ids to put in the place of separators")
    taus = ModulationConfig(separators=(0,), tolerances=validation.listed("tolerances", tolerances)).tolerances
    config = validation.optional("config", config, MonitorConfig) or DEFAULTS
    capture = config.capture.model_copy(update={"samples": max(1, len(tokens))})
    config = config.model_copy(update={"capture": capture})
    is_separator = torch.isin(tokens.cpu().long(), torch.tensor(ids, dtype=torch.long))
    _require_separators(is_separator, ids)
    analyze = partial(_analyzed, is_separator=is_separator, taus=taus)

    def analyzed(given: Tensor) -> Any:
        return layers_of(model, (given,), named_inputs, config, analyze, LayerModulation, progress)

    layers, skipped = analyzed(tokens)
    names = substitutes if isinstance(substitutes, Mapping) else {}
    return StateModulation(
        model=type(model).__name__,
        separators=tuple(sorted(set(ids))),
        tolerance_scale=config.tolerance_scale,
        layers=layers,
        substitutions=tuple(
            Substitution(
                token=token,
                label=str(names.get(token, token)),
                layers=analyzed(tokens.masked_fill(is_separator.to(tokens.device), token))[0],
            )
            for token in put
        ),
        places=tuple(is_separator[0].nonzero().flatten().tolist()),
        skipped=skipped,
    )


def _require_separators(is_separator: Tensor, ids: Sequence[int]) -> None:
    shown = ", ".join(map(str, ids[:8]))
    if not bool(is_separator.any()):
        raise ConfigError(
            f"separators: none of {shown} is among the tokens; give ids of tokens that are, or another text."
        )
    if not any(comparable_tokens(row)[0] for row in is_separator.tolist()):
        raise ConfigError(
            f"separators: {int(is_separator.sum())} of the tokens are, but each is in the first or last eighth of its "
            "sequence, or has another among the three tokens before it; give a longer text, or rarer separators."
        )


def _analyzed(
    captured: Captured, config: MonitorConfig, *, is_separator: Tensor, taus: tuple[float, ...]
) -> LayerModulation:
    if isinstance(captured.operator, JacobianOperator):
        raise NotAnalyzed("skipped", "a layer that is linearized takes too long at so many positions")
    if captured.operator.batch != len(is_separator) and captured.operator.batch > 1:
        raise NotAnalyzed("skipped", f"its batch of {captured.operator.batch} is not that of the tokens")
    if captured.length != is_separator.shape[1]:
        raise NotAnalyzed("skipped", f"it was given {captured.length} tokens of {is_separator.shape[1]}")
    sizes, marks, operators = [], [], 0
    for row, start, part in longest_sequences(captured.operator, len(is_separator)):
        if part.length < 2:
            continue
        found = _sizes(part, taus, config)
        if not bool(found.isfinite().all()):
            raise NotAnalyzed("nonfinite", "an input of its operator is NaN or infinite")
        sizes.append(found)
        marks.append(is_separator[row, start : start + part.length].tolist())
        operators += part.heads
    compared = [comparable_tokens(each) for each in marks]
    separators = [(k, token) for k, (tokens, _) in enumerate(compared) for token in tokens]
    others = [(k, token) for k, (_, tokens) in enumerate(compared) for token in tokens]
    if not separators or not others:
        raise NotAnalyzed(
            "too_short", "no separator, or no other token, in the part of the sequences that was captured"
        )
    kinds = [_behind_and_before(sizes, places) for places in (separators, others)]
    errors = _bootstrap_errors(kinds) if min(len(separators), len(others)) > 1 else [None] * (len(taus) + 1)
    heads = captured.operator.heads
    return LayerModulation(
        layer=captured.layer.name,
        status="ok",
        operator=type(captured.operator).__name__,
        operators=operators,
        separators=len(separators),
        others=len(others),
        modulation=tuple(
            _at(tau, [kind[:, :, k].sum(0).tolist() for kind in kinds], errors[k]).model_copy(
                update={
                    "around": _around([each[:, k] for each in sizes], separators, heads),
                    "along": tuple((sizes[0][:, k] / heads).tolist()),
                }
            )
            for k, tau in enumerate((*taus, None))
        ),
    )


def _sizes(operator: Operator, taus: Sequence[float], config: MonitorConfig) -> Tensor:
    """Return sums over heads at all positions of one sequence: (length - 1, taus + 1), the entropy-ESS last."""
    measured = measure(
        operator,
        operator_positions(operator.length, "all"),
        tolerance=min(taus),
        tolerance_scale=config.tolerance_scale,
        retention=False,
    )
    if not bool(measured.finite.all()):
        return torch.full((1,), torch.nan)
    values = measured.singular_values[0].double()
    counted = [(values > tau).double().sum((0, 2)) for tau in taus]
    return torch.stack([*counted, measured.entropy_ess[0].double().sum(0)], dim=-1).cpu()


def _behind_and_before(sizes: Sequence[Tensor], places: Sequence[tuple[int, int]]) -> Tensor:
    """Return the size behind each token, and the mean of those before: (tokens, 2, taus + 1)."""
    found = []
    for sequence, token in places:
        behind, before = sizes[sequence][token], sizes[sequence][token - BEFORE : token]  # row i is position i + 1
        found.append(torch.stack([behind, before.mean(0)]))
    return torch.stack(found)


def _bootstrap_errors(kinds: Sequence[Tensor]) -> list[float | None]:
    """Return the standard deviation of the ratio over samples of the tokens, drawn with replacement."""
    generator = torch.Generator().manual_seed(0)
    dips = []
    for kind in kinds:
        chosen = torch.randint(len(kind), (DRAWS, len(kind)), generator=generator)
        behind, before = kind[chosen].sum(1).unbind(1)
        dips.append(1 - behind / before)
    errors = (dips[0] - dips[1]).std(0).tolist()
    return [error if error == error and error < float("inf") else None for error in errors]


def _at(tau: float | None, sums: Sequence[Sequence[float]], error: float | None) -> ModulationAt:
    dips = [1 - behind / before if before > 0 else None for behind, before in sums]
    at_separators, elsewhere = dips
    ratio = None if at_separators is None or elsewhere is None else at_separators - elsewhere
    return ModulationAt(
        tolerance=tau,
        ratio=ratio,
        standard_error=None if ratio is None else error,
        at_separators=at_separators,
        elsewhere=elsewhere,
    )


def _around(sizes: Sequence[Tensor], separators: Sequence[tuple[int, int]], heads: int) -> tuple[float | None, ...]:
    means: list[float | None] = []
    for offset in OFFSETS:
        there = [sizes[k][e + offset - 1] for k, e in separators if 1 <= e + offset <= len(sizes[k])]
        means.append(float(torch.stack(there).mean()) / heads if there else None)
    return tuple(means)

"""Which weights of layers follow from their state size: where a layer with a smaller state can be cut out of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ess_monitor.capture.adapters.layer_attributes import existing, int_attribute
from ess_monitor.capture.handles import Keeps, Role, StateRows, StateWeights

_UNKNOWN_LAYOUT = "the sizes of its weights are not those of {}, so it is not known which of them are state dimensions"
_NORMED = "its code normalizes B and C over the state dimensions, so that each depends on all others"
_STATE_NAMES = ("ssm_state_size", "d_state")


def of_mamba2(layer: Any) -> StateWeights | str:
    """Mamba-2: B and C are the last rows of the convolution, and stand before dt in `in_proj`.

    All dimensions of a head decay alike, but the convolution and its activation treat each channel alone: dimensions
    can be chosen, and not mixed or scaled.
    """
    size = int_attribute(*_STATE_NAMES)(layer)
    heads, groups = int_attribute("num_heads", "nheads")(layer), int_attribute("n_groups", "ngroups")(layer)
    projection, convolution = getattr(layer, "in_proj", None), getattr(layer, "conv1d", None)
    if not (isinstance(projection, nn.Linear) and isinstance(convolution, nn.Conv1d) and size and heads and groups):
        return _UNKNOWN_LAYOUT.format("Mamba-2")
    channels = convolution.weight.shape[0]
    inner = channels - 2 * groups * size
    start = projection.weight.shape[0] - heads - 2 * groups * size
    if inner < 1 or inner % heads or start < 2 * inner or convolution.groups != channels:
        return _UNKNOWN_LAYOUT.format("Mamba-2")
    if groups > 1 and type(layer).__module__.startswith("fla."):
        return "fla's own code gives its heads other groups than its kernels do"
    tensors = {"in_proj.weight": start, "conv1d.weight": inner}
    tensors |= {"in_proj.bias": start} if projection.bias is not None else {}
    tensors |= {"conv1d.bias": inner} if convolution.bias is not None else {}
    places: dict[Role, int] = {"writes": 0, "reads": groups * size}
    rows = [
        StateRows(name, role, groups, begin + skipped)
        for name, begin in tensors.items()
        for role, skipped in places.items()
    ]
    if hasattr(layer, "mup_vector"):  # FalconH1: a factor for each part of the projection
        rows += [row._replace(tensor="mup_vector", dim=2) for row in rows if row.tensor == "in_proj.weight"]

    def attributes(state: int) -> Mapping[str, Any]:
        sizes = {**dict.fromkeys(_STATE_NAMES, state), "conv_dim": inner + 2 * groups * state}
        sizes["groups_time_state_size"] = groups * state
        return {name: sizes[name] for name in existing(layer, *sizes)}

    return StateWeights(size, groups, tuple(rows), attributes, _ssm_settings, reads_linearly=False)


def of_mamba(layer: Any) -> StateWeights | str:
    """Mamba: B and C are the last rows of `x_proj`, behind the convolution; all channels share them."""
    size, rank = int_attribute(*_STATE_NAMES)(layer), int_attribute("time_step_rank", "dt_rank")(layer)
    if existing(layer, "b_layernorm", "b_c_rms", "dt_layernorm"):
        return _NORMED
    projection, rate = getattr(layer, "x_proj", None), getattr(layer, "A_log", None)
    if not (isinstance(projection, nn.Linear) and size and rank and rate is not None):
        return _UNKNOWN_LAYOUT.format("Mamba")
    if getattr(projection, "bias", None) is not None or projection.out_features != rank + 2 * size:
        return _UNKNOWN_LAYOUT.format("Mamba")
    rows = (
        StateRows("x_proj.weight", "writes", 1, rank),
        StateRows("x_proj.weight", "reads", 1, rank + size),
        StateRows("A_log", "decays", 1, dim=1),
    )
    names = existing(layer, *_STATE_NAMES)
    return StateWeights(size, 1, rows, lambda state: dict.fromkeys(names, state), _ssm_settings)


def _ssm_settings(state: int) -> Mapping[str, int]:
    return dict.fromkeys(("state_size", "mamba_d_state", *_STATE_NAMES), state)


_GATED_LINEAR = ("GatedLinearAttention", "SimpleGatedLinearAttention")


def of_gated_linear(layer: Any) -> StateWeights | str | None:
    """fla's GLA, with a decay for each dimension, and simple GLA, with one for a head.

    Without a feature map and a short convolution q and k are linear, and any directions of simple GLA can be kept.
    """
    if type(layer).__name__ not in _GATED_LINEAR or not type(layer).__module__.startswith("fla."):
        return None
    size, heads, groups = layer.head_k_dim, layer.num_heads, layer.num_kv_heads
    if layer.feature_map_fn is not None:
        return "its feature map is not known to treat each state dimension alone"
    weights: list[tuple[str, Role]] = [("q_proj.weight", "reads"), ("k_proj.weight", "writes")]
    if layer.use_short_conv:
        weights += [("q_conv1d.weight", "reads"), ("k_conv1d.weight", "writes")]
        if layer.q_conv1d.bias is not None:
            weights += [("q_conv1d.bias", "reads"), ("k_conv1d.bias", "writes")]
    has_own_decays = isinstance(layer.gk_proj, nn.Sequential)
    if has_own_decays:
        weights += [("gk_proj.1.weight", "decays"), ("gk_proj.1.bias", "decays")]
    rows = tuple(StateRows(name, role, heads if role == "reads" else groups) for name, role in weights)

    def attributes(state: int) -> Mapping[str, Any]:
        sizes: dict[str, Any] = {"head_k_dim": state, "key_dim": heads * state, "key_dim_per_group": groups * state}
        if layer.use_short_conv:
            sizes |= {"q_conv1d.hidden_size": heads * state, "k_conv1d.hidden_size": groups * state}
        return {**sizes, **settings(state)}

    def settings(state: int) -> Mapping[str, float]:
        return {"expand_k": heads * state / layer.hidden_size}

    if not layer.use_short_conv:
        keeps: Keeps = "dimensions" if has_own_decays else "directions"
        return StateWeights(size, groups, rows, attributes, settings, keeps, query_scale=_inverse_root)
    note = "its code scales by state^(-1/2), which no weight can take back; the norm behind does"
    return StateWeights(size, groups, rows, attributes, settings, reads_linearly=False, note=note)


def _inverse_root(state: int) -> float:
    return float(state**-0.5)

"""Makes any configuration of transformers small: narrower, with fewer layers, experts, words and pixels."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

_LAYERS = re.compile(
    r"(num|n)_\w*(layers?|blocks)$|^n_layer$|^(en|de)coder_layers$|^layers$|_layers$|depths?$|num_stages|^e_layers$"
)
_WIDTH = re.compile(
    r"hidden|d_model|n_embd|embed|embd|^dim$|_dim$|d_ff|^d_kv$|ffn|inner|intermediate|width|_rank$|channels|latent|_size$"
    r"|_units|sections?$|^d_inner$|lru"
)
_NO_WIDTH = re.compile(
    r"image|patch|vocab|position|max_|window|kernel|stride|token|_id$|version|length|sample|rate|frames|num_|chunk|block"
    r"|pool|group|conv_|in_channels|merge|tile|crop|batch|input|layers|factor|height|mask|mel|codebook|n_head|act|drop"
)
_HEADS = re.compile(r"(num|n)_(\w+_)?heads?(_kv)?$|_heads$|^heads$")
_OF_A_HEAD = re.compile(r"head_?dim$|d_head$|head_size$|^d_kv$|sections?$|rope_dim$")
_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types")
_WORDS = 400
_MOST_LAYERS = 12


class Shrink(NamedTuple):
    """How much smaller a configuration is made."""

    widths: int
    """What widths are divided by: those of each head, or else the number of heads."""
    layers: int
    """Layers of each stack; 0 keeps them all."""
    pixels: int = 1
    """What sides of large images are divided by."""
    fewer_heads: bool = False


SHRINKS = (
    Shrink(8, 2, 4),
    Shrink(8, 2),
    Shrink(8, 2, fewer_heads=True),
    Shrink(4, 2, fewer_heads=True),
    Shrink(8, 0),
    Shrink(4, 2),
    Shrink(2, 2),
    Shrink(1, 2),
    Shrink(1, 0),
)
"""The smallest first: a configuration has rules of its own, and what breaks them is not built, or does not run."""


def shrunk(config: Any, by: Shrink) -> Any:
    """Return the configuration, made small in place, with its parts."""
    for name, value in list(vars(config).items()):
        if not name.startswith("_"):
            _set(config, name, _smaller(name, value, by))
    kinds = _covering(config, by)
    for name in ("num_hidden_layers", "n_layer"):
        if kinds and isinstance(setting(config, name), int):
            _set(config, name, kinds)
    for name in ("use_cache", "output_attentions"):
        if hasattr(config, name):
            _set(config, name, False)
    _complete(config)
    return config


def _smaller(name: str, value: Any, by: Shrink) -> Any:
    if hasattr(value, "to_dict") and hasattr(value, "model_type"):
        return shrunk(value, by)
    if isinstance(value, dict):
        return {key: _smaller(str(key), item, by) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and value:
        return type(value)(_smaller_list(name, list(value), by))
    return _smaller_number(name, value, by) if type(value) is int else value


def _smaller_list(name: str, values: list[Any], by: Shrink) -> list[Any]:
    if name in _KINDS and by.layers:
        kinds = list(dict.fromkeys(map(str, values)))
        return (kinds * by.layers)[: max(by.layers, len(kinds))]
    if all(type(value) is int for value in values):
        return [_smaller_number(name, value, by) for value in values]
    return [_smaller("", value, by) if isinstance(value, dict) else value for value in values]


def _smaller_number(name: str, value: int, by: Shrink) -> int:
    if re.search(r"vocab", name) and value > _WORDS:
        return _WORDS
    if re.search(r"token_id|_index$", name):
        return value if value < _WORDS else _WORDS // 4 + value % 299  # different ones mostly stay so
    if re.search(r"shared_layers$", name):  # layers that take the cache of one before them
        return 0
    if _LAYERS.search(name):
        return min(value, by.layers) if by.layers else value
    if re.search(r"experts_per_tok|top_?k|topk", name):
        return min(value, 2)
    if re.search(r"num_\w*experts|n_routed", name):
        return min(value, 4)
    if re.search(r"^(n_groups?|num_groups?|num_expert_groups?)$", name):
        return min(value, 2)
    if re.search(r"sample_groups$", name) and value % by.widths == 0:
        return value // by.widths
    if re.search(r"image_size", name) and value > 256:
        return value // by.pixels
    if _OF_A_HEAD.search(name):
        return value if by.fewer_heads or value % by.widths else value // by.widths
    if _HEADS.search(name):
        return max(value // by.widths, 1) if by.fewer_heads else value
    if _WIDTH.search(name) and not _NO_WIDTH.search(name) and value >= 2 * by.widths and value % by.widths == 0:
        return value // by.widths
    return value


def _covering(config: Any, by: Shrink) -> int:
    """Return how many layers there are in the shortest model with layers of every kind, 0 where that is not said."""
    for name in _KINDS:
        kinds = setting(config, name)
        if isinstance(kinds, (list, tuple)) and len(set(kinds)) > 1 and by.layers:
            return min(max(by.layers, *(list(kinds).index(kind) + 1 for kind in set(kinds))), _MOST_LAYERS)
    return 0


def _complete(config: Any) -> None:
    """Give what is None, and what a model cannot be built without."""
    for name in ("image_token_id", "image_token_index"):
        if setting(config, name, 0) is None:
            _set(config, name, _WORDS - 2)
    width, heads = setting(config, "hidden_size"), setting(config, "num_attention_heads")
    if type(width) is not int or type(heads) is not int:
        return
    if setting(config, "head_dim") is None and width % heads:
        heads = next(fewer for fewer in range(heads, 0, -1) if width % fewer == 0)
        _set(config, "num_attention_heads", heads)
    layers = setting(config, "num_hidden_layers")
    layers = layers if type(layers) is int else 0
    missing = {"head_dim": width // heads, "num_key_value_heads": heads, "intermediate_size": 2 * width}
    missing |= {"vocab_size": _WORDS, "pad_token_id": 0, "num_experts_per_tok": 2, "n_routed_experts": 4}
    missing |= {"num_experts": 4, "layer_types": ["full_attention"] * layers, "mlp_layer_types": ["dense"] * layers}
    for name, value in missing.items():
        if hasattr(type(config), name) and setting(config, name, 0) is None:
            _set(config, name, value)


def setting(config: Any, name: str, default: Any = None) -> Any:
    """Return a setting; the default where there is none, or not one for all layers."""
    try:
        return getattr(config, name, default)
    except Exception:
        return default


def _set(config: Any, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except Exception:  # a property that cannot be set
        return

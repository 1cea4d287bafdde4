"""Every model type of transformers, small: its own default configuration with fewer layers and narrower ones."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.census.item import Built, Item

_LAYERS = re.compile(
    r"(num|n)_\w*(layers?|blocks)$|^n_layer$|^(en|de)coder_layers$|^layers$|_layers$|^depth$|num_stages|^e_layers$"
)
_WIDTH = re.compile(
    r"hidden|d_model|n_embd|embed|embd|^dim$|_dim$|d_ff|^d_kv$|ffn|inner|intermediate|width|_rank$|channels|latent|_size$|_units"
)
_NO_WIDTH = re.compile(
    r"image|patch|vocab|position|max_|window|kernel|stride|token|_id$|version|length|sample|rate|frames|num_|chunk|block"
    r"|pool|group|conv_|in_channels|merge|tile|crop|batch|input|layers|factor|height|mask|mel|codebook|n_head"
)
_WIDTHS_DIVIDED_BY = 8
_LONGEST = 24
_MOST_PARAMETERS = 2e8


def items() -> Iterator[Item]:
    """Yield every model type that has a model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

    for name in sorted({*MODEL_MAPPING_NAMES, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}):
        yield Item("transformers", name, partial(build, name))


def build(name: str) -> Built:
    """Build a small model with inputs on which it runs, or a wider one, or none but the modules.

    The last is on the device without memory, and has no inputs.
    """
    for divisor in (_WIDTHS_DIVIDED_BY, 1):
        try:
            config = _small(_config(name), divisor)
            model = _auto(name).from_config(config).eval()
            if sum(p.numel() for p in model.parameters()) > _MOST_PARAMETERS:
                break
            args, kwargs = _inputs(model, config)
            with torch.no_grad():
                model(*args, **kwargs)
            return Built(model, (args, kwargs))
        except Exception:
            continue
    with torch.device("meta"):
        return Built(_auto(name).from_config(_small(_config(name), 1)), None)


def _config(name: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(name)


def _auto(name: str) -> Any:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    is_causal = name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return transformers.AutoModelForCausalLM if is_causal else transformers.AutoModel


def _small(config: Any, divisor: int) -> Any:
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            _small(value, divisor)
        elif isinstance(value, bool) or name.startswith("_"):
            continue
        elif isinstance(value, int):
            _set(config, name, _smaller(name, value, divisor))
        elif isinstance(value, list) and value and name in ("layer_types", "layers_block_type", "mlp_layer_types"):
            kinds = list(dict.fromkeys(value))
            _set(config, name, (kinds * 2)[: max(2, len(kinds))])
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list) and len(kinds) > 2 and isinstance(getattr(config, "num_hidden_layers", None), int):
        _set(config, "num_hidden_layers", len(kinds))
    for name in ("use_cache", "output_attentions"):
        if hasattr(config, name):
            _set(config, name, False)
    return config


def _smaller(name: str, value: int, divisor: int) -> int:
    if re.search(r"vocab_size", name) and value > 400:
        return 400
    if re.search(r"token_id|_index$", name):
        return min(value, 399)
    if _LAYERS.search(name):
        return min(value, 2)
    if re.search(r"experts_per_tok|top_?k|topk", name):
        return min(value, 2)
    if re.search(r"num_\w*experts|n_routed", name):
        return min(value, 4)
    if _WIDTH.search(name) and not _NO_WIDTH.search(name) and value >= 64 and value % divisor == 0:
        return value // divisor
    return value


def _set(config: Any, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except Exception:  # a property that cannot be set
        return


def _inputs(model: Any, config: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    main = getattr(model, "main_input_name", "input_ids")
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", getattr(config, "image_size", 64))
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    tokens = torch.randint(5, 90, (1, _LONGEST))
    given: dict[str, torch.Tensor] = {}
    if main == "pixel_values":
        given[main] = torch.randn(1, getattr(vision, "num_channels", 3), int(height), int(width))
    elif main == "pixel_values_videos":
        given[main] = torch.randn(1, getattr(config, "num_frames", 4), 3, int(height), int(width))
    elif main == "input_values":
        given[main] = torch.randn(1, 4000)
    elif main == "input_features":
        given[main] = torch.randn(
            1, getattr(config, "num_mel_bins", 80), 2 * getattr(config, "max_source_positions", 100)
        )
    elif main in ("past_values", "x"):
        given[main] = torch.randn(1, getattr(config, "context_length", 64), getattr(config, "num_input_channels", 1))
    else:
        given[main] = tokens
    if getattr(config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = tokens
    return (), given

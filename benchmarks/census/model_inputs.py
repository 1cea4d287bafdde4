"""Makes inputs for any model of transformers, from the names of the arguments that it takes."""

from __future__ import annotations

import inspect
import itertools
import math
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.census.small_config import setting

LENGTH = 24
Inputs = dict[str, Any]
_MOST_TRIES = 24
_MOST_OF_A_SET = 8
"""Forms that one set of arguments is tried in, such as shapes of an image, so that every set is tried."""
_MOST_CHANGES = 6
_IMAGE_PIXELS = 224


def inputs_on_which(model: Any, config: Any, *, seconds: float = math.inf) -> Inputs:
    """Return inputs with which the model runs; those that reach most of it first.

    Args:
        model, config: the model.
        seconds: processor time after which no others are tried.

    Raises:
        Exception: what the model raised with the first inputs.
    """
    problems: list[Exception] = []
    begin = time.process_time()
    for given in itertools.islice(_candidates(model, config), _MOST_TRIES):
        changed: Inputs | None = given
        for _ in range(_MOST_CHANGES):
            if time.process_time() - begin > seconds:
                break
            try:
                with torch.no_grad():
                    model(**changed)
                return changed
            except Exception as error:
                problems.append(error)
                changed = _as_asked_for(changed, model, config, str(error))
                if changed is None:
                    break
    raise problems[0] if problems else ValueError("no inputs are known")


def _as_asked_for(given: Inputs, model: Any, config: Any, problem: str) -> Inputs | None:
    """Return the inputs, changed as an error asks for; None where it does not say how."""
    for change in (_with_places, _with_width, _with_patches, partial(_with_named, model)):
        changed: Inputs | None = change(given, config, problem)
        if changed is not None:
            return changed
    return None


_WIDTHS_IN_ERRORS = (
    r"\(\d+x(?P<had>\d+) and (?P<asked>\d+)x",
    r"to have (?P<asked>\d+) channels, but got (?P<had>\d+)",
    r"normalized_shape=\[(?P<asked>\d+)\], .* size of? ?\[.*?(?P<had>\d+)\]",
    r"tensor a \((?P<had>\d+)\) must match the size of tensor b \((?P<asked>\d+)\)",
)


def _with_width(given: Inputs, config: Any, problem: str) -> Inputs | None:
    for pattern in _WIDTHS_IN_ERRORS:
        found = re.search(pattern, problem)
        if found is None:
            continue
        had, asked = int(found["had"]), int(found["asked"])
        for name, value in reversed(given.items()):
            if isinstance(value, Tensor) and value.is_floating_point() and had in value.shape[1:] and asked < 5000:
                place = value.dim() - 1 - value.shape[::-1].index(had)
                return {**given, name: torch.randn(*value.shape[:place], asked, *value.shape[place + 1 :])}
    return None


def _with_patches(given: Inputs, config: Any, problem: str) -> Inputs | None:
    found = re.search(r"shape '\[-1, (\d+), (\d+), (\d+), (\d+)\]' is invalid", problem)
    if found is None or "pixel_values" not in given:
        return None
    return {**given, "pixel_values": torch.randn(64, math.prod(map(int, found.groups())))}


def _with_named(model: Any, given: Inputs, config: Any, problem: str) -> Inputs | None:
    """Return the inputs with arguments that an error names, or those of which one was missed."""
    parameters = inspect.signature(model.forward).parameters
    named = [name for name in re.findall(r"\w+", problem) if name in parameters and name not in given]
    if not named and "'NoneType'" in problem:
        named = [name for name in _OFTEN_MISSED if name in parameters and name not in given][:1]
    return {**given, named[0]: _MAKERS.get(named[0], _unknown)(config)[0]} if named else None


_OFTEN_MISSED = ("input_features", "pixel_values", "target_sizes", "image_grid_thw", "grid_thw", "bbox")


def _candidates(model: Any, config: Any) -> Iterator[Inputs]:
    """Yield sets of arguments: what is asked for, with images and sounds where it takes them and without."""
    parameters = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    asked = {name for name, p in parameters.items() if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD}
    asked |= {main} if isinstance(main, str) and main in parameters else set()
    if not asked & set(_MAKERS):
        asked |= {"input_ids"} & set(parameters)
    if getattr(config, "is_encoder_decoder", False):
        asked |= {"decoder_input_ids"} & set(parameters)
    others = [name for name in ("pixel_values", "input_features", "input_values", "input_ids") if name in parameters]
    sets = [asked | {name} | _BESIDE.get(name, set()) & set(parameters) for name in others if name not in asked]
    sets += [asked | _BESIDE.get(main if isinstance(main, str) else "", set()) & set(parameters), asked]
    sets += [asked | {name} for name in ("decoder_input_ids", "decoder_inputs_embeds", "decoder_input_values")]
    seen: list[set[str]] = []
    for names in sets:
        if names in seen or not names <= set(parameters):
            continue
        seen.append(names)
        makers = [_MAKERS.get(name, _unknown) for name in sorted(names)]
        for values in itertools.islice(itertools.product(*(maker(config) for maker in makers)), _MOST_OF_A_SET):
            yield dict(zip(sorted(names), values, strict=True))


_BESIDE = {
    "pixel_values": {"image_grid_thw", "grid_thw", "image_sizes", "target_sizes", "spatial_shapes"},
    "input_features": {"input_features_mask", "feature_attention_mask"},
    "states": {"actions", "rewards", "returns_to_go", "timesteps"},
    "past_values": {"past_time_features", "past_observed_mask", "static_categorical_features"},
}


def _with_places(given: Inputs, config: Any, problem: str) -> Inputs | None:
    """Return the inputs with as many tokens for an image's or a sound's features as an error asks for."""
    asked = re.search(r"features:?\s*(\d+)", problem)
    kind = re.match(r"(\w+) features", problem)
    if asked is None or kind is None or "input_ids" not in given:
        return None
    name = kind[1].lower()
    token = _find(config, f"{name}_token_id", f"{name}_token_index", "media_token_id")
    if type(token) is not int or not 0 < int(asked[1]) < 5000:
        return None
    tokens = _tokens(config)[0]
    places = torch.full((1, int(asked[1])), token)
    return {**given, "input_ids": torch.cat((tokens[:, :4], places, tokens[:, 4:]), 1)}


def _find(config: Any, *names: str) -> Any:
    """Return the first of the settings that the configuration or one of its parts has."""
    for name in names:
        if setting(config, name) is not None:
            return setting(config, name)
    parts = [part for part in vars(config).values() if hasattr(part, "to_dict") and hasattr(part, "model_type")]
    for part in parts:
        found = _find(part, *names)
        if found is not None:
            return found
    return None


def _number(config: Any, default: int, *names: str) -> int:
    found = _find(config, *names)
    return found if type(found) is int else default


def _pair(value: Any, default: int) -> tuple[int, int]:
    if isinstance(value, dict):
        value = list(value.values())[:2]
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, int) for item in value):
        return int(value[0]), int(value[-1])
    return (value, value) if type(value) is int else (default, default)


def _tokens(config: Any) -> list[Tensor]:
    taken = [value for name, value in vars(config).items() if name.endswith(("token_id", "token_index"))]
    words = [word for word in range(5, min(90, _number(config, 90, "vocab_size"))) if word not in taken]
    words = words or [0, 1]
    tokens = torch.tensor(words)[torch.randint(len(words), (1, LENGTH))]
    books = _number(config, 0, "num_codebooks", "num_channels")
    return [tokens, *([tokens[..., None].repeat(1, 1, n) for n in (books, books + 1)] if books else [])]


def _images(config: Any) -> list[Tensor]:
    vision = getattr(config, "vision_config", None) or config
    size = _find(vision, "image_size", "img_size", "input_size") or _find(config, "image_size")
    height, width = _pair(size, _IMAGE_PIXELS)
    channels = _number(vision, 3, "num_channels", "in_channels", "in_chans")
    frames = _number(config, 4, "num_frames", "frames_per_clip")
    patch = math.prod(_pair(_find(vision, "patch_size"), 16)) * channels
    temporal = _number(vision, 1, "temporal_patch_size")
    image = torch.randn(1, channels, height, width)
    shapes = [image, image[None], image[None].repeat(1, frames, 1, 1, 1)]
    pair = image[None].repeat(1, 2, 1, 1, 1)
    return [*shapes, torch.randn(64, patch * temporal), torch.randn(1, 64, patch * temporal), image[0], pair]


def _sounds(config: Any) -> list[Tensor]:
    mels = _number(
        config, 80, "num_mel_bins", "n_mels", "feature_size", "input_feat_per_channel", "mel_bins", "input_dim"
    )
    frames = 2 * _number(config, 100, "max_source_positions")
    longest = _number(config, 0, "max_length", "context_size")
    shapes = [torch.randn(1, mels, frames), torch.randn(1, 200, mels)]
    return [
        *shapes,
        torch.randn(1, mels, 3000),
        torch.randn(1, 1, 1001, mels),
        *([torch.randn(1, longest, mels)] if longest else []),
    ]


def _waves(config: Any) -> list[Tensor]:
    mels = _number(config, 0, "num_mel_bins", "feature_size")
    spectra = [torch.randn(1, _number(config, 200, "max_length"), mels)] if mels else []
    return [torch.randn(1, 4000), torch.randn(1, 1, 4000), *spectra, torch.randn(1, 1, 32000)]


def _series(config: Any) -> list[Tensor]:
    length = _number(config, 64, "context_length")
    lags = _find(config, "lags_sequence") or [0]
    channels = _number(config, 1, "num_input_channels")
    return [torch.randn(1, length + max(lags)), torch.randn(1, length, channels)]


def _time_features(config: Any) -> list[Tensor]:
    length = _number(config, 64, "context_length") + max(_find(config, "lags_sequence") or [0])
    return [torch.randn(1, length, _number(config, 0, "num_time_features"))]


def _unknown(config: Any) -> list[Tensor]:
    width = _number(config, 32, "hidden_size", "d_model")
    return [torch.randn(1, LENGTH, width)]


_MAKERS: dict[str, Callable[[Any], list[Any]]] = {
    **dict.fromkeys(("input_ids", "decoder_input_ids", "inputs", "question_input_ids", "qformer_input_ids"), _tokens),
    **dict.fromkeys(("pixel_values", "pixel_values_images", "images"), _images),
    "pixel_values_videos": lambda config: [
        image.repeat(1, _number(config, 4, "num_frames", "frames_per_clip"), 1, 1, 1) for image in _images(config)[1:2]
    ],
    "input_features": _sounds,
    "spectrogram": _sounds,
    "input_values": _waves,
    "past_values": _series,
    "past_time_features": _time_features,
    "past_observed_mask": lambda config: [torch.ones_like(value) for value in _series(config)],
    "static_categorical_features": lambda config: [
        torch.zeros(1, _number(config, 0, "num_static_categorical_features"), dtype=torch.long)
    ],
    "decoder_input_values": lambda config: [torch.randn(1, LENGTH, _number(config, 80, "num_mel_bins"))],
    "task_inputs": lambda config: [torch.ones(1, _number(config, 77, "task_seq_len"))],
    "states": lambda config: [torch.randn(1, LENGTH, _number(config, 17, "state_dim"))],
    "actions": lambda config: [torch.randn(1, LENGTH, _number(config, 4, "act_dim"))],
    "rewards": lambda config: [torch.randn(1, LENGTH, 1)],
    "returns_to_go": lambda config: [torch.randn(1, LENGTH, 1)],
    "timesteps": lambda config: [torch.arange(LENGTH)[None]],
    "bbox": lambda config: [torch.zeros(1, LENGTH, 4, dtype=torch.long), torch.zeros(1, LENGTH, 8)],
    "attention_mask": lambda config: [torch.ones(1, LENGTH, dtype=torch.long)],
    "image_grid_thw": lambda config: [torch.tensor([[1, 8, 8]])],
    "grid_thw": lambda config: [torch.tensor([[1, 8, 8]])],
    "spatial_shapes": lambda config: [torch.tensor([[8, 8]])],
    "image_sizes": lambda config: [torch.tensor([_pair(_find(config, "image_size"), _IMAGE_PIXELS)])],
    "target_sizes": lambda config: [torch.tensor([[8, 8]])],
    "input_features_mask": lambda config: [torch.ones(1, sound.shape[-1]) for sound in _sounds(config)[:1]],
    "feature_attention_mask": lambda config: [torch.ones(1, sound.shape[-1]) for sound in _sounds(config)[:1]],
}

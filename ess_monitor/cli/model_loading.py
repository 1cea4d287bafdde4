"""Build a model and a random batch from the options of a command."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ess_monitor.cli.options import InputKind
from ess_monitor.errors import ConfigError


def load_model(target: str, kwargs: str | None = None, *, seed: int = 0) -> nn.Module:
    """Return the model at `package.module:name`: a module, or what the class or function there returns.

    The current directory is searched as `python -m` does.

    `name` may be dotted, and `kwargs` is a JSON object. The seed of torch is set before the import and again before the
    call, because the import may draw numbers.

    Raises:
        ConfigError: the target does not exist, does not take these arguments, or is not a model. Errors of the
            target's own code are passed on.

    Examples:
        >>> load_model("torch.nn:Linear", '{"in_features": 3, "out_features": 2}')
        Linear(in_features=3, out_features=2, bias=True)
    """
    torch.manual_seed(seed)
    found = find_object(target)
    if isinstance(found, nn.Module):
        if kwargs is not None:
            raise ConfigError(f"kwargs: {target} is a model already; drop --kwargs, or name a class or function")
        return found
    if not callable(found):
        raise ConfigError(f"target: {target} is a {type(found).__name__}; allowed are a model, a class or a function")
    arguments = _arguments(target, found, kwargs)
    torch.manual_seed(seed)
    model = found(**arguments)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"target: {target} returned a {type(model).__name__}; it must return a torch.nn.Module")
    return model


def model_of_hf_config(path: Path) -> nn.Module:
    """Build the model of a transformers `config.json` on the meta device, without memory or weights.

    `path` is the file or its directory. A causal language model is built where the model type has one.

    Raises:
        ConfigError: the file cannot be read, or transformers is not installed or does not know the model type.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"hf-config: {path} cannot be read as JSON: {error}; give a model's config.json") from error
    model_type = content.get("model_type") if isinstance(content, dict) else None
    if not isinstance(model_type, str):
        raise ConfigError(f"hf-config: {path} has no model_type, so it is not a transformers config")
    try:
        transformers: Any = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise ConfigError('hf-config: needs transformers: pip install "ess-monitor[transformers]"') from error
    try:
        config = transformers.CONFIG_MAPPING[model_type].from_json_file(path)
    except Exception as error:  # each config class raises its own errors
        found = f"{path} (model_type {model_type!r}): {type(error).__name__}: {error}"
        raise ConfigError(f"hf-config: transformers {transformers.__version__} cannot read {found}") from error
    with torch.device("meta"):
        try:
            model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
        except ValueError:  # not a causal language model
            model = transformers.AutoModel.from_config(config)
    return model


def make_inputs(
    model: nn.Module,
    kind: InputKind,
    *,
    batch: int,
    length: int,
    width: int | None = None,
    vocab_size: int | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """Return a random batch on the model's device.

    `gaussian` is standard normal of shape (batch, length, width) in the model's dtype. `tokens` are uniform in
    0..vocab_size-1, of shape (batch, length); the default vocabulary is that of the model's first embedding.

    Raises:
        ConfigError: `width` or `vocab_size` is needed and not known.

    Examples:
        >>> make_inputs(nn.Embedding(10, 4), InputKind.tokens, batch=2, length=5).shape
        torch.Size([2, 5])
    """
    generator = torch.Generator().manual_seed(seed)
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if kind is InputKind.gaussian:
        if width is None:
            raise ConfigError(
                "width: not given; Gaussian input needs the model's feature width, --width N (or --input tokens)"
            )
        values = torch.randn(batch, length, width, generator=generator)
        return values.to(device=parameter.device, dtype=parameter.dtype)
    if vocab_size is None:
        vocab_size = next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if vocab_size is None:
        raise ConfigError(
            "vocab_size: not given, and the model has no nn.Embedding to take it from; give --vocab-size N"
        )
    return torch.randint(vocab_size, (batch, length), generator=generator).to(parameter.device)


def find_object(target: str) -> Any:
    """Return the object at `package.module:name`.

    Raises:
        ConfigError: there is none.
    """
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"target: {target!r} is not of the form package.module:name, for example my_models:build")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the target exists, but a module that it imports does not
        raise ConfigError(
            f"target: no module {error.name!r} in {os.getcwd()} or among the installed packages; check the spelling, "
            "or run from the directory that holds it"
        ) from error
    try:
        return reduce(getattr, attribute.split("."), module)
    except AttributeError as error:
        names = ", ".join(name for name in vars(module) if not name.startswith("_"))
        raise ConfigError(f"target: {module_name} has no {attribute!r}; it has {names or 'nothing'}") from error


def _arguments(target: str, factory: Any, kwargs: str | None) -> dict[str, Any]:
    try:
        arguments = json.loads(kwargs) if kwargs is not None else {}
    except json.JSONDecodeError as error:
        raise ConfigError(f"kwargs: {kwargs!r} is not JSON ({error}); write it as '{{\"width\": 64}}'") from error
    if not isinstance(arguments, dict):
        raise ConfigError(f"kwargs: {kwargs!r} is not a JSON object; write it as '{{\"width\": 64}}'")
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"kwargs: {target} does not take these arguments: {error}; set them with --kwargs") from error
    except ValueError:
        pass  # a builtin without a signature: the call itself checks the arguments
    return arguments

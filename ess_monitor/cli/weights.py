"""Load weights from a file without running code in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ess_monitor.errors import CheckpointError

_SHOWN = 5
_FOREIGN_CLASS = re.compile(r"Unsupported (?:global: GLOBAL|class) ([\w.]+)")


def load_weights(path: str | Path, *, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return the tensors of a file by parameter name, on the CPU.

    `*.safetensors` files are read as such, all others by `torch.load(weights_only=True)`, which refuses pickles that
    hold more than tensors and plain containers. The file holds a state dict, or a Lightning checkpoint with one. Only
    names that begin with `prefix` are kept, without it (`model.` where a LightningModule holds the model).

    Raises:
        CheckpointError: the file is missing, is not a file of weights, or has no name with `prefix`.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "weights.pt")
        >>> torch.save({"state_dict": {"model.weight": torch.ones(2)}, "epoch": 3}, path)
        >>> load_weights(path, prefix="model.")
        {'weight': tensor([1., 1.])}
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint: {path} is not a file; give the path of a safetensors or torch.save file")
    weights = _tensors(path, _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path))
    chosen = {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}
    if not chosen:
        raise CheckpointError(f"prefix: no name in {path} begins with {prefix!r}; its names are {_some(weights)}")
    return chosen


def load_into(model: nn.Module, path: str | Path, *, prefix: str = "") -> None:
    """Load the weights of a file into `model`; they must be those of all its parameters and of nothing else.

    Of tensors that the model has under several names, as tied embeddings are, the file may hold one: transformers
    writes no more.

    Raises:
        CheckpointError: as for `load_weights`, or the weights do not fit. The model may then hold a part of them.
    """
    weights = load_weights(path, prefix=prefix)
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # wrong shapes; torch lists them below its first line
        problem = " ".join(str(error).split("\n\t")[1:2]) or str(error)
        raise CheckpointError(
            f"checkpoint: {path} does not fit {type(model).__name__}: {problem.strip()} Build the model with the sizes "
            "it was trained with"
        ) from error
    own = model.state_dict(keep_vars=True)
    loaded = {id(own[name]) for name in weights if name in own}
    missing = [name for name in missing if name not in own or id(own[name]) not in loaded]
    if missing or unexpected:
        facts = [f"{what} {_some(names)}" for what, names in (("lacks", missing), ("also has", unexpected)) if names]
        raise CheckpointError(
            f"checkpoint: {path} does not fit {type(model).__name__}: it {' and '.join(facts)}; cut a common start of "
            "all names off with a prefix"
        )


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint: {path} is not a safetensors file ({error}); write it with safetensors.torch.save_file"
        ) from error


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # other files fail in many ways, deep in pickle or zipfile
        foreign = _FOREIGN_CLASS.search(str(error))
        reason = (
            f"it holds a {foreign[1]}, which cannot be restored without running code"
            if foreign
            else "it cannot be read"
        )
        raise CheckpointError(
            f"checkpoint: {path} does not hold weights alone: {reason}; nothing of it was run. Save "
            "model.state_dict() with safetensors.torch.save_file or torch.save, and give that file"
        ) from error


def _tensors(path: Path, content: Any) -> dict[str, torch.Tensor]:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(
            f"checkpoint: {path} holds {'nothing' if content == {} else f'a {type(content).__name__}'}; allowed are a "
            "state dict and a Lightning checkpoint"
        )
    others = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise CheckpointError(
            f"checkpoint: {path} holds more than tensors: {_some(others)}; allowed are a state dict and a checkpoint "
            "whose 'state_dict' is one. Save model.state_dict() alone"
        )
    return {str(name): value for name, value in content.items()}


def _some(names: Any) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(repr(name) for name in names[:_SHOWN]) + more

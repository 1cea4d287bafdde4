"""Batches for the commands that need data of the user's: what a model is called with, and what it should answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ess_monitor.cli.model_loading import find_object
from ess_monitor.cli.weights import load_weights
from ess_monitor.errors import CheckpointError, ConfigError, EssMonitorError
from ess_monitor.tasks import IGNORED, SyntheticTask, accuracy, loss

_FORMS = "inputs, (inputs, targets), or a mapping of the model's keyword arguments"


class Batch(NamedTuple):
    """One batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Tensor | None = None
    """Of the same positions as the logits; -100 where nothing is asked."""

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        moved = {name: _moved(value, device) for name, value in self.kwargs.items()}
        targets = None if self.targets is None else self.targets.to(device)
        return Batch(tuple(_moved(value, device) for value in self.args), moved, targets)


def load_batches(option: str, source: str, count: int, size: int) -> list[Batch]:
    """Return the first `count` batches of a source.

    Args:
        option: what messages call it.
        source: a file of tensors (`inputs` and `targets`, or the model's keyword arguments), or `package.module:name`
            of a batch, of several, of a task of `ess_monitor.tasks`, or of a function that returns one of these.
        count: batches at most.
        size: sequences of a batch that is drawn from a task.

    Raises:
        ConfigError: the source does not exist, or is none of these.
    """
    if Path(source).is_file():
        try:
            found: Any = load_weights(source)
        except CheckpointError as error:
            raise ConfigError(
                f"{option}: {source} cannot be read as a file of tensors; write it with torch.save or "
                f'safetensors.torch.save_file({{"inputs": ..., "targets": ...}}) ({error})'
            ) from error
    else:
        try:
            found = find_object(source)
        except ConfigError as error:
            raise ConfigError(f"{option}: {source} is no file of tensors, and as an object: {error}") from error
        if callable(found) and not isinstance(found, SyntheticTask):
            found = found()
    if isinstance(found, SyntheticTask):
        return [
            Batch((inputs,), {}, targets)
            for inputs, targets in (
                found.batch(range(start, min(start + size, len(found))))
                for start in range(0, min(count * size, len(found)), size)
            )
        ]
    single = _batch(found)
    if single is None and isinstance(found, Iterable):
        several = [_batch(each) for each in islice(found, count)]
    else:
        several = [single]
    batches = [each for each in several if each is not None]
    if not batches or len(batches) < len(several):
        raise ConfigError(f"{option}: {source} holds a {type(found).__name__}; give {_FORMS}, or several of them")
    return batches


def evaluation(
    batches: list[Batch], progress: Callable[[Sequence[Batch]], Iterable[Batch]] = iter
) -> Callable[[nn.Module], Mapping[str, float]] | None:
    """Return the function that gives loss and accuracy of a model; None where the batches say no answers.

    It passes the batches through `progress`.

    With targets it is the cross-entropy in nats of the logits, at each position; with labels what the model returns as
    its loss, and the accuracy of the next token.
    """
    if not all(batch.targets is not None or "labels" in batch.kwargs for batch in batches):
        return None

    def evaluate(model: nn.Module) -> Mapping[str, float]:
        sums, total = {"loss": 0.0, "accuracy": 0.0}, 0
        for batch in progress(batches):
            output = model(*batch.args, **batch.kwargs)
            logits = getattr(output, "logits", output)
            targets, value = batch.targets, None
            if targets is None:
                logits, targets, value = logits[:, :-1], batch.kwargs["labels"][:, 1:], output.loss
            asked = int((targets != IGNORED).sum())
            if not asked:  # the mean over no position is NaN
                continue
            sums["loss"] += asked * float(loss(logits, targets) if value is None else value)
            sums["accuracy"] += asked * float(accuracy(logits, targets))
            total += asked
        return {name: value / total if total else math.nan for name, value in sums.items()}

    return evaluate


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _batch(found: Any) -> Batch | None:
    if isinstance(found, Tensor):
        return Batch((found,), {})
    if isinstance(found, Mapping) and all(isinstance(value, Tensor) for value in found.values()) and found:
        given = dict(found)
        if "inputs" in given and set(given) <= {"inputs", "targets"}:
            return Batch((given["inputs"],), {}, given.get("targets"))
        return Batch((), given)
    if isinstance(found, (tuple, list)) and len(found) == 2 and all(isinstance(value, Tensor) for value in found):
        return Batch((found[0],), {}, found[1])
    return None


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def explain(option: str, error: Exception) -> EssMonitorError:
    """Return the error for a model that does not run on the batches."""
    first_line = next(iter(str(error).splitlines()), "")
    return ConfigError(f"{option}: the model does not run on these batches: {type(error).__name__}: {first_line}")

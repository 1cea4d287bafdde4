"""Run forward passes inside a training that leave no trace: it goes on bit by bit as without them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ess_monitor import validation
from ess_monitor.capture.hooks.compiler import EagerStance
from ess_monitor.errors import CaptureError
from ess_monitor.evidence.data_parallel import ShardedParameters, why_not_alone, without_buffer_broadcasts
from ess_monitor.evidence.snapshot import ModelState, RandomStates


class Undisturbed:
    """A block in which a model may be called between two training steps, as often as need be.

    Inside, gradients are off and compiled code runs as it was written, so that hooks and patches see its calls. At the
    end, also after an exception, all is as it was at the start: random generators (torch's, Python's, NumPy's, and
    those that modules hold), buffers and other tensors of modules, their attributes and what lists, dicts, sets and
    deques among these hold, train and eval modes, `grad` and `requires_grad` of parameters. What the forward passes
    have added to modules is removed. What FSDP held sharded is sharded again.

    The copies take as much memory as the model's buffers and other tensors that are not parameters. Nothing waits for
    the device.

    Not put back are parameters that are written to, and what the forward pass and the hooks of others write elsewhere:
    into objects of their own classes, class attributes, globals or files. Step boundaries only: a backward pass that
    is still to come must not need what these forward passes write over. Reentrant checkpointing warns inside the block
    that no input requires a gradient.

    Args:
        model: as it is called.
        alone: this rank calls the model and the others do not. DDP then sends no buffers.

    Raises:
        CaptureError: at the start of the block, with `alone`: ranks exchange something in a forward pass; see
            `why_not_alone`.

    Examples:
        >>> model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
        >>> before = torch.get_rng_state()
        >>> with Undisturbed(model) as block:
        ...     outputs = []
        ...     for _ in range(2):
        ...         block.rewind()
        ...         outputs.append(model(torch.ones(4, 3)))
        >>> torch.equal(*outputs), torch.equal(before, torch.get_rng_state()), int(model[0].num_batches_tracked)
        (True, True, 0)
    """

    def __init__(self, model: nn.Module, *, alone: bool = False) -> None:
        self._model = validation.instance("model", model, nn.Module)
        self._alone = validation.flag("alone", alone)
        self._stance = EagerStance()
        self._leave = ExitStack()
        self._sharded: ShardedParameters | None = None
        self._state: ModelState | None = None
        self._random: RandomStates | None = None

    def __enter__(self) -> Undisturbed:
        if self._state is not None:
            raise CaptureError("this block is open already; make another Undisturbed to open one inside it")
        if self._alone and (reason := why_not_alone(self._model)):
            raise CaptureError(
                f"alone=True: one rank cannot run this model, because {reason}; let every rank run it, with alone=False"
            )
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(_own_autocast_cache())
            stack.callback(self._forget)
            if self._alone:
                stack.enter_context(without_buffer_broadcasts(self._model))
            self._state = ModelState(self._model)
            self._sharded = ShardedParameters(self._state.modules)
            self._random = RandomStates(self._state.devices)
            self._stance.begin()
            stack.callback(self._stance.end)
            # Called in the opposite order at the end, each of them also if another one fails.
            stack.callback(self._random.restore)
            stack.callback(self._state.restore)
            stack.callback(self._sharded.restore)
            self._leave = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._leave.close()

    def rewind(self) -> None:
        """Put everything back to where the block began. Call it before each forward pass.

        Each then draws the same random numbers and starts from the same buffers. FSDP's parameters stay whole.
        """
        if self._sharded is None or self._state is None or self._random is None:
            raise CaptureError("rewind() outside the block; call it inside `with Undisturbed(model) as block:`")
        self._sharded.settle()
        self._state.restore()
        self._random.restore()

    def _forget(self) -> None:
        self._sharded = self._state = self._random = None


@contextmanager
def undisturbed_evaluation(model: nn.Module) -> Iterator[None]:
    """Let a model be called in eval mode inside `Undisturbed`, once."""
    with Undisturbed(model):
        model.eval()
        yield


@contextmanager
def _own_autocast_cache() -> Iterator[None]:
    """Leave the cache of an autocast region that is open around the block as it is.

    It would give the casts of weights that are made here to the training's next forward pass. They are older than what
    may be written to the weights until then, and without gradients in some versions of torch.
    """
    inside = torch.autocast_increment_nesting() > 1
    torch.autocast_decrement_nesting()
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(before and not inside)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)

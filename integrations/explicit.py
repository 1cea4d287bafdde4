"""What the callbacks share for loops that their users write themselves: watch, a with-block, `step` and `sample`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

from torch import nn

from ess_monitor.errors import ConfigError
from ess_monitor.exporters import Exporter
from ess_monitor.integrations.common import CallbackBase, LoopFacts
from ess_monitor.pipeline.context import Metrics
from ess_monitor.records import RunStatus

Self = TypeVar("Self", bound="ExplicitLoop")


class ExplicitLoop(CallbackBase):
    """A callback that is told what to watch, and runs between `start` and `close`."""

    _model: nn.Module | None = None

    @abstractmethod
    def _facts(self) -> LoopFacts:
        """Of the loop that is watched."""

    @abstractmethod
    def _sinks(self) -> Iterable[Exporter]:
        """The framework's own loggers, and the table."""

    def __enter__(self: Self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close("finished" if kind is None else "failed")

    def start(self) -> None:
        """Build and start the monitor; the with-block does this. A second call does nothing.

        Raises:
            ConfigError: `watch` was not called, a layer pattern matches nothing, or mode auto is not possible here.
            NoLayersError: nothing in the model can be measured.
            CheckpointError: the state that was loaded is not a monitor's.
            ExporterError: a sink that was asked for cannot be opened.
        """
        if self._running:
            return
        if self._model is None:
            raise ConfigError(f"{type(self).__name__}: nothing to watch; call .watch(...) with the model first")
        self._open(self._model, self._facts(), self._sinks)

    def close(self, status: RunStatus = "finished") -> None:
        """End the run; the with-block does this. A second call does nothing."""
        self._close(status)

    @contextmanager
    def sample(self, metrics: Metrics | None = None) -> Iterator[None]:
        """Sample the forward pass inside the block if a sample is due; around one validation batch.

        For `capture={"source": "validation"}`: training batches are not sampled then.
        """
        if self.monitor is None or not self.monitor.sample_due:
            yield
            return
        with self.monitor.sample(metrics):
            yield

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict()` of an earlier run. In the middle of a run the monitor starts anew from it."""
        running = self._running
        self._close("finished")
        super().load_state_dict(state_dict)
        if running:
            self.start()

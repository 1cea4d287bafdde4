"""Generates synthetic tasks as map-style datasets: those of the paper (recall, selective copying, compression), and
recall in documents.

Every sample is a pure function of (seed, index): the same for every order of access, number of workers and batch size.
Targets are -100 where nothing is asked.

    >>> data = MQAR(MQARConfig(length=16, kv_pairs=2, vocab_size=12))
    >>> inputs, targets = data.batch(range(8))
    >>> inputs.shape, int((targets != -100).sum())
    (torch.Size([8, 16]), 16)
"""

from __future__ import annotations

from ess_monitor.tasks.base import IGNORED, SyntheticTask, TaskConfig
from ess_monitor.tasks.documents import SEPARATOR, Documents, DocumentsConfig
from ess_monitor.tasks.mad import Compression, CompressionConfig, SelectiveCopying, SelectiveCopyingConfig
from ess_monitor.tasks.metrics import RecallPerplexity, accuracy, loss, recall_perplexity
from ess_monitor.tasks.mqar import MQAR, MQARConfig

__all__ = [
    "IGNORED",
    "MQAR",
    "SEPARATOR",
    "Compression",
    "CompressionConfig",
    "Documents",
    "DocumentsConfig",
    "MQARConfig",
    "RecallPerplexity",
    "SelectiveCopying",
    "SelectiveCopyingConfig",
    "SyntheticTask",
    "TaskConfig",
    "accuracy",
    "loss",
    "recall_perplexity",
]

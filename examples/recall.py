"""Defines multi-query associative recall under Lightning, in a small setting in which the memory of a layer collapses.

The model has two mixers and two SwiGLU MLPs of width 32 and a state of 16. A sequence has 4 key-value pairs in 32
tokens. A weighted linear attention (WLA) whose gate starts at 1/2 (beta = 1) forgets within a few tokens and does not
learn to keep more. Its accuracy stays at 1/4, that of guessing among the four values.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from ess_monitor.featurizers import Backbone, BackboneConfig
from ess_monitor.tasks import MQAR, MQARConfig, accuracy, loss


@dataclass(frozen=True)
class Recall:
    """Settings of the model, the task and the training."""

    featurizer: str = "wla"
    beta: float = 1.0
    length: int = 32
    kv_pairs: int = 4
    state_size: int = 16
    width: int = 32
    vocab_size: int = 32
    batch_size: int = 32
    steps: int = 2000
    learning_rate: float = 5e-3
    seed: int = 0


class RecallModule(pl.LightningModule):
    """Trains a small backbone on recall, and logs loss and accuracy on the queries."""

    def __init__(self, recall: Recall) -> None:
        super().__init__()
        self.recall = recall
        options = {"beta": recall.beta} if recall.featurizer in ("wla", "gla") else {}
        torch.manual_seed(recall.seed)
        self.model = Backbone(
            BackboneConfig(
                vocab_size=recall.vocab_size,
                width=recall.width,
                featurizer=recall.featurizer,
                state_size=recall.state_size,
                mixer_options=options,
            )
        )

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return the cross-entropy on the queries."""
        tokens, targets = batch
        logits = self.model(tokens)
        value = loss(logits, targets)
        self.log("loss", value, prog_bar=True)
        self.log("accuracy", accuracy(logits, targets), prog_bar=True)
        return value

    def configure_optimizers(self) -> dict[str, object]:
        """Return AdamW with 50 warm-up steps and a constant rate after them."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.recall.learning_rate, weight_decay=0.1)
        warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}

    def train_dataloader(self) -> DataLoader[object]:
        """Return new samples for every step, the same ones for the same seed."""
        recall = self.recall
        data = MQAR(
            MQARConfig(
                length=recall.length,
                kv_pairs=recall.kv_pairs,
                vocab_size=recall.vocab_size,
                samples=recall.steps * recall.batch_size,
                seed=recall.seed,
            )
        )
        return DataLoader(data, batch_size=recall.batch_size)

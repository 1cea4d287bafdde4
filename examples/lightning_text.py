"""Trains a small GLA language model on real text under Lightning, and prints how it uses its memory.

The text is that of help() (see corpus.py) and is read as bytes. The program takes less than three
minutes on two cores.

    python examples/lightning_text.py [--steps 600] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from corpus import VOCABULARY, windows
from pytorch_lightning.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ess_monitor.exporters import read_event_log
from ess_monitor.featurizers import Backbone, BackboneConfig
from ess_monitor.integrations.lightning import ESSMonitorCallback
from ess_monitor.records import Measurement

LENGTH, BATCH = 128, 16


class TextModule(pl.LightningModule):
    """Next-byte prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Backbone(BackboneConfig(vocab_size=VOCABULARY, width=64, depth=3, featurizer="gla", state_size=32))

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        """Return the cross-entropy in nats per byte."""
        tokens = batch[0].long()
        logits = self.model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    """Train, then print the loss and the ESS of each layer over the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path("runs/text"), help="folder of the logs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to FILE")
    arguments = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")

    torch.set_num_threads(1)  # the tensors are small: a second thread does not help
    pl.seed_everything(0, verbose=False)
    text = windows(LENGTH + 1)
    print(f"{text.numel():,} bytes of licenses and documentation, {len(text):,} windows of {LENGTH} bytes")

    events = arguments.out / "events.jsonl"
    events.parent.mkdir(parents=True, exist_ok=True)
    events.unlink(missing_ok=True)
    callback = ESSMonitorCallback(
        every_n_steps=50,
        overhead_budget_ratio=0.05,
        # A short run. Without a task metric a layer counts as collapsed only if its retention is low, too.
        diagnosis={"warmup_steps": 200},
        exporters=[{"kind": "event_log", "path": str(events)}],
    )
    trainer = pl.Trainer(
        max_steps=arguments.steps,
        accelerator="cpu",
        logger=TensorBoardLogger(arguments.out, name=None),
        callbacks=[callback],
        enable_checkpointing=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
    )
    loader = DataLoader(TensorDataset(text), batch_size=BATCH, shuffle=True, drop_last=True)
    trainer.fit(TextModule(), loader)

    measurements = [Measurement.model_validate(e.data) for e in read_event_log(events) if e.event == "measurement"]
    findings = list(itertools.chain.from_iterable(m.findings for m in measurements))
    layers = [r.layer for r in measurements[-1].readings]
    table = Table(title="ESS / TSS of each layer over the run")
    for column in ("step", "loss", *layers):
        table.add_column(column, justify="right", overflow="fold")
    rows = []
    for m in measurements:
        sizes = {r.layer: [r.effective_size, r.state_capacity] for r in m.readings}
        rows.append({"step": m.step, "loss": m.metrics.get("loss"), "layers": sizes})
        cells = (f"{sizes[name][0]:.1f} / {sizes[name][1]:.0f}" for name in layers)
        table.add_row(str(m.step), f"{m.metrics['loss']:.3f}", *cells)
    console = Console()
    console.print(table)
    for finding in findings:
        console.print(f"step {finding.step}: {finding.layer} is {finding.condition}: {finding.reason}")
    print(f"{len(findings)} findings; logs in {arguments.out} (tensorboard --logdir {arguments.out})")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"rows": rows, "findings": [f.model_dump() for f in findings]}, indent=2))


if __name__ == "__main__":
    main()

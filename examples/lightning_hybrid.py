"""Trains a small hybrid of Mamba-2 and softmax attention on real text under Lightning.

The model is transformers' own Bamba, randomly initialized: four layers, of which the third is attention. The state of
its state-space layers has a fixed size; that of its attention grows with the sequence. The monitor measures both, and
the model needs no changes. The text is that of help() (see corpus.py) and is read as bytes. The program
takes less than three minutes on two cores.

Result: with transformers' initialization (step sizes around 1.3, A = -1, ..., -heads) the recurrence forgets within one
token, and it does not learn to keep more in these steps. Attention does all the work, and the state-space layers are
reported as collapsed. With `--autopilot auto` the decay of the deepest one is divided by 100, and its memory grows to
several dimensions. The loss of such a short run does not depend on it.

    python examples/lightning_hybrid.py [--steps 400] [--autopilot auto] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
import transformers
from corpus import VOCABULARY, windows
from pytorch_lightning.loggers import CSVLogger
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset
from transformers import BambaConfig, BambaForCausalLM

from ess_monitor import describe
from ess_monitor.exporters import read_event_log
from ess_monitor.integrations.lightning import ESSMonitorCallback
from ess_monitor.records import Measurement

LENGTH, BATCH = 128, 8


class HybridModule(pl.LightningModule):
    """Next-byte prediction with a Bamba: Mamba-2, Mamba-2, attention, Mamba-2."""

    def __init__(self) -> None:
        super().__init__()
        self.model = BambaForCausalLM(
            BambaConfig(
                vocab_size=VOCABULARY,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=4,
                attn_layer_indices=[2],
                num_attention_heads=4,
                num_key_value_heads=2,
                mamba_n_heads=8,
                mamba_d_head=16,
                mamba_n_groups=1,
                mamba_d_state=16,
                mamba_expand=2,
                mamba_chunk_size=32,
                use_cache=False,
                pad_token_id=0,
                bos_token_id=0,
                eos_token_id=0,
            )
        )

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        """Return the cross-entropy in nats per byte. The model shifts the labels."""
        tokens = batch[0].long()
        loss: torch.Tensor = self.model(input_ids=tokens, labels=tokens).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    """Describe the model, train it, and print loss and ESS over the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--autopilot", choices=("off", "advise", "auto"), default="advise")
    parser.add_argument("--out", type=Path, default=Path("runs/hybrid"), help="folder of the logs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to FILE")
    arguments = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
    transformers.logging.set_verbosity_error()  # it warns that there are no kernels for the CPU
    torch.set_num_threads(1)  # the tensors are small: a second thread does not help
    pl.seed_everything(0, verbose=False)

    module = HybridModule()
    print(describe(module))
    events = arguments.out / "events.jsonl"
    events.parent.mkdir(parents=True, exist_ok=True)
    events.unlink(missing_ok=True)
    callback = ESSMonitorCallback(
        every_n_steps=max(1, min(25, arguments.steps // 5)),
        overhead_budget_ratio=0.05,
        diagnosis={"warmup_steps": 100},  # a short run
        autopilot=arguments.autopilot,
        exporters=[{"kind": "event_log", "path": str(events)}],
    )
    trainer = pl.Trainer(
        max_steps=arguments.steps,
        accelerator="cpu",
        logger=CSVLogger(arguments.out, name=None),
        callbacks=[callback],
        enable_checkpointing=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
    )
    loader = DataLoader(TensorDataset(windows(LENGTH)), batch_size=BATCH, shuffle=True, drop_last=True)
    trainer.fit(module, loader)

    measurements = [Measurement.model_validate(e.data) for e in read_event_log(events) if e.event == "measurement"]
    layers = [reading.layer for reading in measurements[-1].readings]
    table = Table(
        title="ESS / TSS of each layer over the run", caption="The TSS of attention is the number of earlier tokens."
    )
    for column in ("step", "loss", *(name.removeprefix("model.model.") for name in layers)):
        table.add_column(column, justify="right", overflow="fold")
    rows = []
    for m in measurements:
        sizes = {r.layer: [r.effective_size, r.state_capacity] for r in m.readings}
        rows.append({"step": m.step, "loss": m.metrics["loss"], "layers": sizes})
        cells = (f"{sizes[name][0]:.1f} / {sizes[name][1]:.0f}" for name in layers)
        table.add_row(str(m.step), f"{m.metrics['loss']:.3f}", *cells)
    Console().print(table)
    assert callback.monitor is not None
    print(f"the monitor took {callback.monitor.overhead_ratio:.1%} of the training time; event log: {events}")
    if arguments.json is not None:
        content = {"rows": rows, "overhead_ratio": callback.monitor.overhead_ratio}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()

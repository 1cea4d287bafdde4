"""A checkpoint that is taken up by another process. What can be tried inside one process is in test_contract.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.eager import EAGER_DIAGNOSIS, NO_EVIDENCE
from tests.programs import run_program

pytest.importorskip("pytorch_lightning")

SETTINGS = {
    "capture": {"heads": None},
    "diagnosis": {**EAGER_DIAGNOSIS, "metric": "val_accuracy"},
    "evidence": NO_EVIDENCE,
    "autopilot": {"mode": "auto", "lag_steps": 2, "cooldown_steps": 6, "loss": "loss"},
}

RESUME_SCRIPT = """
import sys, warnings, logging
warnings.simplefilter("ignore")
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader
from ess_monitor.featurizers import Backbone, BackboneConfig
from ess_monitor.integrations.lightning import ESSMonitorCallback

torch.set_num_threads(1)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        options = {{"beta": 1.0}}
        config = BackboneConfig(vocab_size=16, width=16, featurizer="wla", state_size=8, mixer_options=options)
        self.model = Backbone(config)

    def training_step(self, batch, batch_idx):
        generator = torch.Generator().manual_seed(self.trainer.fit_loop.epoch_loop._batches_that_stepped)
        tokens = torch.randint(0, 16, (4, 40), generator=generator)
        logits = self.model(tokens)
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


steps, target, *resume = sys.argv[1:]
callback = ESSMonitorCallback(every_n_steps=4, overhead_budget_ratio=None, table=False, **{settings})
trainer = pl.Trainer(
    max_epochs=int(steps) // 8, accelerator="cpu", logger=False, callbacks=[callback], enable_progress_bar=False,
    enable_model_summary=False, enable_checkpointing=False, default_root_dir=sys.path[0],
)
data = DataLoader(range(8), batch_size=1)
trainer.fit(Module(), data, ckpt_path=f"{{sys.path[0]}}/{{resume[0]}}" if resume else None)
trainer.save_checkpoint(f"{{sys.path[0]}}/{{target}}")
"""


def test_a_run_resumed_in_a_new_process_ends_bitwise_as_the_uninterrupted_one(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(RESUME_SCRIPT.format(settings=SETTINGS))

    for arguments in (("24", "whole.ckpt"), ("8", "part.ckpt"), ("24", "rest.ckpt", "part.ckpt")):
        process = run_program([script, *arguments], tmp_path / f"of_{arguments[1]}", imports=["pytorch_lightning"])
        assert process.returncode == 0, process.stderr
    whole, rest = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.ckpt", "rest.ckpt"))
    assert whole["callbacks"]["ess_monitor"]["autopilot"]["spent"] > 0
    assert (
        rest["callbacks"]["ess_monitor"]["autopilot"]["spent"]
        == whole["callbacks"]["ess_monitor"]["autopilot"]["spent"]
    )
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, rest["state_dict"][name]), name
